"""What training carries from step to step: arrays only, so that it is saved, restored and sharded as one tree."""

from __future__ import annotations

import functools
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


@functools.lru_cache(maxsize=16)
def param_shapes(model: nn.Module) -> Any:
    """Shapes and dtypes of the parameters of a network, without making any."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def init(model: nn.Module, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first update; the moving average starts at the parameters. Traceable."""
    params = init_params(model, key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.copy(zero))
