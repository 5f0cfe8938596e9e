"""The conversion of a network to a denoiser.

Published networks count time from 0. This is the only module that converts the timestep t to the network time t - 1.
Networks with the preconditioning of EDM get ln(sigma) / 4 instead, see `gaussian.PREDICTIONS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, register_pytree_node_class

from ddim_jax import checks
from ddim_jax.discrete import LogProbsFn
from ddim_jax.gaussian import PREDICTIONS, Denoise, Prediction, predict_x0
from ddim_jax.models.network import Network, as_network
from ddim_jax.schedule import Array, Level, precision


@register_pytree_node_class
class Denoiser(Denoise):
    """A network with its parameters as a `gaussian.Denoise`.

    network: a `Network`, or a Linen module (x, time, labels, train) -> output of the shape of x, or with twice its
        channels. time: (B,), counts 0..T-1.
    params: the parameters of the network.
    prediction: the quantity that the network outputs, a name in `gaussian.PREDICTIONS`.
    labels: (B,) ints for a class-conditional network, else None.
    lowest: the noise level of t = 1, `schedule.level(1)`, the lowest one in training. At a lower one, as at t = 0 where
        encoding starts, eps is computed from the network's output with this noise level. The network is evaluated at
        t = 1 where t < 1. Required where alpha_bar = 1, as in encoding, for the predictions "x0" and "edm", which are
        undefined there.
    dropout_key: one key in training, where dropout is active, else None.

    If the network outputs twice the channels of x, the second half of the channels, in [-1, 1], parametrizes a learned
    variance (Nichol and Dhariwal 2021, Eq. 15), and `Prediction.variance_fraction` is (second half + 1) / 2.

    A denoiser is a pytree: other params, labels or noise levels of the same shapes do not trigger recompilation. Raises
    ValueError for an unknown prediction, and for labels that are not ints (B,).
    """

    def __init__(
        self,
        network: Network | nn.Module,
        params: Any,
        prediction: str = "eps",
        labels: Array | None = None,
        lowest: Level | None = None,
        dropout_key: Array | None = None,
    ):
        checks.lookup(PREDICTIONS, prediction, "prediction")
        self.network, self.prediction = network, prediction
        self.params, self.labels, self.lowest, self.dropout_key = params, labels, lowest, dropout_key

    def with_labels(self, labels: Array | None) -> Denoiser:
        """The same denoiser for other classes. labels: (B,) ints."""
        return Denoiser(self.network, self.params, self.prediction, labels, self.lowest, self.dropout_key)

    def predict(self, x_t: Array, level: Level) -> Prediction:
        trained = level
        if self.lowest is not None:
            # Not t < 1: `samplers.invert` can pass the next timestep with the alpha_bar of the current one. In float32,
            # because lowest and level may be rounded to different dtypes.
            below = _float32(level.one_minus_alpha_bar) < _float32(self.lowest.one_minus_alpha_bar)
            trained = Level(level.t, *(_where(below, a, b) for a, b in zip(self.lowest[1:], level[1:], strict=True)))
        parametrization = PREDICTIONS[self.prediction]
        x, time = parametrization.inputs(x_t, _network_time(level.t), trained)
        output = _output(self.network, self.params, self.labels, self.dropout_key, x, time)
        fraction, channels = None, x_t.shape[-1]
        if output.shape == (*x_t.shape[:-1], 2 * channels):
            output, fraction = output[..., :channels], (output[..., channels:] + 1) / 2
        x_0, eps = parametrization.prediction(x_t, output, trained)
        if self.lowest is None:
            return Prediction(x_0, eps, fraction)
        # The 1 avoids NaN in the derivative where alpha_bar = 0.
        safe = level._replace(alpha_bar=_where(below, level.alpha_bar, 1))
        return Prediction(_where(below, predict_x0(x_t, eps, safe), x_0), eps, fraction)

    def check(self, alpha_bar: Array) -> None:
        if checks.traced(alpha_bar):
            return
        alpha_bar, undefined = np.asarray(alpha_bar), PREDICTIONS[self.prediction].undefined
        if 0 in undefined and (alpha_bar == 0).any():
            defined = " or ".join(name for name, each in PREDICTIONS.items() if 0 not in each.undefined)
            raise ValueError(f"prediction must be {defined} where alpha_bar = 0: there {undefined[0]}")
        if 1 in undefined and self.lowest is None and (alpha_bar == 1).any():
            raise ValueError(f"lowest must be given where alpha_bar = 1: there {undefined[1]}")

    def tree_flatten(self):
        return (self.params, self.labels, self.lowest, self.dropout_key), (self.network, self.prediction)

    @classmethod
    def tree_unflatten(cls, static, children):
        self = object.__new__(cls)
        self.network, self.prediction = static
        self.params, self.labels, self.lowest, self.dropout_key = children
        return self


def _float32(value):
    return jnp.asarray(value).astype(jnp.float32)


def _where(condition, a, b):
    """jnp.where for a condition () or (B,), and arrays that may be (B, ...)."""
    shape = jnp.shape(condition) + (1,) * (max(jnp.ndim(a), jnp.ndim(b)) - jnp.ndim(condition))
    return jnp.where(jnp.reshape(condition, shape), a, b) if jnp.ndim(condition) else jnp.where(condition, a, b)


def log_probs_fn(
    network: Network | nn.Module, params: Any, labels: Array | None = None, dropout_key: Array | None = None
) -> LogProbsFn:
    """The function (x_t, t) -> log f_theta of a network for categorical data, see `discrete`.

    network: its input is x_t, one-hot, (B, ..., K), so its channels are the K classes. It outputs the logits of x_0.
    params, labels, dropout_key: see `Denoiser`.
    """
    return Partial(_Classes(network), params, labels, dropout_key)


@dataclasses.dataclass(frozen=True)
class _Classes:
    """The static part of `log_probs_fn`. It is compared by value, so an equal function is compiled once."""

    network: Network | nn.Module

    def __call__(self, params, labels, dropout_key, x_t, t):
        return jax.nn.log_softmax(_output(self.network, params, labels, dropout_key, x_t, _network_time(t)))


def _network_time(t: Array) -> Array:
    """The time of the network, which counts from 0. Below t = 1 it is that of t = 1."""
    return jnp.maximum(t, 1) - 1


def _output(network, params, labels, dropout_key, x_t, time):
    if labels is not None and not (jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == x_t.shape[:1]):
        raise ValueError(
            f"labels must be integers of the shape {x_t.shape[:1]}, got shape {labels.shape} and dtype {labels.dtype}"
        )
    time = jnp.broadcast_to(time.reshape(time.shape[:1]), x_t.shape[:1])  # from (), (B,) or (B, 1, ..., 1)
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None
    if not isinstance(network, Network):
        network = as_network(network, x_t.shape[1:])
    return network.apply(params, x_t, time, labels, train, rngs).astype(precision(x_t.dtype))
