"""Whether a network and a batch can fit into memory, before any of it is taken.

The estimate is a lower bound: what has to be held at one moment whatever the compiler does. What is refused could not
have run, so a batch that passes may still be too large.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.sharding import Mesh

from ddim_jax import files, sharding, train_state
from ddim_jax.config import Config, ModelConfig, network
from ddim_jax.errors import ConfigError

SWITCH = "DDIM_JAX_NO_MEMORY_CHECK"  # an environment variable: 1 goes ahead whatever the estimate is


def check_sampling(config: Config, mesh: Mesh, count: int) -> None:
    """ConfigError, naming config.model or config.sample.batch_size, if the parameters or one batch of `count` images
    cannot fit.
    """
    if is_off() or (limit := available(mesh)) is None:
        return
    model, batch = config.model, min(config.sample.batch_size, count)
    shapes = jax.tree.leaves(train_state.param_shapes(network(model)))
    params = mesh.size * sum(4 * int(np.prod(leaf.shape, dtype=object)) for leaf in shapes)
    largest = -(-batch // mesh.size) * mesh.size * image_bytes(model)
    for name, needed, what in (
        ("config.model", params, "the parameters"),
        (f"config.sample.batch_size is {batch}", params + largest, "the parameters and one batch"),
    ):
        if needed > limit:
            raise ConfigError(
                f"{name}: {what} need at least {files.human_size(needed)}, there are {files.human_size(limit)} of "
                f"memory; {SWITCH}=1 tries it"
            )


def is_off() -> bool:
    """Whether the environment asks to go ahead whatever the estimate is."""
    return os.environ.get(SWITCH) == "1"


def image_bytes(model: ModelConfig) -> int:
    """What one image needs at least: x_t, eps, and what the network's first convolution makes of x_t."""
    return model.image_size**2 * 2 * 4 * model.image_channels + first_layer_bytes(model)


def first_layer_bytes(model: ModelConfig) -> int:
    """What a network's first layer makes of an image, at least; 0 where it is not known."""
    made = network(model)
    width, patch = made.fact("width_in", 0), made.fact("patch_size", 1)
    return (model.image_size // patch) ** 2 * width * np.dtype(made.fact("dtype", np.float32)).itemsize


def available(mesh: Mesh) -> int | None:
    """Bytes of memory of all devices of a mesh, None where they do not say."""
    each = sharding.device_memory()
    return each and each * mesh.size
