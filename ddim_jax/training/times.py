"""From which distribution training draws its times t in [1, T], and by what an example is weighted for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddim_jax import checks
from ddim_jax.schedule import Array


class TimeDistribution(NamedTuple):
    """Pure functions. A distribution that learns from the losses keeps what it has seen in a state, a pytree of arrays,
    which checkpoints hold.
    """

    init: Callable[[int], Any]  # (T) -> state
    draw: Callable[[Any, Array, tuple[int], int], tuple[Array, Array | None]]  # (state, key, (B,), T) -> t (B,), and
    # the weights (B,) that make the mean of the losses that under uniform t; None for all 1
    observe: Callable[[Any, Array, Array], Any]  # (state, t (B,), losses (B,)) -> state


def stateless(draw: Callable[[Array, tuple[int], int], Array]) -> TimeDistribution:
    """That of a function: (key, (B,), T) -> t (B,), weighted by 1."""
    return TimeDistribution(lambda T: (), lambda _, key, shape, T: (draw(key, shape, T), None), lambda state, *_: state)


def uniform() -> TimeDistribution:
    """t uniform in 1..T (Ho et al. 2020, Algorithm 1)."""
    return stateless(lambda key, shape, T: jax.random.randint(key, shape, 1, T + 1))


def real() -> TimeDistribution:
    """t uniform in all reals of [1, T]."""
    return stateless(lambda key, shape, T: jax.random.uniform(key, shape, minval=1, maxval=T))


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeDistribution:
    """`t = 1 + (T - 1) sigmoid(mean + std z)`, z ~ N(0, 1), real (Esser et al. 2024, section 3.1). The weights stay 1:
    the density is part of the objective. ValueError unless std is above 0.
    """
    checks.real("mean", mean)
    checks.real("std", std, 0, open=True)
    return stateless(lambda key, shape, T: 1 + (T - 1) * jax.nn.sigmoid(mean + std * jax.random.normal(key, shape)))


class _History(NamedTuple):
    losses: Array  # (T, n): the last n losses of every t, in a ring
    counts: Array  # (T,): how many there were


def importance(history: int = 10, uniform_fraction: float = 0.001) -> TimeDistribution:
    """t in 1..T with probability proportional to sqrt(E[L_t^2]) over the last `history` losses of every t, mixed with
    the uniform distribution; uniform until every t has so many (Nichol and Dhariwal 2021, section 3.3). The weights are
    1 / (T p_t). ValueError for a history below 1 and a fraction outside (0, 1].
    """
    checks.integer("history", history, 1, 1000)
    checks.real("uniform_fraction", uniform_fraction, 0, 1)
    if uniform_fraction == 0:
        raise ValueError("uniform_fraction must be above 0: a t of probability 0 is never seen again")

    def init(T):
        return _History(jnp.zeros((T, history)), jnp.zeros(T, jnp.int32))

    def probabilities(state):
        T = len(state.counts)
        size = jnp.sqrt(jnp.mean(jnp.square(state.losses), axis=1))
        learned = (1 - uniform_fraction) * size / jnp.sum(size) + uniform_fraction / T
        known = (state.counts >= history).all() & (size.sum() > 0)
        return jnp.where(known, learned, jnp.full(T, 1 / T))

    def draw(state, key, shape, T):
        p = probabilities(state)
        index = jax.random.choice(key, T, shape, p=p)
        return index + 1, 1 / (T * p[index])

    def observe(state, t, losses):
        # Images of one t in a batch are taken in their order; of more than `history` the last ones are kept.
        index, right = t - 1, jnp.isfinite(losses)
        same = (index[:, None] == index[None, :]) & right[None, :]
        earlier, later = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
        nowhere = len(state.counts)  # out of range: dropped
        row = jnp.where(right & (later < history), index, nowhere)
        place = (state.counts[index] + earlier) % history
        counts = state.counts.at[jnp.where(right, index, nowhere)].add(1, mode="drop")
        return _History(state.losses.at[row, place].set(losses, mode="drop"), counts)

    return TimeDistribution(init, draw, observe)


TIMES = {"uniform": uniform, "real": real, "logit_normal": logit_normal, "importance": importance}


def as_distribution(made: Any) -> TimeDistribution:
    """The TimeDistribution itself, or that of a function (key, (B,), T) -> t (B,). ValueError otherwise."""
    if isinstance(made, TimeDistribution):
        return made
    if not callable(made):
        kinds = "a TimeDistribution or a function (key, shape, T) -> t"
        raise ValueError(f"time must be {kinds}, got {checks.shown(made)}")
    return stateless(made)
