"""One training update, a pure function. Its randomness depends only on (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ddim_jax.schedule import Array
from ddim_jax.training.objectives import Objective
from ddim_jax.training.train_state import TrainState

BINS = 4  # the losses of each quarter of 1..T are logged


class Metrics(NamedTuple):
    """The metrics of one update."""

    loss: Array  # () mean of the objective; for noise_prediction the squared error of eps per dimension
    grad_norm: Array  # () global norm of the gradient before clipping
    ema_distance: Array  # () |params - ema_params| / |params|
    skipped: Array  # () number of consecutive skipped updates including this one; 0 if it was not skipped
    finite: Array  # () bool, whether the parameters and the EMA parameters are finite after the update
    bin_losses: Array  # (BINS,) sum of the losses of the images whose t is in each quarter of 1..T
    bin_counts: Array  # (BINS,) number of these images
    more: dict[str, Array] = {}  # () the metrics of the objective, see `Objective.metrics`


Update = Callable[[TrainState, Array, Array | None, Array], tuple[TrainState, Metrics]]


def build(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | Callable[[Array], Array],
    accumulate: int = 1,
) -> Update:
    """The update function (state, images, labels, key) -> (state, metrics); the caller jits it.

    images: (B, ...), the input of the objective.
    labels: (B,) ints, or None.
    key: the PRNG key of the run; the step is folded in.
    ema_decay: a number, or a function of the step.
    accumulate: the number of gradient accumulation steps. The batch is divided into this number of
        microbatches, so that the activations need the memory of one.

    If the batch is sharded along B, training is data-parallel: XLA turns the mean of the loss into an all-reduce of the
    gradients.

    If the loss or the gradient is not finite, the update is skipped: only state.step and state.skipped change. If the
    update itself overflows, metrics.finite is False, but the update is not skipped: for that, the update would have to
    be computed twice.
    """
    decay_at = ema_decay if callable(ema_decay) else lambda step: ema_decay

    def update(state: TrainState, images: Array, labels: Array | None, key: Array) -> tuple[TrainState, Metrics]:
        t_key, noise_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        example = objective.draw(state.objective, images, labels, t_key, noise_key)
        chex.assert_rank(example.t, 1)
        chex.assert_equal_shape([example.x_0, example.noise])
        weighted = lambda losses, weights: losses if weights is None else losses * weights

        def loss_fn(params, example, dropout_key):
            losses = objective.loss(params, example, dropout_key)
            return weighted(losses, example.weights).mean(), losses

        def add_part(grads, part):
            (_, losses), part_grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part)
            return jax.tree.map(jnp.add, grads, part_grads), losses

        if accumulate == 1:
            (_, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, example, dropout_key)
        else:
            parts = jax.tree.map(partial(_microbatches, accumulate), example)
            keys = jax.random.split(dropout_key, accumulate)
            zero = jax.tree.map(jnp.zeros_like, state.params)
            grads, losses = jax.lax.scan(add_part, zero, (parts, keys))
            grads, losses = jax.tree.map(lambda leaf: leaf / accumulate, grads), losses.T.reshape(example.t.shape)

        loss, norm = weighted(losses, example.weights).mean(), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if_finite = lambda new, old: jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # A skipped update adds 0. Selecting the previous parameters instead would make XLA copy them.
        params = optax.apply_updates(state.params, if_finite(updates, jax.tree.map(jnp.zeros_like, updates)))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - decay_at(state.step))
        objective_state = objective.observe(state.objective, example, losses)
        ema_params, opt_state, objective_state = if_finite(
            (ema_params, opt_state, objective_state), (state.ema_params, state.opt_state, state.objective)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        size, distance = optax.tree.norm(params), optax.tree.norm(optax.tree.sub(params, ema_params))
        in_bin = jax.nn.one_hot(((example.t - 1) * BINS // objective.num_steps).astype(int), BINS)
        finite = jnp.isfinite(size) & jnp.isfinite(distance)
        more = objective.metrics(example, losses)
        metrics = Metrics(loss, norm, distance / size, skipped, finite, losses @ in_bin, in_bin.sum(0), more)
        return TrainState(state.step + 1, params, ema_params, opt_state, skipped, objective_state), metrics

    return update


def _microbatches(count: int, leaf: Array) -> Array:
    """Divides a batch into microbatches: (B, ...) -> (count, B / count, ...).

    Image i is in microbatch i mod count: each device that holds a shard of the batch holds a shard of every microbatch.
    """
    return jnp.moveaxis(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0)
