"""One training update, a pure function. Step k depends on (seed, k) and the batch alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddim_jax import discrete, losses
from ddim_jax.data.scaling import to_one_hot, to_unit
from ddim_jax.models.denoiser import Denoiser, log_probs_fn
from ddim_jax.models.network import Network
from ddim_jax.schedule import Array, Levels, level_at
from ddim_jax.train_state import TrainState

BINS = 4  # of the levels, in which the loss is told apart


class Metrics(NamedTuple):
    loss: Array  # () mean of the objective; for eps its squared error, per dimension
    grad_norm: Array  # () global norm before clipping
    ema_distance: Array  # () |params - ema_params| / |params|
    skipped: Array  # () updates in a row that were left out, this one the last; 0 if it was made
    finite: Array  # () bool, whether the parameters and their moving average after the update are
    bin_losses: Array  # (BINS,) sum of the losses of the images whose t fell into each quarter of 1..T
    bin_counts: Array  # (BINS,) and how many these were


class Objective(NamedTuple):
    """What is trained: pure functions of a batch."""

    num_steps: int  # T
    x_0: Callable[[Array], Array]  # uint8 (B, H, W, C) -> x_0 (B, ...)
    loss: Callable[[Any, Array, Array, Array, Array | None, Array], Array]  # (params, x_0, t (B,), noise ~ N(0, I) like
    # x_0, labels, dropout_key) -> (B,)


Update = Callable[[TrainState, Array, Array | None, Array], tuple[TrainState, Metrics]]


def adam(learning_rate: float, warmup: int, clip_norm: float) -> optax.GradientTransformation:
    """Adam with the learning rate rising linearly, update k <= warmup using `k / warmup` of it, on gradients
    clipped to a global norm.
    """
    rate = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup - 1) if warmup else learning_rate
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adam(rate))


def noise_prediction(
    network: Network | nn.Module, table: Levels, prediction: str = "eps", gamma: str = "one"
) -> Objective:
    """L_gamma, Eq. (5), of images in [-1, 1]. prediction: what the network predicts, see `Denoiser`."""

    def loss(params, x_0, t, eps, labels, dropout_key):
        denoiser = Denoiser(network, params, prediction, labels, dropout_key=dropout_key)
        return losses.l_gamma(denoiser, table, x_0, t, eps, gamma)

    return Objective(table.num_steps, to_unit, loss)


def classification(network: Network | nn.Module, table: Levels, classes: int) -> Objective:
    """The classification loss of Appendix A, of images (B, H, W, 1) of so many grey levels, evenly spaced in 0..255.
    The module has a channel for each, see `log_probs_fn`.
    """

    def loss(params, x_0, t, noise, labels, dropout_key):
        predict = log_probs_fn(network, params, labels, dropout_key)
        return discrete.cross_entropy(predict, x_0, t, level_at(table, t, x_0), noise)

    return Objective(table.num_steps, partial(to_one_hot, classes), loss)


def build(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulate: int = 1,
    real_time: bool = False,
) -> Update:
    """The function (state, images, labels, key) -> (state, metrics), to be jitted.

    images: (B, H, W, C) uint8. labels: (B,) ints, or None. key: the run's key; the step is folded in. Over a
    batch that is sharded along B it is data-parallel training: the mean in the loss becomes the all-reduce of the
    gradients. accumulate: into how many parts, one after the other, the batch is divided; the memory of activations is
    that of one, the gradient that of all. real_time: whether t is drawn from all of [1, T], or from the levels
    1..T alone.

    Where the loss or the gradient is not finite, nothing but the step changes, and metrics.skipped counts. Where the
    step itself overflows, metrics.finite says so: to leave it out too, all of it would be computed twice.
    """
    num_steps = objective.num_steps

    def update(state: TrainState, images: Array, labels: Array | None, key: Array) -> tuple[TrainState, Metrics]:
        chex.assert_rank(images, 4)
        chex.assert_type(images, "uint8")  # pixels; what is scaled already would be scaled twice
        t_key, eps_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        x_0 = objective.x_0(images)
        if real_time:
            t = jax.random.uniform(t_key, x_0.shape[:1], minval=1, maxval=num_steps)
        else:
            t = jax.random.randint(t_key, x_0.shape[:1], 1, num_steps + 1)
        eps = jax.random.normal(eps_key, x_0.shape)

        def loss_fn(params, *args):
            each = objective.loss(params, *args)
            return each.mean(), each

        def part_fn(grads, part):
            (_, each), more = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *part)
            return jax.tree.map(jnp.add, grads, more), each

        if accumulate == 1:
            (_, each), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, x_0, t, eps, labels, dropout_key)
        else:
            parts = jax.tree.map(partial(_parts, accumulate), (x_0, t, eps, labels))
            keys = jax.random.split(dropout_key, accumulate)
            zero = jax.tree.map(jnp.zeros_like, state.params)
            grads, each = jax.lax.scan(part_fn, zero, (*parts, keys))
            grads, each = jax.tree.map(lambda leaf: leaf / accumulate, grads), each.T.reshape(t.shape)

        loss, norm = each.mean(), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if_finite = lambda new, old: jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # A step of 0, not the parameters before: where these are wanted again they are copied.
        params = optax.apply_updates(state.params, if_finite(steps, jax.tree.map(jnp.zeros_like, steps)))
        ema_params = optax.incremental_update(params, state.ema_params, 1 - ema_decay)
        ema_params, opt_state = if_finite((ema_params, opt_state), (state.ema_params, state.opt_state))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        size, apart = optax.tree.norm(params), optax.tree.norm(optax.tree.sub(params, ema_params))
        in_bin = jax.nn.one_hot(((t - 1) * BINS // num_steps).astype(int), BINS)
        finite = jnp.isfinite(size) & jnp.isfinite(apart)
        metrics = Metrics(loss, norm, apart / size, skipped, finite, each @ in_bin, in_bin.sum(0))
        return TrainState(state.step + 1, params, ema_params, opt_state, skipped), metrics

    return update


def _parts(count: int, leaf: Array) -> Array:
    """(B, ...) -> (count, B / count, ...). Image i goes into part i mod count, so that every device has its share of
    each part where it had its share of the batch.
    """
    return jnp.moveaxis(leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]), 1, 0)
