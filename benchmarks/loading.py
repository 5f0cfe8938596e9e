"""Time and peak memory of loading a trained network.

    python -m benchmarks.loading --config configs/cifar10.py
    python -m benchmarks.loading --config configs/default.py --published 256x256_diffusion.pt   # pip install torch
    python -m benchmarks.loading --config configs/default.py --checkpoint edm-cifar10-32x32-uncond-vp.pkl

Random parameters of the config's network are written in each format and read by a new process. --published: random
tensors with the names and shapes of a file of guided-diffusion or improved-diffusion instead. --checkpoint: an existing
checkpoint of any format. It measures the time from the path to arrays on the device, and the increase of its peak
resident memory. Linux only: the memory is read from /proc.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import json
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types

import flax.traverse_util
import jax
import numpy as np

from ddim_jax import cli, convert
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import guided_diffusion, guided_diffusion_flags, tensors
from ddim_jax.config import parsing, weights
from ddim_jax.config.schema import ModelConfig
from ddim_jax.models.network import param_shapes
from ddim_jax.utils import sharding
from experiments import common

TARGETS = {"diffusers": "folder", "safetensors": "file.safetensors", "orbax": "run"}
OPTIONS = {
    "published": (None, "The name of a published file of guided-diffusion or improved-diffusion."),
    "checkpoint": (None, "An existing checkpoint: a path or a hub id."),
    "repeats": ("7", "The number of processes that read a file."),
    "read": (None, "Read this checkpoint once and print the measurement as JSON. For the measured processes."),
}


def main(options: types.SimpleNamespace) -> None:
    if options.read:
        print(json.dumps(measure(options.read)))
        return
    repeats = common.ints("repeats", options.repeats, 1)[0]
    if options.checkpoint:
        info = weights.read_info(options.checkpoint)
        size = sum(4 * leaf.size for leaf in jax.tree.leaves(weights.params_like(info.model, sharding.data_mesh())))
        header(info.name, size, repeats)
        show(pathlib.Path(options.checkpoint).suffix or "folder", options, options.checkpoint, size, repeats)
        return
    if options.published:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, options.published)
            size = write_published(path)
            header(options.published, size, repeats)
            show("PyTorch", options, path, size, repeats)
        return
    config = options.config
    params = jax.jit(config_lib.network(config.model).init)(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    header(config.name, size, repeats)
    with tempfile.TemporaryDirectory() as folder:
        for name, target in TARGETS.items():
            to = pathlib.Path(folder, target)
            convert.WRITERS[name](to, params, dataclasses.asdict(config), 1)
            show(name, options, to, size, repeats)


def header(name: str, size: int, repeats: int) -> None:
    print(
        f"{name}, {size / 4e6:.1f} M parameters, {size / 1e6:.0f} MB, {jax.devices()[0].device_kind} "
        f"({platform.machine()}), jax {jax.__version__}, median of {repeats} processes\n\n"
        "| format | seconds (min..max) | peak memory, MB | peak memory / size of the parameters |\n|---|---|---|---|"
    )


def show(name: str, options: types.SimpleNamespace, path: pathlib.Path | str, size: int, repeats: int) -> None:
    runs = [read_in_a_process(options, path) for _ in range(repeats)]
    seconds, peaks = (sorted(run[key] for run in runs) for key in ("seconds", "peak"))
    peak = statistics.median(peaks)
    print(
        f"| {name} | {statistics.median(seconds):.2f} ({seconds[0]:.2f}..{seconds[-1]:.2f}) | "
        f"{peak / 1e6:.0f} | {peak / size:.2f} |",
        flush=True,
    )


def write_published(path: pathlib.Path) -> int:
    """Writes a state dict of random tensors, with the names and shapes of the published file of this name. Returns
    their size in bytes.
    """
    import torch

    flags, where = guided_diffusion_flags.flags_of(path)
    model = guided_diffusion_flags.network_fields(flags, where)
    network = config_lib.network(parsing.section(ModelConfig, model | {"name": "unet", "dropout": 0.0}, "model"))
    layout, num_levels, state = guided_diffusion.layout_of(model), len(model["channel_mult"]), {}
    for name, leaf in flax.traverse_util.flatten_dict(param_shapes(network)).items():
        shape = tensors.expected_shape(name, leaf.shape, layout)
        name = layout.name(name, num_levels)
        if ".qkv." in name:
            name, shape = re.sub(r"qkv\.\w+\.", "qkv.", name), (3 * shape[0], *shape[1:], *[1] * (len(shape) > 1))
        state[name] = 0.02 * torch.randn(shape) if name not in state else state[name]
    torch.save(state, path)
    return 4 * sum(tensor.numel() for tensor in state.values())


def read_in_a_process(options: types.SimpleNamespace, path: pathlib.Path | str) -> dict[str, float]:
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
