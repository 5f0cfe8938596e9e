"""Checks whether a network and a batch can fit into memory, before memory is allocated.

The estimate is a lower bound: the arrays that must be in memory at the same time with any compiler. A rejected batch
could not have run; an accepted batch may still be too large.
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

SWITCH = "DDIM_JAX_NO_MEMORY_CHECK"  # environment variable; 1 disables the check


def check_sampling(network: Network, mesh: Mesh, batch_size: int) -> None:
    """ConfigError that names config.model or config.sample.batch_size if the parameters or one batch cannot fit."""
    if is_off() or (limit := available(mesh)) is None:
        return
    shapes = jax.tree.leaves(param_shapes(network))
    params = mesh.size * sum(4 * int(np.prod(leaf.shape, dtype=object)) for leaf in shapes)
    largest = -(-batch_size // mesh.size) * mesh.size * image_bytes(network)
    for name, needed, content in (
        ("config.model", params, "the parameters"),
        (f"config.sample.batch_size is {batch_size}", params + largest, "the parameters and one batch"),
    ):
        if needed > limit:
            raise ConfigError(
                f"{name}: {content} need at least {files.human_size(needed)} of memory, the devices have "
                f"{files.human_size(limit)}; {SWITCH}=1 disables this check"
            )


def check_training(
    network: Network, optimizer: optax.GradientTransformation, mesh: Mesh, batch_size: int, accumulate: int
) -> None:
    """ConfigError that names config.model and config.train.batch_size if training cannot fit on a device."""
    limit = sharding.device_memory()
    if limit is None or is_off():
        return
    shapes = jax.eval_shape(partial(train_state.init, network, optimizer), jax.random.key(0))
    placement = sharding.fully_sharded(mesh, (shapes, shapes.params))  # the second entry is the gradient
    fixed = sharding.bytes_on_a_device(placement, (shapes, shapes.params))
    images = -(-batch_size // (accumulate * mesh.size))
    # Per pixel: x_0, eps and x_t. Per position: the activations that the skip connections of a U-Net keep.
    stored_layers = network.attribute("num_res_blocks", 0) + 1
    batch = images * (3 * 4 * int(np.prod(network.shape, dtype=object)) + stored_layers * first_layer_bytes(network))
    if fixed + batch > limit:
        raise ConfigError(
            f"config.model and config.train.batch_size: training takes at least {files.human_size(fixed)} of memory "
            f"for parameters, optimizer and gradient and {files.human_size(batch)} for {images} images, a device has "
            f"{files.human_size(limit)}; {SWITCH}=1 disables this check"
        )


def is_off() -> bool:
    """Whether the environment variable disables the check."""
    return os.environ.get(SWITCH) == "1"


def image_bytes(network: Network) -> int:
    """The minimal memory of one image in sampling, in bytes: x_t, eps, and the output of the network's first layer."""
    return 2 * 4 * int(np.prod(network.shape, dtype=object)) + first_layer_bytes(network)


def first_layer_bytes(network: Network) -> int:
    """The minimal size in bytes of the first layer's output for one image; 0 if it is unknown."""
    width, patch = network.attribute("width_in", 0), network.attribute("patch_size", 1)
    positions = int(np.prod([side // patch for side in network.shape[:-1]], dtype=object))
    return positions * width * np.dtype(network.attribute("dtype", np.float32)).itemsize


def available(mesh: Mesh) -> int | None:
    """The memory in bytes of all devices of a mesh; None if it is unknown."""
    per_device = sharding.device_memory()
    return per_device and per_device * mesh.size
