"""Time and peak memory of loading a trained network.

    python -m benchmarks.loading --config configs/cifar10.py

Random parameters of the config's network are written in each format and read by a new process. It measures the time
from the path to arrays on the device, and the increase of its peak resident memory. Linux only: the memory is read from
/proc.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types

import jax
import numpy as np

from ddim_jax import cli, convert
from ddim_jax import config as config_lib
from ddim_jax.config import weights
from ddim_jax.utils import sharding

REPEATS = 7
TARGETS = {"diffusers": "folder", "safetensors": "file.safetensors", "orbax": "run"}
OPTIONS = {"read": (None, "Read this checkpoint once and print the measurement as JSON. For the measured processes.")}


def main(options: types.SimpleNamespace) -> None:
    if options.read:
        print(json.dumps(measure(options.read)))
        return
    config = options.config
    params = jax.jit(config_lib.network(config.model).init)(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        f"{config.name}, {size / 4e6:.1f} M parameters, {size / 1e6:.0f} MB, {jax.devices()[0].device_kind} "
        f"({platform.machine()}), jax {jax.__version__}, median of {REPEATS} processes\n\n"
        "| format | seconds (min..max) | peak memory, MB | peak memory / size of the parameters |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, target in TARGETS.items():
            to = pathlib.Path(folder, target)
            convert.WRITERS[name](to, params, dataclasses.asdict(config), 1)
            runs = [read_in_a_process(options, to) for _ in range(REPEATS)]
            seconds, peaks = (sorted(run[key] for run in runs) for key in ("seconds", "peak"))
            peak = statistics.median(peaks)
            print(
                f"| {name} | {statistics.median(seconds):.2f} ({seconds[0]:.2f}..{seconds[-1]:.2f}) | "
                f"{peak / 1e6:.0f} | {peak / size:.2f} |"
            )


def read_in_a_process(options: types.SimpleNamespace, path: pathlib.Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", *sys.argv[1:], f"--read={path}"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def measure(path: str) -> dict[str, float]:
    mesh = sharding.data_mesh()
    jax.block_until_ready(sharding.put_replicated(mesh, np.zeros(1)))  # initializes the backend
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = memory("VmRSS"), time.perf_counter()
    info = weights.read_info(path)
    params = info.read(weights.params_like(info.model, mesh), True)
    jax.block_until_ready(params)
    return {"seconds": time.perf_counter() - begin, "peak": memory("VmHWM") - before}


def memory(field: str) -> int:
    """A memory field of /proc/self/status, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    cli.start(main, OPTIONS)
