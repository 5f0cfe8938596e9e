"""Batches of training images. Each is a function of (seed, step), so a resumed run continues without saved state."""

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
    """The image indices (count,) at positions first .. first + count - 1 of the infinite stream in which every epoch is
    a new permutation of 0..length - 1.
    """
    epochs = range(first // length, (first + count - 1) // length + 1)
    stream = np.concatenate([_permutation(length, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * length :][:count]


class Plan(NamedTuple):
    """The settings that, with the step, determine a batch."""

    source: Source
    batch_size: int  # over all processes
    seed: int
    flip: bool = False  # whether to flip each image horizontally with probability 1/2, by (seed, step)
    shard: int = 0  # the index of the contiguous slice of each batch that this process reads,
    num_shards: int = 1  # (batch_size / num_shards, H, W, C)


def batch_at(plan: Plan, step: int) -> Batch:
    """The batch of a step, 0, 1, .... An epoch has every image exactly once."""
    size = plan.batch_size // plan.num_shards
    shard = slice(plan.shard * size, (plan.shard + 1) * size)
    batch = plan.source[order(len(plan.source), plan.seed, step * plan.batch_size, plan.batch_size)[shard]]
    if plan.flip:
        flipped = np.flatnonzero(_rng(plan.seed, 1, step).random(plan.batch_size)[shard] < 0.5)
        batch.images[flipped] = batch.images[flipped, :, ::-1]  # in place: the batch is a copy
    return batch


def batches(plan: Plan, first_step: int = 0, threads: int = 0, workers: int = 0) -> Iterator[Batch]:
    """The infinite stream of batches of steps first_step, first_step + 1, ....

    threads, workers: how many threads of this process, or worker processes, prefetch batches. If both are 0, a batch is
    read on request. They do not change the batches. ValueError if batch_size is not a multiple of num_shards, and if
    an image cannot be read.
    """
    if plan.batch_size % plan.num_shards:
        raise ValueError(f"batch_size {plan.batch_size} does not divide over {plan.num_shards} processes")
    if not threads and not workers:
        return (batch_at(plan, step) for step in itertools.count(first_step))
    return _prefetched(plan, first_step, threads, workers)


def _prefetched(plan: Plan, first_step: int, threads: int, workers: int) -> Iterator[Batch]:
    import grain  # its import takes a second
    from absl import flags

    steps = grain.MapDataset.range(first_step, sys.maxsize).map(functools.partial(batch_at, plan))
    stream = steps.to_iter_dataset(grain.ReadOptions(max(threads, 1), max(threads, 2)))
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, also in a program without absl flags
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=2))
    iterator = iter(stream)
    try:
        with interrupts.not_for_children():
            all_batches = itertools.chain([next(iterator)], iterator)  # the first batch starts the workers
        for batch in all_batches:  # copied, because the workers reuse their shared memory
            yield Batch(*(None if array is None else np.array(array) for array in batch))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"a worker process for images has died ({reason}); run the same command to resume") from error
    finally:
        iterator.close()
        del iterator, stream  # before the interpreter exits: they print a warning otherwise
        gc.collect()


@functools.lru_cache(maxsize=2)  # a batch has images of one epoch, or of two successive ones
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return _rng(seed, 0, epoch).permutation(length)


def _rng(seed: int, purpose: int, count: int) -> np.random.Generator:
    """The random stream of (seed, purpose, count). purpose: 0 for permutations by epoch, 1 for flips by step."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, purpose, count]))
