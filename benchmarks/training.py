"""How fast a config trains on this machine, how near that is to what the machine can do, and how long all of it takes.

    python -m benchmarks.training --config configs/cifar10.py [--config.model.dtype=bfloat16] [--out FILE.json]

The update that training runs, over all devices, on random images that are on the devices already, beside the rate of
one large matrix product in the same dtype. Operations are those of the model as XLA counts them before it optimises;
what is computed twice to save memory counts once.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import pathlib
import platform
import statistics
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import cli
from ddim_jax import config as config_lib
from ddim_jax.data import Batch
from ddim_jax.training import loop
from ddim_jax.utils import sharding
from experiments import common

REPEATS = 7
OPTIONS = {
    "steps": ("10", "Updates in each of the seven runs that are timed."),
    "out": (None, "Write the numbers to this file too, as JSON."),
}


def main(options: types.SimpleNamespace) -> None:
    (steps,) = common.ints("steps", options.steps)
    found = measure(options.config, steps)
    config, size = options.config, options.config.train.batch_size
    print(
        f"{config.name}, {config.model.dtype}, batch {size}, {found['devices']} x {found['device']} "
        f"({platform.machine()}), jax {jax.__version__}, median of {REPEATS} runs of {steps} updates\n"
    )
    hours = found["seconds_per_step"] * config.train.num_steps / 3600
    rows = [
        ("update", f"{1e3 * found['seconds_per_step']:,.1f} ms ({found['fastest']:,.1f}..{found['slowest']:,.1f})"),
        ("images/s", f"{size / found['seconds_per_step']:,.1f}"),
        ("model TFLOP/s", f"{found['tflops']:,.3f}, of {found['gflop_per_image']:,.1f} GFLOP an image"),
        ("one matrix product, TFLOP/s", f"{found['ceiling_tflops']:,.3f}"),
        ("fraction of that", f"{found['tflops'] / found['ceiling_tflops']:.1%}"),
        ("memory of an update", f"{found['memory_gb']:.2f} GB on each device"),
        ("compilation", f"{found['compile_seconds']:.0f} s"),
        (f"{config.train.num_steps:,} updates", f"{hours:,.1f} h"),
    ]
    print(common.markdown(("", "measured"), rows))
    if options.out:
        common.write_json(pathlib.Path(options.out), found)


def measure(config: config_lib.Config, steps: int) -> dict[str, Any]:
    mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    recipe, shape = config_lib.recipe(config), config_lib.image_shape(config.model)
    state, key = loop.first_state(recipe, mesh)
    begin = time.perf_counter()
    update_step, flops = loop.compiled_update(recipe, mesh, state, key, shape)
    compile_seconds = time.perf_counter() - begin
    size, classes = config.train.batch_size, config.model.num_classes
    rng = np.random.default_rng(0)
    labels = sharding.split_batch(mesh, rng.integers(0, classes, size, dtype=np.int32)) if classes else None
    batch = Batch(sharding.split_batch(mesh, rng.integers(0, 256, (size, *shape), dtype=np.uint8)), labels)
    held = [state]  # the state before is given up in every update

    def run() -> Any:
        metrics = None
        for _ in range(steps):
            held[0], metrics = update_step(held[0], batch.images, batch.labels, key)
            if jax.default_backend() == "cpu":  # virtual devices deadlock if they run ahead
                jax.block_until_ready(metrics)
        return metrics

    times = [seconds / steps for seconds in timed(run)]
    memory = update_step.memory_analysis()
    return {
        "config": dataclasses.asdict(config),
        "devices": mesh.size,
        "device": jax.devices()[0].device_kind,
        "seconds_per_step": statistics.median(times),
        "fastest": 1e3 * min(times),
        "slowest": 1e3 * max(times),
        "gflop_per_image": flops / size / 1e9,
        "tflops": flops / statistics.median(times) / 1e12,
        "ceiling_tflops": machines(mesh.size) * matrix_product_rate(config.model.dtype) / 1e12,
        "memory_gb": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e9,
        "compile_seconds": compile_seconds,
        "jax": jax.__version__,
    }


def machines(devices: int) -> int:
    """How many do a matrix product by themselves: the devices of a CPU share its cores."""
    return 1 if jax.default_backend() == "cpu" else devices


def matrix_product_rate(dtype: Any) -> float:
    """Operations a second of a product of two square matrices on one device."""
    size, times = (2048, 1) if jax.default_backend() == "cpu" else (8192, 10)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype) / size**0.5  # its powers stay finite
    product = jax.jit(lambda a, b: a @ b)

    def run():
        b = a
        for _ in range(times):
            b = product(a, b)
        return b

    return times * 2 * size**3 / statistics.median(timed(run))


def copy_rate() -> float:
    """Bytes a second, read and written, where one device adds 1 to an array that is larger than most caches, in its
    place.
    """
    held = [jnp.zeros(2**26 if jax.default_backend() == "cpu" else 2**28, jnp.float32)]
    add = jax.jit(lambda values: values + 1, donate_argnums=0)

    def run() -> Any:
        held[0] = add(held[0])
        return held[0]

    return 2 * held[0].nbytes / statistics.median(timed(run))


def timed(run: Callable[[], Any]) -> list[float]:
    """Seconds of each of REPEATS runs, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


if __name__ == "__main__":
    cli.start(main, OPTIONS)
