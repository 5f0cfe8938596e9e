"""Whether a network and a batch can fit into memory, before any of it is taken.

The estimate is a lower bound: what has to be held at one moment whatever the compiler does. What is refused could not
have run, so a batch that passes may still be too large.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.sharding import Mesh

from ddim_jax import train_state
from ddim_jax.config import DTYPES, Config, ModelConfig, network
from ddim_jax.errors import ConfigError

SWITCH = "DDIM_JAX_NO_MEMORY_CHECK"  # an environment variable: 1 goes ahead whatever the estimate is
TRAINED = 5  # arrays for a parameter: itself, its average, its gradient, and two moments of Adam


def check_sampling(config: Config, mesh: Mesh, count: int) -> None:
    """ConfigError, naming config.model or config.sample.batch_size, if the parameters or one batch of `count` images
    cannot fit.
    """
    _check(config.model, mesh, "config.sample.batch_size", min(config.sample.batch_size, count), mesh.size, 1)


def check_training(config: Config, mesh: Mesh) -> None:
    """The same of training: config.model or config.train.batch_size."""
    train, parts = config.train, mesh.size // dict(mesh.shape).get("fsdp", 1)
    _check(config.model, mesh, "config.train.batch_size", train.batch_size // train.accumulate, parts, TRAINED)


def _check(model: ModelConfig, mesh: Mesh, field: str, batch: int, copies: int, arrays: int) -> None:
    """copies: of every array of the parameters, over all devices."""
    if os.environ.get(SWITCH) == "1" or (limit := available(mesh)) is None:
        return
    shapes = jax.tree.leaves(train_state.param_shapes(network(model)))
    params = arrays * copies * sum(4 * int(np.prod(leaf.shape, dtype=object)) for leaf in shapes)
    largest = -(-batch // mesh.size) * mesh.size * image_bytes(model)
    for name, needed, what in (
        ("config.model", params, "the parameters"),
        (f"{field} is {batch}", params + largest, "the parameters and one batch"),
    ):
        if needed > limit:
            raise ConfigError(
                f"{name}: {what} need at least {_gigabytes(needed)}, there are {_gigabytes(limit)} of memory "
                f"({SWITCH}=1 goes ahead all the same)"
            )


def image_bytes(model: ModelConfig) -> int:
    """What one image needs at least: x_t, eps, and what the network's first convolution makes of x_t."""
    pixels = model.image_size**2
    return pixels * (2 * 4 * model.image_channels + np.dtype(DTYPES[model.dtype]).itemsize * model.channels)


def available(mesh: Mesh) -> int | None:
    """Bytes of memory of all devices of a mesh; None where they do not say. The devices of a CPU share the host's."""
    devices = mesh.devices.ravel()
    if devices[0].platform == "cpu":
        hosts = len({device.process_index for device in devices})
        return hosts * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return None if None in limits else min(limits) * len(devices)


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
