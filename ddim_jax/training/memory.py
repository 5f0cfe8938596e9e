"""Whether a network and a batch can fit into memory, before any of it is taken.

The estimate is a lower bound: what has to be held at one moment whatever the compiler does. What is refused could not
have run, so a batch that passes may still be too large.
"""

from __future__ import annotations

import os
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ddim_jax.models.network import Network, param_shapes
from ddim_jax.training import train_state
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError

SWITCH = "DDIM_JAX_NO_MEMORY_CHECK"  # an environment variable: 1 goes ahead whatever the estimate is


def check_sampling(network: Network, mesh: Mesh, batch_size: int) -> None:
    """ConfigError, naming config.model or config.sample.batch_size, if the parameters or one batch cannot fit."""
    if is_off() or (limit := available(mesh)) is None:
        return
    shapes = jax.tree.leaves(param_shapes(network))
    params = mesh.size * sum(4 * int(np.prod(leaf.shape, dtype=object)) for leaf in shapes)
    largest = -(-batch_size // mesh.size) * mesh.size * image_bytes(network)
    for name, needed, what in (
        ("config.model", params, "the parameters"),
        (f"config.sample.batch_size is {batch_size}", params + largest, "the parameters and one batch"),
    ):
        if needed > limit:
            raise ConfigError(
                f"{name}: {what} need at least {files.human_size(needed)}, there are {files.human_size(limit)} of "
                f"memory; {SWITCH}=1 tries it"
            )


def check_training(
    network: Network, optimizer: optax.GradientTransformation, mesh: Mesh, batch_size: int, accumulate: int
) -> None:
    """ConfigError, naming config.model and config.train.batch_size, if training cannot fit into a device."""
    limit = sharding.device_memory()
    if limit is None or is_off():
        return
    shapes = jax.eval_shape(partial(train_state.init, network, optimizer), jax.random.key(0))
    placed = sharding.fully_sharded(mesh, (shapes, shapes.params))  # the second is the gradient
    fixed = sharding.bytes_on_a_device(placed, (shapes, shapes.params))
    images = -(-batch_size // (accumulate * mesh.size))
    # Of a pixel: x_0, eps and x_t; of a position: what the way up of a U-Net is joined with.
    stored_layers = network.fact("num_res_blocks", 0) + 1
    batch = images * (3 * 4 * int(np.prod(network.shape, dtype=object)) + stored_layers * first_layer_bytes(network))
    if fixed + batch > limit:
        raise ConfigError(
            f"config.model and config.train.batch_size: training takes at least {files.human_size(fixed)} of memory "
            f"for parameters, optimizer and gradient and {files.human_size(batch)} for {images} images, a device has "
            f"{files.human_size(limit)}; {SWITCH}=1 tries it"
        )


def is_off() -> bool:
    """Whether the environment asks to go ahead whatever the estimate is."""
    return os.environ.get(SWITCH) == "1"


def image_bytes(network: Network) -> int:
    """What one image needs at least: x_t, eps, and what the network's first convolution makes of x_t."""
    return 2 * 4 * int(np.prod(network.shape, dtype=object)) + first_layer_bytes(network)


def first_layer_bytes(network: Network) -> int:
    """What a network's first layer makes of an image, at least; 0 where it is not known."""
    width, patch = network.fact("width_in", 0), network.fact("patch_size", 1)
    positions = int(np.prod([side // patch for side in network.shape[:-1]], dtype=object))
    return positions * width * np.dtype(network.fact("dtype", np.float32)).itemsize


def available(mesh: Mesh) -> int | None:
    """Bytes of memory of all devices of a mesh, None where they do not say."""
    each = sharding.device_memory()
    return each and each * mesh.size
