"""One training update, a pure function. Step k depends on (seed, k) and the batch alone."""

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

BINS = 4  # quarters of 1..T whose losses are logged


class Metrics(NamedTuple):
    loss: Array  # () mean of the objective; for eps its squared error, per dimension
    grad_norm: Array  # () global norm before clipping
    ema_distance: Array  # () |params - ema_params| / |params|
    skipped: Array  # () updates in a row that were left out, this one the last; 0 if it was made
    finite: Array  # () bool, whether the parameters and their moving average after the update are
    bin_losses: Array  # (BINS,) sum of the losses of the images whose t fell into each quarter of 1..T
    bin_counts: Array  # (BINS,) and how many these were
    more: dict[str, Array] = {}  # () means that the objective measures beside the loss


Update = Callable[[TrainState, Array, Array | None, Array], tuple[TrainState, Metrics]]


def build(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | Callable[[Array], Array],
    accumulate: int = 1,
) -> Update:
    """The function (state, images, labels, key) -> (state, metrics), to be jitted.

    images: (B, ...), as the objective takes them. labels: (B,) ints, or None. key: the run's key; the step is folded
    in. Over a batch that is sharded along B it is data-parallel training: the mean in the loss becomes the all-reduce
    of the gradients. ema_decay: a number, or a function of the step. accumulate: into how many parts, one after the
    other, the batch is divided; the memory of activations is that of one, the gradient that of all.

    Where the loss or the gradient is not finite, nothing but the step changes, and metrics.skipped counts. Where the
    step itself overflows, metrics.finite says so: to leave it out too, all of it would be computed twice.
    """
    decay_at = ema_decay if callable(ema_decay) else lambda step: ema_decay

    def update(state: TrainState, images: Array, labels: Array | None, key: Array) -> tuple[TrainState, Metrics]:
        t_key, noise_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        example = objective.draw(state.objective, images, labels, t_key, noise_key)
        chex.assert_rank(example.t, 1)
        chex.assert_equal_shape([example.x_0, example.noise])
        weighted = lambda each, weights: each if weights is None else each * weights

        def loss_fn(params, example, dropout_key):
            each = objective.loss(params, example, dropout_key)
            return weighted(each, example.weights).mean(), each

        def part_fn(grads, part):
            (_, each), more = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part)
            return jax.tree.map(jnp.add, grads, more), each

        if accumulate == 1:
            (_, each), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, example, dropout_key)
        else:
            parts = jax.tree.map(partial(_parts, accumulate), example)
            keys = jax.random.split(dropout_key, accumulate)
            zero = jax.tree.map(jnp.zeros_like, state.params)
            grads, each = jax.lax.scan(part_fn, zero, (parts, keys))
            grads, each = jax.tree.map(lambda leaf: leaf / accumulate, grads), each.T.reshape(example.t.shape)

        loss, norm = weighted(each, example.weights).mean(), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if_finite = lambda new, old: jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # A step of 0, not the parameters before: where these are wanted again they are copied.
        params = optax.apply_updates(state.params, if_finite(steps, jax.tree.map(jnp.zeros_like, steps)))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - decay_at(state.step))
        observed = objective.observe(state.objective, example, each)
        ema_params, opt_state, observed = if_finite(
            (ema_params, opt_state, observed), (state.ema_params, state.opt_state, state.objective)
        )
        skipped = jnp.where(finite, 0, state.skipped + 1)
        size, apart = optax.tree.norm(params), optax.tree.norm(optax.tree.sub(params, ema_params))
        in_bin = jax.nn.one_hot(((example.t - 1) * BINS // objective.num_steps).astype(int), BINS)
        finite = jnp.isfinite(size) & jnp.isfinite(apart)
        more = objective.metrics(example, each)
        metrics = Metrics(loss, norm, apart / size, skipped, finite, each @ in_bin, in_bin.sum(0), more)
        return TrainState(state.step + 1, params, ema_params, opt_state, skipped, observed), metrics

    return update


def _parts(count: int, leaf: Array) -> Array:
    """(B, ...) -> (count, B / count, ...). Image i goes into part i mod count, so that every device has its share of
    each part where it had its share of the batch.
    """
    return jnp.moveaxis(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0)
