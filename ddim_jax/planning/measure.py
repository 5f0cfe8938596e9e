"""The time of programs on the devices of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddim_jax import sampling
from ddim_jax.planning.table import Rates
from ddim_jax.sampling import Pipeline
from ddim_jax.training import loop
from ddim_jax.training.recipe import Recipe
from ddim_jax.utils import sharding

REPEATS = 5

# device_kind of a GPU begins with -> published peak: bfloat16 operations per second without sparsity, bytes per second.
# Sources: the data sheets of NVIDIA (SXM versions).
GPUS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100": (989e12, 3.35e12),
    "NVIDIA A100": (312e12, 2.039e12),
}


def gpu_rates() -> Rates:
    """The memory of a GPU of this machine, and its published peak, if it is known."""
    kind = jax.local_devices()[0].device_kind
    flops, bandwidth = next((rates for name, rates in GPUS.items() if kind.startswith(name)), (None, None))
    return Rates(sharding.device_memory(), flops, bandwidth)


def update(recipe: Recipe, mesh: jax.sharding.Mesh, compiled: jax.stages.Compiled, shape: tuple[int, ...]) -> float:
    """The median time of an update in seconds, on random images, after one that is not counted."""
    state, key = loop.first_state(recipe, mesh)
    key = jax.device_put(key, sharding.replicated(mesh))
    rng = np.random.default_rng(0)
    images = sharding.split_batch(mesh, rng.integers(0, 256, (recipe.batch_size, *shape), np.uint8))
    labels = None
    if recipe.network.num_classes:
        labels = sharding.split_batch(mesh, rng.integers(0, recipe.network.num_classes, recipe.batch_size, np.int32))

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, images, labels, key)
        return metrics

    return median(step)


def sampler(pipeline: Pipeline, compiled: jax.stages.Compiled) -> float:
    """The median time of a batch in seconds, with random parameters, after one that is not counted."""
    mesh, network = pipeline.mesh, pipeline.denoiser.network
    params = jax.jit(network.init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))
    index = next(sampling.batch_indices(pipeline.batch_size, mesh, 0, pipeline.batch_size))
    labels = sampling.labels_of(pipeline, index)
    labels = None if labels is None else sharding.split_batch(mesh, labels)
    keys, x = sampling.start(pipeline, sharding.split_batch(mesh, index))
    return median(lambda: compiled(params, labels, x, keys))


def median(run: Callable[[], Any]) -> float:
    """The median time of run() in seconds."""
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
