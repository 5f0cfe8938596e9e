"""The rates of the devices of this machine, and the time of programs on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import sampling
from ddim_jax.planning import programs
from ddim_jax.planning.table import Rates
from ddim_jax.sampling import Pipeline
from ddim_jax.training import loop
from ddim_jax.training.recipe import Recipe
from ddim_jax.utils import sharding

REPEATS = 7

# device_kind of a GPU begins with -> published peak: bfloat16 operations per second without sparsity, bytes per second.
# Sources: the data sheets of NVIDIA (SXM versions).
GPUS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM": (312e12, 2.039e12),
}


def local_rates(dtype: str) -> Rates:
    """The rates of a device of this machine: the published ones of a known GPU, else those of a matrix product in this
    dtype and of a copy, as measured.
    """
    kind, memory = jax.local_devices()[0].device_kind, sharding.device_memory()
    for name, (flops, bandwidth) in GPUS.items():
        if kind.startswith(name):
            return Rates(memory, flops, bandwidth, "the published peak", caches=True)
    count = jax.local_device_count() // machines(jax.local_device_count())
    source = "the measured rate of a matrix product and of a copy"
    return Rates(memory, matrix_product_rate(dtype) / count, copy_rate() / count, source, caches=True)


def machines(devices: int) -> int:
    """The number of devices with their own compute units. The virtual devices of a CPU share its cores, so it is 1."""
    return 1 if jax.default_backend() == "cpu" else devices


def matrix_product_rate(dtype: Any) -> float:
    """Operations per second of a product of two square matrices on one device."""
    size, times = (2048, 1) if jax.default_backend() == "cpu" else (8192, 10)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5  # so that its powers stay finite
    product = jax.jit(lambda a, b: a @ b)

    def run():
        b = a
        for _ in range(times):
            b = product(a, b)
        return b

    return times * 2 * size**3 / statistics.median(timed(run))


def copy_rate() -> float:
    """Bytes per second, read and written, of an in-place addition of 1 on one device. The array is larger than most
    caches.
    """
    values = [jnp.zeros(2**26 if jax.default_backend() == "cpu" else 2**28, jnp.float32)]
    add = jax.jit(lambda array: array + 1, donate_argnums=0)

    def run() -> Any:
        values[0] = add(values[0])
        return values[0]

    return 2 * values[0].nbytes / statistics.median(timed(run))


def timed(run: Callable[[], Any]) -> list[float]:
    """The times in seconds of REPEATS runs, after one warm-up run."""
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def update(recipe: Recipe, mesh: jax.sharding.Mesh, compiled: jax.stages.Compiled, shape: tuple[int, ...]) -> float:
    """The median time of an update in seconds, on random images."""
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

    return statistics.median(timed(step))


def sampler(pipeline: Pipeline, compiled: jax.stages.Compiled) -> float:
    """The median time of a batch in seconds, with random parameters. The parameters of the pipeline may be shapes."""
    mesh, process = pipeline.mesh, pipeline.process
    params = jax.jit(pipeline.denoiser.network.init, out_shardings=sharding.replicated(mesh))(jax.random.key(0))
    index = np.arange(programs.batch_of(pipeline))
    labels = sampling.labels_of(pipeline, index)
    labels = None if labels is None else sharding.split_batch(mesh, labels)
    keys, x = sampling.start(pipeline, sharding.split_batch(mesh, index))
    arguments = (
        jax.tree.map(lambda leaf: leaf, process.sampler),
        jax.device_put(programs.conditioned(pipeline)(params, labels), compiled.input_shardings[0][1]),
        sharding.put_replicated(mesh, jax.tree.map(jnp.asarray, process.transitions)),
        x,
        keys if process.sampler.stochastic else None,
    )
    return statistics.median(timed(lambda: compiled(*arguments)))
