"""Distributions of the timestep t in [1, T] in training, with the importance weights of the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddim_jax import checks
from ddim_jax.schedule import Array


class TimeDistribution(NamedTuple):
    """A distribution of t, as pure functions. A distribution that adapts to the losses stores them in a state, a pytree
    of arrays, which is saved in checkpoints.
    """

    init: Callable[[int], Any]  # (T) -> state
    # (state, key, (B,), T) -> (t (B,), importance weights (B,)). The weighted mean of the losses is an unbiased
    # estimate of their mean under uniform t. None: all weights are 1.
    draw: Callable[[Any, Array, tuple[int], int], tuple[Array, Array | None]]
    observe: Callable[[Any, Array, Array], Any]  # (state, t (B,), losses (B,)) -> state


def stateless(draw: Callable[[Array, tuple[int], int], Array]) -> TimeDistribution:
    """The distribution of a function (key, (B,), T) -> t (B,), with weights 1."""
    return TimeDistribution(lambda T: (), lambda _, key, shape, T: (draw(key, shape, T), None), lambda state, *_: state)


def uniform() -> TimeDistribution:
    """t uniform in {1, ..., T} (Ho et al. 2020, Algorithm 1)."""
    return stateless(lambda key, shape, T: jax.random.randint(key, shape, 1, T + 1))


def real() -> TimeDistribution:
    """t uniform in the real interval [1, T]."""
    return stateless(lambda key, shape, T: jax.random.uniform(key, shape, minval=1, maxval=T))


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeDistribution:
    """Real t = 1 + (T - 1) sigmoid(mean + std z), z ~ N(0, 1) (Esser et al. 2024, section 3.1). The weights are 1: the
    density of t is part of the objective. ValueError unless std is above 0.
    """
    checks.real("mean", mean)
    checks.real("std", std, 0, open=True)
    return stateless(lambda key, shape, T: 1 + (T - 1) * jax.nn.sigmoid(mean + std * jax.random.normal(key, shape)))


class _History(NamedTuple):
    losses: Array  # (T, n): ring buffers of the last n losses of every t
    counts: Array  # (T,): the number of losses observed so far


def importance(history: int = 10, uniform_fraction: float = 0.001) -> TimeDistribution:
    """Importance sampling of t (Nichol and Dhariwal 2021, section 3.3): p_t proportional to sqrt(E[L_t^2]), mixed with
    the uniform distribution. The weights are 1 / (T p_t).

    history: the number of latest losses of each t in the estimate; until every t has that many, t is uniform.
    uniform_fraction: the weight of the uniform distribution in the mixture. ValueError for a history outside 1..1000
    and a fraction outside (0, 1].
    """
    checks.integer("history", history, 1, 1000)
    checks.real("uniform_fraction", uniform_fraction, 0, 1)
    if uniform_fraction == 0:
        raise ValueError("uniform_fraction must be above 0: a t of probability 0 would never be drawn")

    def init(T):
        return _History(jnp.zeros((T, history)), jnp.zeros(T, jnp.int32))

    def probabilities(state):
        T = len(state.counts)
        rms = jnp.sqrt(jnp.mean(jnp.square(state.losses), axis=1))
        mixture = (1 - uniform_fraction) * rms / jnp.sum(rms) + uniform_fraction / T
        is_ready = (state.counts >= history).all() & (rms.sum() > 0)
        return jnp.where(is_ready, mixture, jnp.full(T, 1 / T))

    def draw(state, key, shape, T):
        p = probabilities(state)
        index = jax.random.choice(key, T, shape, p=p)
        return index + 1, 1 / (T * p[index])

    def observe(state, t, losses):
        # The losses of one t are appended in the order of the batch. If there are more than `history`, the last ones
        # are stored. Losses that are not finite are ignored.
        index, finite = t - 1, jnp.isfinite(losses)
        same_t = (index[:, None] == index[None, :]) & finite[None, :]
        earlier, later = jnp.tril(same_t, -1).sum(1), jnp.triu(same_t, 1).sum(1)
        out_of_range = len(state.counts)  # mode="drop" ignores this index
        row = jnp.where(finite & (later < history), index, out_of_range)
        column = (state.counts[index] + earlier) % history
        counts = state.counts.at[jnp.where(finite, index, out_of_range)].add(1, mode="drop")
        return _History(state.losses.at[row, column].set(losses, mode="drop"), counts)

    return TimeDistribution(init, draw, observe)


TIMES = {"uniform": uniform, "real": real, "logit_normal": logit_normal, "importance": importance}


def as_distribution(time: Any) -> TimeDistribution:
    """Converts a function (key, (B,), T) -> t (B,) to a TimeDistribution; a TimeDistribution is returned unchanged.
    ValueError for any other value.
    """
    if isinstance(time, TimeDistribution):
        return time
    if not callable(time):
        allowed = "a TimeDistribution or a function (key, shape, T) -> t"
        raise ValueError(f"time must be {allowed}, got {checks.shown(time)}")
    return stateless(time)
