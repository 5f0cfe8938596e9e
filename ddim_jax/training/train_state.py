"""What training carries from step to step: arrays only, so that it is saved, restored and sharded as one tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ddim_jax.models.network import Network, as_network
from ddim_jax.schedule import Array


class TrainState(NamedTuple):
    step: Array  # () int32, the number of batches seen
    params: Any
    ema_params: Any  # exponential moving average of params: what is sampled
    opt_state: optax.OptState
    skipped: Array  # () int32, how many updates in a row, up to the last one, were left out as not finite
    objective: Any = ()  # what the objective remembers of the steps before


def init(network: Network, optimizer: optax.GradientTransformation, key: Array, objective: Any = ()) -> TrainState:
    """The state before the first update; the moving average starts at the parameters. objective: what its `init`
    returns. Traceable.
    """
    params = as_network(network).init(key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.copy(zero), objective)
