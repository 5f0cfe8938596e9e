"""Which levels a sampler visits. Every off-by-one of the method lives here.

tau is a host array of S + 1 ascending ints with tau[0] = 0: S steps between neighbours. The paper writes tau_1..tau_S
(section 4.2) and lets the last step end at the image; here that image has its own entry, the 0 in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddim_jax.schedule import Array, Level, NoiseSchedule


class Transition(NamedTuple):
    """One step from level t to level s, with what float32 would lose taken from the host's float64.

    As `Transitions` every leaf is (S,), in the order of the steps; inside a step every leaf is a scalar.
    `t` is the level at which the network is asked; all coefficients come from the other leaves.
    """

    t: Array  # ints in 0..T
    s: Array  # ints in 0..T
    alpha_bar_t: Array
    alpha_bar_s: Array
    one_minus_alpha_bar_t: Array
    one_minus_alpha_bar_s: Array
    beta: Array  # 1 - alpha_bar_t / alpha_bar_s: beta_t of DDPM where s = t - 1. 0 where s > t
    posterior_variance: Array  # (1 - alpha_bar_s) / (1 - alpha_bar_t) beta: Eq. (16) at eta = 1, squared. 0 where s > t
    lambda_t: Array  # log(alpha_bar_t / (1 - alpha_bar_t)) / 2, half the log-SNR; infinite at level 0
    lambda_step: Array  # lambda_s - lambda_t

    @property
    def level_t(self) -> Level:
        return Level(self.alpha_bar_t, self.one_minus_alpha_bar_t)


Transitions = Transition


def transitions(noise_schedule: NoiseSchedule, t: Sequence[int], s: Sequence[int]) -> Transitions:
    """The steps t[i] -> s[i], (S,) ints each, in 0..T, t[i] != s[i]; ValueError otherwise. Leaves (S,), on the host.

    A step need not begin where the one before it ended, so the habits of other samplers can be followed: diffusers
    steps from t to t - T // S whatever level comes next.
    """
    T = noise_schedule.num_steps
    t, s = np.asarray(t), np.asarray(s)
    for name, levels in (("t", t), ("s", s)):
        if levels.ndim != 1 or not np.issubdtype(levels.dtype, np.integer):
            raise ValueError(f"{name} must be a list of ints, got {levels.tolist()}")
        if levels.size and not 0 <= levels.min() <= levels.max() <= T:
            raise ValueError(f"{name} must stay within 0..{T}, got {levels.min()}..{levels.max()}")
    if t.shape != s.shape or (t == s).any():
        raise ValueError(f"t and s must be of one length and differ in every step, got {t.tolist()} and {s.tolist()}")
    alpha_bar = np.asarray(noise_schedule.alpha_bar, np.float64)
    ab_t, ab_s = alpha_bar[t], alpha_bar[s]
    beta = np.maximum(1 - ab_t / ab_s, 0)
    posterior_variance = np.divide((1 - ab_s) * beta, 1 - ab_t, out=np.zeros_like(beta), where=t > s)
    with np.errstate(divide="ignore"):
        lambda_t, lambda_s = (np.log(ab / (1 - ab)) / 2 for ab in (ab_t, ab_s))
    step = lambda_s - lambda_t
    return Transition(t, s, ab_t, ab_s, 1 - ab_t, 1 - ab_s, beta, posterior_variance, lambda_t, step)


def descend(noise_schedule: NoiseSchedule, tau: Sequence[int], end: int = 0) -> Transitions:
    """The steps of the generative process: tau[S] -> tau[S-1] -> ... -> tau[0] = end. Leaves (S,), on the host.

    end: 0, the image itself, or the level that tau begins with and the process is to stop at.
    """
    tau = check(noise_schedule.num_steps, tau, end)[::-1]
    return transitions(noise_schedule, tau[:-1], tau[1:])


def ascend(noise_schedule: NoiseSchedule, tau: Sequence[int], end: int = 0) -> Transitions:
    """The same pairs the other way, end = tau[0] -> ... -> tau[S]: the steps that encode an image. Leaves (S,), on
    the host.
    """
    tau = check(noise_schedule.num_steps, tau, end)
    return transitions(noise_schedule, tau[:-1], tau[1:])


def check(num_train_steps: int, tau: Sequence[int], end: int = 0) -> np.ndarray:
    """tau as an int array, or ValueError: at least one step, whole numbers from 0 to T, first `end`, strictly
    ascending.
    """
    given = np.asarray(tau)
    if given.ndim != 1 or given.size < 2:
        raise ValueError(f"tau needs at least one step, got {given.tolist()}")
    tau = given.astype(np.int32)
    if not np.array_equal(tau, given):
        raise ValueError(f"tau must hold whole numbers, got {given[tau != given][0]}")
    if tau[0] != end:
        raise ValueError(f"tau must begin with {end}{', the image itself' if end == 0 else ''}, got {tau[0]}")
    falls = np.flatnonzero(np.diff(tau) <= 0)
    if falls.size:
        raise ValueError(f"tau must ascend strictly, got {tau[falls[0]]} and then {tau[falls[0] + 1]}")
    if tau[-1] > num_train_steps:
        raise ValueError(f"tau must stay within 1..{num_train_steps}, got {tau[-1]}")
    return tau


def _counter(num_train_steps: int, num_steps: int) -> np.ndarray:
    """1..S, for a checked S."""
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(f"the number of steps must be in 1..{num_train_steps}, got {num_steps}")
    return np.arange(1, num_steps + 1)


def _from_zero(num_train_steps: int, steps: np.ndarray) -> np.ndarray:
    return check(num_train_steps, np.concatenate([[0], steps]))


def uniform(num_train_steps: int, num_steps: int) -> np.ndarray:
    """The paper's "linear" tau (section D.2): `tau_i = floor(c i)` with `c = T / S`, so that tau_S = T. (S+1,) ints."""
    i = _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, i * num_train_steps // num_steps)


def quadratic(num_train_steps: int, num_steps: int) -> np.ndarray:
    """The paper's "quadratic" tau (section D.2): `tau_i = floor(c i^2)` with `c = T / S^2`, so that tau_S = T.
    (S+1,) ints.

    Where the parabola climbs by less than one level a step (i < 1/c, which begins at S > sqrt(T)) it would repeat
    levels; there the levels are taken one by one: `tau_i = max(i, floor(c i^2))`, which ascends strictly for
    every S in 1..T.
    """
    i = _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, np.maximum(i, i**2 * num_train_steps // num_steps**2))


def leading(num_train_steps: int, num_steps: int) -> np.ndarray:
    """diffusers' "leading" spacing: levels 1, 1 + r, 1 + 2 r, ... with `r = T // S`. Starts below T. (S+1,) ints."""
    i = _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, 1 + (i - 1) * (num_train_steps // num_steps))


def trailing(num_train_steps: int, num_steps: int) -> np.ndarray:
    """diffusers' "trailing" spacing: `round(T - i T / S)`, i = 0..S-1, ends at T (Lin et al. 2023, table 2). (S+1,)
    ints. By the same floating-point sum as there, which decides where a level would lie halfway.
    """
    _counter(num_train_steps, num_steps)
    levels = np.arange(num_train_steps, 0, -num_train_steps / num_steps)[:num_steps]
    return _from_zero(num_train_steps, np.round(levels[::-1]))


def linspace(num_train_steps: int, num_steps: int) -> np.ndarray:
    """diffusers' "linspace" spacing: `1 + round((T - 1) (i - 1) / (S - 1))`, from 1 to T; the level 1 for S = 1.
    (S+1,) ints.
    """
    _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, 1 + np.round(np.linspace(0, num_train_steps - 1, num_steps)))


def official_uniform(num_train_steps: int, num_steps: int) -> np.ndarray:
    """ "uniform" of the official DDIM code: `range(0, T, T // S)` in 0-based time.

    Its length is ceil(T / (T // S)), which is S only where S divides T evenly enough: S = 300 of T = 1000 gives
    334 steps.
    """
    _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, 1 + np.arange(0, num_train_steps, num_train_steps // num_steps))


def official_quadratic(num_train_steps: int, num_steps: int) -> np.ndarray:
    """ "quad" of the official DDIM code: `int(linspace(0, sqrt(0.8 T), S)^2)` in 0-based time, without its
    duplicates.

    It stops at 0.8 T and repeats levels (1 at S = 50, 4 at S = 100, 312 at S = 1000, for T = 1000). A repeated
    level is a step from a level to itself, which moves nothing at eta = 0; it is left out, so the result may have
    fewer than S steps.
    """
    _counter(num_train_steps, num_steps)
    steps = (np.linspace(0, np.sqrt(0.8 * num_train_steps), num_steps) ** 2).astype(int)
    return _from_zero(num_train_steps, 1 + np.unique(steps))


def explicit(num_train_steps: int, steps: Sequence[int]) -> np.ndarray:
    """A tau of your own: the levels in ascending order, each in 1..T; a 0 in front is optional. (S+1,) ints."""
    steps = list(steps)
    return check(num_train_steps, steps if steps[:1] == [0] else [0, *steps])


def moved(num_train_steps: int, tau: Sequence[int], offset: int = 0, end: int = 0) -> np.ndarray:
    """tau with `offset` added to its levels (diffusers' steps_offset) and `end` in place of the image (1 where its
    set_alpha_to_one is False). (S+1,) ints, fewer where levels are at or below `end`.

    A step from a level to itself moves nothing; those that `end` would make are left out.
    """
    levels = np.asarray(tau)[1:] + offset
    return check(num_train_steps, [end, *levels[levels > end].tolist()], end)
