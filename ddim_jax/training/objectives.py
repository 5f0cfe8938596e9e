"""Training objectives: pure functions of a batch that draw the timesteps, convert pixels to x_0 and compute losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddim_jax import discrete, losses
from ddim_jax import schedule as schedule_lib
from ddim_jax.data.scaling import to_one_hot, to_unit
from ddim_jax.losses import LossWeight
from ddim_jax.models.denoiser import Denoiser, log_probs_fn
from ddim_jax.models.network import Network
from ddim_jax.schedule import Array, Level, Schedule, level_at
from ddim_jax.training import times
from ddim_jax.training.times import TimeDistribution


class Example(NamedTuple):
    """The inputs of the loss of a batch, except the parameters. Leaves (B, ...), or None."""

    x_0: Array
    t: Array  # (B,)
    noise: Array  # N(0, I), shaped like x_0
    labels: Array | None  # (B,)
    weights: Array | None  # (B,), of the losses in their mean; None: all weights are 1


class Objective(NamedTuple):
    """A training objective, see `make`. All functions are pure and traceable."""

    num_steps: int  # T
    init: Callable[[], Any]  # () -> state, a pytree of arrays; () for an objective without state
    # (state, images (B, ...), labels, key of the timesteps, key of the noise) -> example
    draw: Callable[[Any, Array, Array | None, Array, Array], Example]
    loss: Callable[[Any, Example, Array], Array]  # (params, example, dropout_key) -> (B,)
    observe: Callable[[Any, Example, Array], Any]  # (state, example, losses (B,)) -> state
    # (example, losses) -> name -> mean over the batch, (); logged with the loss
    metrics: Callable[[Example, Array], dict[str, Array]] = lambda example, losses: {}


def make(
    num_steps: int,
    loss: Callable[[Any, Array, Array, Array, Array | None, Array], Array],
    x_0: Callable[[Array], Array] = to_unit,
    time: TimeDistribution | Callable | None = None,
) -> Objective:
    """The objective of a loss function.

    num_steps: T.
    loss: a function (params, x_0, t (B,), noise, labels, dropout_key) -> (B,).
    x_0: a function from images (B, H, W, C) uint8 to x_0 (B, ...).
    time: the distribution of t: a `TimeDistribution`, or a function (key, (B,), T) -> t (B,). None: uniform.
    """
    time = times.uniform() if time is None else times.as_distribution(time)

    def draw(state, images, labels, time_key, noise_key):
        target = x_0(images)
        t, weights = time.draw(state, time_key, target.shape[:1], num_steps)
        return Example(target, t, jax.random.normal(noise_key, target.shape), labels, weights)

    return Objective(
        num_steps,
        lambda: time.init(num_steps),
        draw,
        lambda params, example, key: loss(params, *example[:4], key),
        lambda state, example, losses: time.observe(state, example.t, losses),
    )


def noise_prediction(
    network: Network | nn.Module,
    noise_schedule: Schedule,
    prediction: str = "eps",
    weight: LossWeight | Callable[[Level], Array] | str = "one",
    time: TimeDistribution | Callable | None = None,
) -> Objective:
    """L_gamma, Eq. (5), for x_0 in [-1, 1].

    prediction: the network's prediction type, see `Denoiser`. weight: gamma, see `losses.l_gamma`. time: see `make`.
    """
    table, gamma = schedule_lib.levels(noise_schedule), losses.as_weight(weight)

    def loss(params, x_0, t, eps, labels, dropout_key):
        denoiser = Denoiser(network, params, prediction, labels, dropout_key=dropout_key)
        return losses.l_gamma(denoiser, table, x_0, t, eps, gamma)

    return make(table.num_steps, loss, to_float, time)


def to_float(images: Array) -> Array:
    """uint8 pixels scaled to [-1, 1]; floating point values are returned unchanged."""
    return images if jnp.issubdtype(images.dtype, jnp.floating) else to_unit(images)


def classification(
    network: Network | nn.Module, noise_schedule: Schedule, classes: int, time: TimeDistribution | None = None
) -> Objective:
    """The cross-entropy loss of discrete DDIM, Appendix A.

    The images are uint8 (B, H, W, 1), with `classes` grey levels, evenly spaced in 0..255. The network has one channel
    for each class, see `log_probs_fn`. time: see `make`.
    """
    table = schedule_lib.levels(noise_schedule)

    def loss(params, x_0, t, noise, labels, dropout_key):
        predict = log_probs_fn(network, params, labels, dropout_key)
        return discrete.cross_entropy(predict, x_0, t, level_at(table, t, x_0), noise)

    return make(table.num_steps, loss, partial(to_one_hot, classes), time)


OBJECTIVES = {  # (network, noise_schedule, prediction, weight, time: those in its signature) -> Objective
    "noise_prediction": noise_prediction,
}
