"""What training carries from step to step: arrays only, so that it is saved, restored and sharded as one tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddim_jax.schedule import Array


class TrainState(NamedTuple):
    step: Array  # () int32, the number of batches seen
    params: Any
    ema_params: Any  # exponential moving average of params: what is sampled
    opt_state: optax.OptState
    skipped: Array  # () int32, how many updates in a row, up to the last one, were left out as not finite


def init_params(model: nn.Module, key: Array) -> Any:
    """The parameters of a network (image_size, image_channels, num_classes as in `models.unet.UNet`). Traceable."""
    images = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    labels = jnp.zeros(1, jnp.int32) if model.num_classes else None
    return model.init(key, images, jnp.zeros(1, jnp.int32), labels)["params"]


def init(model: nn.Module, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first update; the moving average starts at the parameters. Traceable."""
    params = init_params(model, key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.copy(zero))


def checksums(tree: Any) -> Any:
    """Two uint32 for each leaf, by which damage to its bits is seen. Traceable, and the same however a leaf is sharded.

    `sum_i w_i b_i mod 2^32` over the bits b_i of its values, with two sets of odd weights: whatever changes in a single
    value changes both, and damage to many stays unseen once in 2^64.
    """
    return jax.tree.map(_checksum, tree)


def _checksum(leaf: Array) -> Array:
    leaf = jnp.asarray(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)  # a number for each value, from its indices: no reshape across devices
    for axis in range(bits.ndim):
        place = place * jnp.uint32(bits.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    weights = (2 * place + 1, (place * jnp.uint32(2654435761) ^ place) | jnp.uint32(1))
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])
