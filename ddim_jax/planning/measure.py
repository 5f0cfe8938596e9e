"""The rates of the devices of this machine, and the time of programs on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.planning.programs import Program
from ddim_jax.planning.table import Rates
from ddim_jax.samplers import SamplingProcess
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


def update(program: Program, compiled: jax.stages.Compiled) -> float:
    """The median time of an update in seconds, on random values."""
    state, *others = filled(program.arguments)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, *others)
        return metrics

    return statistics.median(timed(step))


def sampler(program: Program, process: SamplingProcess, compiled: jax.stages.Compiled) -> float:
    """The median time of a batch in seconds, with random parameters."""
    sampler, denoise, _, *others = filled(program.arguments)
    transitions = sharding.put_replicated(program.mesh, jax.tree.map(jnp.asarray, process.transitions))
    return statistics.median(timed(lambda: compiled(sampler, denoise, transitions, *others)))


def filled(arguments: Any) -> Any:
    """Arrays for the shapes of a tree: small positive numbers, pixels, and zeros."""
    rng = np.random.default_rng(0)

    def array(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(0), leaf.size).reshape(leaf.shape)
            return jax.device_put(keys, leaf.sharding)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            values = rng.uniform(0, 0.02, leaf.shape).astype(leaf.dtype)
        else:
            values = rng.integers(0, 256 if leaf.dtype == np.uint8 else 1, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return jax.tree.map(array, arguments)
