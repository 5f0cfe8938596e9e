"""From a network to the denoiser of the mathematics. The only place that knows that published networks count time from
0.
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

    network: a `Network`, or a Linen module (x, time, labels, train) -> output of the shape of x, time (B,) counting
    0..T-1. prediction: what
    the output is, a name in `gaussian.PREDICTIONS`. labels: (B,) ints for a class-conditional network. dropout_key:
    given in training only, where dropout acts. lowest: the lowest level that the network was trained on,
    `schedule.level(1)`. Below it, as at level 0 where encoding starts, the network is evaluated as at this level, and
    eps follows from its output there. A network that predicts x_0 cannot encode without it.

    A pytree: other params, labels or levels of the same shapes compile nothing. ValueError for labels that are not
    integers (B,), and for an unknown prediction.
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
        """The same network for these classes, (B,) ints."""
        return Denoiser(self.network, self.params, self.prediction, labels, self.lowest, self.dropout_key)

    def predict(self, x_t: Array, level: Level) -> Prediction:
        output = _output(self.network, self.params, self.labels, self.dropout_key, x_t, jnp.maximum(level.t, 1))
        of = PREDICTIONS[self.prediction]
        if self.lowest is None:
            return of(x_t, output, level)
        below = level.t < self.lowest.t
        trained = Level(level.t, *(_where(below, a, b) for a, b in zip(self.lowest[1:], level[1:], strict=True)))
        x_0, eps = of(x_t, output, trained)
        safe = level._replace(alpha_bar=_where(below, level.alpha_bar, 1))  # else NaN in the derivative, where it is 0
        return Prediction(_where(below, predict_x0(x_t, eps, safe), x_0), eps)

    def check(self, alpha_bar: Array) -> None:
        if checks.traced(alpha_bar):
            return
        alpha_bar = np.asarray(alpha_bar)
        if self.prediction == "eps" and (alpha_bar == 0).any():
            raise ValueError("prediction must be x0 or v where alpha_bar = 0: nothing of x_0 follows from eps there")
        if self.prediction == "x0" and self.lowest is None and (alpha_bar == 1).any():
            raise ValueError("lowest must be given where alpha_bar = 1: nothing of eps follows from x_0 there")

    def tree_flatten(self):
        return (self.params, self.labels, self.lowest, self.dropout_key), (self.network, self.prediction)

    @classmethod
    def tree_unflatten(cls, static, children):
        self = object.__new__(cls)
        self.network, self.prediction = static
        self.params, self.labels, self.lowest, self.dropout_key = children
        return self


def _where(condition, a, b):
    """jnp.where for a condition () or (B,) and arrays that may be (B, ...)."""
    shape = jnp.shape(condition) + (1,) * (max(jnp.ndim(a), jnp.ndim(b)) - jnp.ndim(condition))
    return jnp.where(jnp.reshape(condition, shape), a, b) if jnp.ndim(condition) else jnp.where(condition, a, b)


def log_probs_fn(
    network: Network | nn.Module, params: Any, labels: Array | None = None, dropout_key: Array | None = None
) -> LogProbsFn:
    """(x_t, t) -> log f_theta, for a network whose channels are K classes: it is given x_t one-hot, (B, ..., K), and
    predicts logits of x_0. Else as `Denoiser`.
    """
    return Partial(_Classes(network), params, labels, dropout_key)


@dataclasses.dataclass(frozen=True)
class _Classes:
    """The static part: compared by value, so that building the same function twice compiles once."""

    network: Network | nn.Module

    def __call__(self, params, labels, dropout_key, x_t, t):
        return jax.nn.log_softmax(_output(self.network, params, labels, dropout_key, x_t, jnp.maximum(t, 1)))


def _output(network, params, labels, dropout_key, x_t, t):
    if labels is not None and not (jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == x_t.shape[:1]):
        raise ValueError(
            f"labels must be integers of the shape {x_t.shape[:1]}, got shape {labels.shape} and dtype {labels.dtype}"
        )
    time = jnp.broadcast_to(t - 1, x_t.shape[:1])
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None
    if not isinstance(network, Network):
        network = as_network(network, x_t.shape[1:])
    return network.apply(params, x_t, time, labels, train, rngs).astype(precision(x_t.dtype))
