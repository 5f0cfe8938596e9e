"""The order of training images: a function of (seed, step), so that a resumed run continues where it was
without any state.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddim_jax.data.source import Batch, Source
from ddim_jax.utils import interrupts


def order(length: int, seed: int, first: int, count: int) -> np.ndarray:
    """Indices at positions first .. first + count - 1 of the endless stream in which every epoch is a new
    permutation. (count,)
    """
    epochs = range(first // length, (first + count - 1) // length + 1)
    stream = np.concatenate([_permutation(length, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * length :][:count]


class Plan(NamedTuple):
    """What the batch of a step is a function of."""

    source: Source
    batch_size: int  # over all processes
    seed: int
    flip: bool = False  # mirror each image left to right with probability 1/2, by (seed, step)
    shard: int = 0  # which contiguous part of each batch this process gets,
    num_shards: int = 1  # (batch_size / num_shards, H, W, C)


def batch_at(plan: Plan, step: int) -> Batch:
    """The batch of a step, 0, 1, ...; every image comes once an epoch, none is dropped."""
    size = plan.batch_size // plan.num_shards
    part = slice(plan.shard * size, (plan.shard + 1) * size)
    batch = plan.source[order(len(plan.source), plan.seed, step * plan.batch_size, plan.batch_size)[part]]
    if plan.flip:
        mirrored = np.flatnonzero(_rng(plan.seed, 1, step).random(plan.batch_size)[part] < 0.5)
        batch.images[mirrored] = batch.images[mirrored, :, ::-1]  # the batch is a copy of its own
    return batch


def batches(plan: Plan, first_step: int = 0, threads: int = 0, workers: int = 0) -> Iterator[Batch]:
    """The batches of steps first_step, first_step + 1, ..., without end and ahead of time: by so many threads of this
    process, or by so many processes beside it. They change no batch; without any of them each is made when it is asked
    for. ValueError if the batch does not divide over the processes that train, or where an image cannot be read.
    """
    if plan.batch_size % plan.num_shards:
        raise ValueError(f"batch_size {plan.batch_size} does not divide over {plan.num_shards} processes")
    if not threads and not workers:
        return (batch_at(plan, step) for step in itertools.count(first_step))
    return _ahead(plan, first_step, threads, workers)


def _ahead(plan: Plan, first_step: int, threads: int, workers: int) -> Iterator[Batch]:
    import grain  # it takes a second
    from absl import flags

    steps = grain.MapDataset.range(first_step, sys.maxsize).map(functools.partial(batch_at, plan))
    stream = steps.to_iter_dataset(grain.ReadOptions(max(threads, 1), max(threads, 2)))
    if workers:
        if not flags.FLAGS.is_parsed():  # its workers read flags of their own, also where nobody has any
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    iterator = iter(stream)
    try:
        with interrupts.not_for_children():
            read = itertools.chain([next(iterator)], iterator)  # the first starts the workers
        for batch in read:  # out of the workers' shared memory, which is theirs again then
            yield Batch(*(None if array is None else np.array(array) for array in batch))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"a process that reads images has died ({reason}); the same command goes on") from error
    finally:
        iterator.close()
        del iterator, stream  # while there is still an interpreter: they say so otherwise
        gc.collect()


@functools.lru_cache(maxsize=2)  # a batch touches one epoch, or the seam of two
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return _rng(seed, 0, epoch).permutation(length)


def _rng(seed: int, purpose: int, count: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, purpose, count]))
