"""The training state: a pytree of arrays, so that it is saved, restored and sharded as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddim_jax.models.network import Network, as_network
from ddim_jax.schedule import Array


class TrainState(NamedTuple):
    step: Array  # () int32, number of batches so far
    params: Any
    ema_params: Any  # exponential moving average of params; samples are drawn with it
    opt_state: optax.OptState
    skipped: Array  # () int32, number of consecutive skipped updates (loss or gradient not finite) up to this step
    objective: Any = ()  # state of the objective


def init(network: Network, optimizer: optax.GradientTransformation, key: Array, objective: Any = ()) -> TrainState:
    """The initial state; the EMA parameters are equal to the parameters. Traceable.

    objective: the initial state of the objective, from `Objective.init`.
    """
    params = as_network(network).init(key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.copy(zero), objective)
