"""What is trained: pure functions of a batch, which own the times that are drawn, x_0 from pixels, and the loss."""

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
    """What the loss of a batch depends on beside the parameters. Leaves (B, ...), or None."""

    x_0: Array
    t: Array  # (B,)
    noise: Array  # N(0, I), shaped like x_0
    labels: Array | None  # (B,)
    weights: Array | None  # (B,), of the losses in their mean; None for all 1


class Objective(NamedTuple):
    num_steps: int  # T
    init: Callable[[], Any]  # () -> state, a pytree of arrays; () where nothing is remembered
    draw: Callable[[Any, Array, Array | None, Array, Array], Example]  # (state, images (B, ...), labels, the key of the
    # times, the key of the noise) -> example
    loss: Callable[[Any, Example, Array], Array]  # (params, example, dropout_key) -> (B,)
    observe: Callable[[Any, Example, Array], Any]  # (state, example, losses (B,)) -> state
    # (example, losses) -> means over the batch, (), that are logged beside the loss
    metrics: Callable[[Example, Array], dict[str, Array]] = lambda example, losses: {}


def make(
    num_steps: int,
    loss: Callable[[Any, Array, Array, Array, Array | None, Array], Array],
    x_0: Callable[[Array], Array] = to_unit,
    time: TimeDistribution | Callable | None = None,
) -> Objective:
    """An objective of a loss (params, x_0, t (B,), noise, labels, dropout_key) -> (B,).

    num_steps: T. x_0: from images, (B, H, W, C) uint8, to x_0 (B, ...). time: a `TimeDistribution`, or a function
    (key, (B,), T) -> t (B,); default: uniform.
    """
    time = times.uniform() if time is None else times.as_distribution(time)

    def draw(state, images, labels, time_key, noise_key):
        clean = x_0(images)
        t, weights = time.draw(state, time_key, clean.shape[:1], num_steps)
        return Example(clean, t, jax.random.normal(noise_key, clean.shape), labels, weights)

    return Objective(
        num_steps,
        lambda: time.init(num_steps),
        draw,
        lambda params, example, key: loss(params, *example[:4], key),
        lambda state, example, each: time.observe(state, example.t, each),
    )


def noise_prediction(
    network: Network | nn.Module,
    noise_schedule: Schedule,
    prediction: str = "eps",
    weight: LossWeight | Callable[[Level], Array] | str = "one",
    time: TimeDistribution | Callable | None = None,
) -> Objective:
    """L_gamma, Eq. (5), of images in [-1, 1]. prediction: what the network predicts, see `Denoiser`. weight: gamma, see
    `losses.l_gamma`. time: see `make`.
    """
    table, gamma = schedule_lib.levels(noise_schedule), losses.as_weight(weight)

    def loss(params, x_0, t, eps, labels, dropout_key):
        denoiser = Denoiser(network, params, prediction, labels, dropout_key=dropout_key)
        return losses.l_gamma(denoiser, table, x_0, t, eps, gamma)

    return make(table.num_steps, loss, to_float, time)


def to_float(images: Array) -> Array:
    """uint8 pixels as values in [-1, 1]; floating point as it is."""
    return images if jnp.issubdtype(images.dtype, jnp.floating) else to_unit(images)


def classification(
    network: Network | nn.Module, noise_schedule: Schedule, classes: int, time: TimeDistribution | None = None
) -> Objective:
    """The classification loss of Appendix A, of images (B, H, W, 1) of so many grey levels, evenly spaced in 0..255.
    The network has a channel for each, see `log_probs_fn`.
    """
    table = schedule_lib.levels(noise_schedule)

    def loss(params, x_0, t, noise, labels, dropout_key):
        predict = log_probs_fn(network, params, labels, dropout_key)
        return discrete.cross_entropy(predict, x_0, t, level_at(table, t, x_0), noise)

    return make(table.num_steps, loss, partial(to_one_hot, classes), time)


OBJECTIVES = {  # (network, noise_schedule, prediction, weight, time: those that the signature names) -> Objective
    "noise_prediction": noise_prediction,
}
