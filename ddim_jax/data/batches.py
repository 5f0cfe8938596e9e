"""The order of training images: a function of (seed, step), so that a resumed run continues where it was
without any state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from ddim_jax.data.sources import Batch, Source


def order(length: int, seed: int, first: int, count: int) -> np.ndarray:
    """Indices at positions first .. first + count - 1 of the endless stream in which every epoch is a new
    permutation. (count,)
    """
    epochs = range(first // length, (first + count - 1) // length + 1)
    stream = np.concatenate([_permutation(length, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * length :][:count]


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    flip: bool = False,
    shard: int = 0,
    num_shards: int = 1,
) -> Iterator[Batch]:
    """The batches of steps first_step, first_step + 1, ..., without end.

    Every image comes once an epoch; none is dropped. flip: mirrors each image left to right with probability 1/2,
    by (seed, step). shard, num_shards: which contiguous part of each batch this process gets, (batch_size /
    num_shards, H, W, C).
    """
    if batch_size % num_shards:
        raise ValueError(f"batch_size {batch_size} does not divide over {num_shards} processes")
    size = batch_size // num_shards
    part = slice(shard * size, (shard + 1) * size)
    step = first_step
    while True:
        batch = source[order(len(source), seed, step * batch_size, batch_size)[part]]
        if flip:
            mirrored = _rng(seed, 1, step).random(batch_size)[part] < 0.5
            batch = batch._replace(
                images=np.where(mirrored[:, None, None, None], batch.images[:, :, ::-1], batch.images)
            )
        yield batch
        step += 1


@functools.lru_cache(maxsize=2)  # a batch touches one epoch, or the seam of two
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return _rng(seed, 0, epoch).permutation(length)


def _rng(seed: int, purpose: int, count: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, purpose, count]))
