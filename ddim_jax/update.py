"""One training update, a pure function. Step k depends on (seed, k) and the batch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import optax

from ddim_jax import losses
from ddim_jax.data.scaling import to_unit
from ddim_jax.models import adapter
from ddim_jax.schedule import Array, Level
from ddim_jax.train_state import TrainState


class Metrics(NamedTuple):
    loss: Array  # () mean squared error of eps, per dimension
    grad_norm: Array  # () global norm before clipping


Update = Callable[[TrainState, Array, Array | None, Array], tuple[TrainState, Metrics]]


def adam(learning_rate: float, warmup: int, clip_norm: float) -> optax.GradientTransformation:
    """Adam with the learning rate rising linearly, update k <= warmup using `k / warmup` of it, on gradients
    clipped to a global norm.
    """
    rate = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup - 1) if warmup else learning_rate
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(rate))


def build(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    table: Level,
    *,
    prediction: str,
    gamma: str,
    ema_decay: float,
) -> Update:
    """The function (state, images, labels, key) -> (state, metrics), to be jitted.

    images: (B, H, W, C) uint8. labels: (B,) ints, or None. key: the run's key; the step is folded in. Over a
    batch that is sharded along B it is data-parallel training: the mean in the loss becomes the all-reduce of the
    gradients.
    """
    num_steps = table.alpha_bar.shape[0] - 1

    def update(state: TrainState, images: Array, labels: Array | None, key: Array) -> tuple[TrainState, Metrics]:
        chex.assert_rank(images, 4)
        chex.assert_type(images, "uint8")  # pixels; what is scaled already would be scaled twice
        t_key, eps_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        x_0 = to_unit(images)
        t = jax.random.randint(t_key, x_0.shape[:1], 1, num_steps + 1)
        eps = jax.random.normal(eps_key, x_0.shape)

        def loss_fn(params):
            eps_fn = adapter.eps_fn(model, params, table, prediction, labels, dropout_key)
            return losses.l_gamma(eps_fn, table, x_0, t, eps, gamma).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, steps)
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        return TrainState(state.step + 1, params, ema_params, opt_state), Metrics(loss, optax.tree.norm(grads))

    return update
