"""Compile time and memory of sampling, at S = 10 and at S = 1000.

    python -m benchmarks.sampling --config configs/digits.py

Compile time and peak memory must not depend on S, because the steps are one `lax.scan`. The persistent compilation
cache is not used.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import platform
import statistics
import time
import types

import jax
import numpy as np

from ddim_jax import cli, samplers, sampling
from ddim_jax import config as config_lib
from ddim_jax.utils import sharding

REPEATS = 5
OPTIONS = {"steps": ("10,1000", "The values of S.")}


def main(options: types.SimpleNamespace) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    config = options.config
    device = jax.devices()[0]
    print(
        f"{config.name}, batch {config.sample.batch_size}, {device.device_kind} ({platform.machine()}), "
        f"jax {jax.__version__}\n"
    )
    params = jax.jit(config_lib.network(config.model).init)(jax.random.key(0))
    noise_schedule = config_lib.noise_schedule(config.schedule)
    rows = {int(steps): measure(config, int(steps), params, noise_schedule) for steps in options.steps.split(",")}
    print(
        "| S | compile, s (median of 5, min..max) | temporary memory, MB | arguments, MB | output, MB |\n"
        "|---|---|---|---|---|"
    )
    for steps, (times, memory) in rows.items():
        print(
            f"| {steps} | {statistics.median(times):.2f} ({min(times):.2f}..{max(times):.2f}) | "
            f"{memory.temp_size_in_bytes / 1e6:.3f} | "
            f"{memory.argument_size_in_bytes / 1e6:.3f} | {memory.output_size_in_bytes / 1e6:.3f} |"
        )


def measure(config, steps, params, noise_schedule):
    """The compile times of REPEATS compilations, and XLA's memory analysis of the compiled program."""
    process = config_lib.process(dataclasses.replace(config.sample, steps=steps), noise_schedule)
    pipeline = config_lib.pipeline(config, params, sharding.data_mesh(), process)
    index = np.arange(config.sample.batch_size)
    keys, x = sampling.start(pipeline, jax.numpy.asarray(index))
    denoiser = sampling.conditioned(pipeline, sampling.labels_of(pipeline, index))
    transitions = jax.tree.map(jax.numpy.asarray, process.transitions)
    times = []
    for _ in range(REPEATS):
        lowered = samplers.scan_steps.lower(
            process.sampler, denoiser, transitions, x, keys if process.sampler.stochastic else None, keep=False
        )
        begin = time.perf_counter()
        compiled = lowered.compile()
        times.append(time.perf_counter() - begin)
        jax.clear_caches()
    return times, compiled.memory_analysis()


if __name__ == "__main__":
    cli.start(main, OPTIONS)
