"""The training speed of a config on this machine: time of an update, model FLOP/s, and total training time.

    python -m benchmarks.training --config configs/cifar10.py [--config.model.dtype=bfloat16] [--out FILE.json]

Times the update of training over all devices, on random images that are already on the devices. The rate of one large
matrix product in the same dtype is measured for comparison. Operations are those of the model, as XLA counts them
before its optimizations. An operation that is recomputed to save memory counts once.
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
from typing import Any

import jax
import numpy as np

from ddim_jax import cli
from ddim_jax import config as config_lib
from ddim_jax.data import Batch
from ddim_jax.planning.measure import REPEATS, machines, matrix_product_rate, timed
from ddim_jax.training import loop
from ddim_jax.utils import sharding
from experiments import common

OPTIONS = {
    "steps": ("10", "The number of updates in each of the seven timed runs."),
    "out": (None, "Also write the numbers to this JSON file."),
}


def main(options: types.SimpleNamespace) -> None:
    (steps,) = common.ints("steps", options.steps)
    speed = measure(options.config, steps)
    config, size = options.config, options.config.train.batch_size
    print(
        f"{config.name}, {config.model.dtype}, batch {size}, {speed['devices']} x {speed['device']} "
        f"({platform.machine()}), jax {jax.__version__}, median of {REPEATS} runs of {steps} updates\n"
    )
    hours = speed["seconds_per_step"] * config.train.num_steps / 3600
    rows = [
        (
            "update",
            f"{1e3 * speed['seconds_per_step']:,.1f} ms ({speed['fastest']:,.1f}..{speed['slowest']:,.1f})",
        ),
        ("images/s", f"{size / speed['seconds_per_step']:,.1f}"),
        ("model TFLOP/s", f"{speed['tflops']:,.3f}, at {speed['gflop_per_image']:,.1f} GFLOP per image"),
        ("one matrix product, TFLOP/s", f"{speed['ceiling_tflops']:,.3f}"),
        ("fraction of that rate", f"{speed['tflops'] / speed['ceiling_tflops']:.1%}"),
        ("memory of an update", f"{speed['memory_gb']:.2f} GB per device"),
        ("compilation", f"{speed['compile_seconds']:.0f} s"),
        (f"{config.train.num_steps:,} updates", f"{hours:,.1f} h"),
    ]
    print(common.markdown(("", "measured"), rows))
    if options.out:
        common.write_json(pathlib.Path(options.out), speed)


def measure(config: config_lib.Config, steps: int) -> dict[str, Any]:
    """The measured numbers, by name."""
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
    current = [state]  # every update donates the previous state

    def run() -> Any:
        metrics = None
        for _ in range(steps):
            current[0], metrics = update_step(current[0], batch.images, batch.labels, key)
            if jax.default_backend() == "cpu":  # virtual devices deadlock if several updates are in flight
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


if __name__ == "__main__":
    cli.start(main, OPTIONS)
