"""From a Flax module to the eps_fn of the mathematics. The only place that knows that published networks
count time from 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ddim_jax import checks
from ddim_jax.discrete import LogProbsFn
from ddim_jax.gaussian import PREDICTIONS, EpsFn
from ddim_jax.schedule import Array, Levels, check_levels, level_at, precision


def eps_fn(
    model: nn.Module,
    params: Any,
    table: Levels,
    prediction: str = "eps",
    labels: Array | None = None,
    dropout_key: Array | None = None,
) -> EpsFn:
    """(x_t, t) -> eps, for a module `(x, time, labels, train)` that predicts eps, x_0 or v.

    The network is told `time = t - 1`, 0..T-1; level 0, where encoding starts, is told as level 1, the lowest it
    was trained on. table: `schedule.levels(...)`. prediction: a name in `gaussian.PREDICTIONS`. labels: (B,) ints
    for a class-conditional network. dropout_key: given in training only, where dropout acts. The result is a
    pytree: other params, labels or tables of the same shapes compile nothing. ValueError for labels that are not
    integers (B,), and for an unknown prediction.
    """
    checks.lookup(PREDICTIONS, prediction, "prediction")
    return Partial(_Network(model, prediction), params, check_levels(table), labels, dropout_key)


def log_probs_fn(
    model: nn.Module, params: Any, labels: Array | None = None, dropout_key: Array | None = None
) -> LogProbsFn:
    """(x_t, t) -> log f_theta, for a module whose channels are K classes: it is given x_t one-hot, (B, ..., K), and
    predicts logits of x_0. Else as `eps_fn`.
    """
    return Partial(_Classes(model), params, labels, dropout_key)


@dataclasses.dataclass(frozen=True)
class _Network:
    """The static part: compared by value, so that building the same eps_fn twice compiles once."""

    model: nn.Module
    prediction: str

    def __call__(self, params, table, labels, dropout_key, x_t, t):
        t = jnp.maximum(t, 1)
        said = _said(self.model, params, labels, dropout_key, x_t, t)
        return PREDICTIONS[self.prediction](x_t, said, level_at(table, t, x_t))


@dataclasses.dataclass(frozen=True)
class _Classes:
    model: nn.Module

    def __call__(self, params, labels, dropout_key, x_t, t):
        return jax.nn.log_softmax(_said(self.model, params, labels, dropout_key, x_t, jnp.maximum(t, 1)))


def _said(model, params, labels, dropout_key, x_t, t):
    if labels is not None and not (jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == x_t.shape[:1]):
        raise ValueError(
            f"labels must be integers of the shape {x_t.shape[:1]}, got shape {labels.shape} and dtype {labels.dtype}"
        )
    time = jnp.broadcast_to(t - 1, x_t.shape[:1])
    train = dropout_key is not None
    rngs = {"dropout": dropout_key} if train else None
    return model.apply({"params": params}, x_t, time, labels, train=train, rngs=rngs).astype(precision(x_t.dtype))
