"""tau, the sub-sequence of timesteps that a sampler visits, and the transitions t -> s between them.

tau is a host array of S + 1 ascending numbers with tau[0] = 0: it has S steps. The paper writes tau_1..tau_S (section
4.2), and its last step goes from tau_1 to x_0. Here tau has the additional entry tau[0] = 0 for x_0. The timesteps of
the paper are integers. Real-valued timesteps are supported too; then S has no upper limit.

All index arithmetic of timesteps is in this module. One file because every spacing is one line of the same arithmetic,
and a reader compares the spacings.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddim_jax import checks
from ddim_jax import schedule as schedule_lib
from ddim_jax.schedule import SMALLEST, Array, Level, Schedule


class Transition(NamedTuple):
    """One step from the timestep t to the timestep s, with its coefficients, computed in float64 on the host.

    In `Transitions` every leaf is (S,), in the order of the steps. In `Sampler.step` every leaf is a scalar. `t` is the
    timestep passed to the network. A sampler computes its coefficients from the other leaves, so `t` can be replaced.
    """

    t: Array  # ints or reals in [0, T]
    s: Array
    alpha_bar_t: Array
    alpha_bar_s: Array
    one_minus_alpha_bar_t: Array
    one_minus_alpha_bar_s: Array
    beta: Array  # 1 - alpha_bar_t / alpha_bar_s: beta_t of DDPM where s = t - 1. 0 where s > t
    posterior_variance: Array  # (1 - alpha_bar_s) / (1 - alpha_bar_t) beta: Eq. (16) at eta = 1, squared. 0 where s > t
    lambda_t: Array  # log(alpha_bar_t / (1 - alpha_bar_t)) / 2, half the log-SNR; infinite at t = 0
    lambda_step: Array  # lambda_s - lambda_t, h of DPM-Solver

    @property
    def level_t(self) -> Level:
        return Level(self.t, self.alpha_bar_t, self.one_minus_alpha_bar_t)

    @property
    def level_s(self) -> Level:
        return Level(self.s, self.alpha_bar_s, self.one_minus_alpha_bar_s)


Transitions = Transition


def transitions(noise_schedule: Schedule, t: Sequence[float], s: Sequence[float]) -> Transitions:
    """The transitions t[i] -> s[i]. The leaves are read-only arrays (S,) on the host.

    t, s: (S,) ints or reals in [0, T], with t[i] != s[i].

    A step need not begin where the previous step ended, see stride of `descend`. Raises ValueError for other values,
    and for a timestep above 0 at which 1 - alpha_bar is 0 in float32.
    """
    T = schedule_lib.check(noise_schedule).num_steps
    t, s = (np.array(checks.reals(name, timesteps)) for name, timesteps in (("t", t), ("s", s)))
    for name, timesteps in (("t", t), ("s", s)):
        if timesteps.ndim != 1 or not timesteps.size:
            raise ValueError(f"{name} must be a list of at least one number, got shape {timesteps.shape}")
        if not 0 <= timesteps.min() <= timesteps.max() <= T:
            raise ValueError(f"{name} must stay within 0..{T}, got {timesteps.min()}..{timesteps.max()}")
    if t.shape != s.shape or (t == s).any():
        wrong = f"{t.size} and {s.size} timesteps" if t.shape != s.shape else f"{t[t == s][0]} -> {t[t == s][0]}"
        raise ValueError(f"t and s must have the same length and differ in every step, got {wrong}")
    (_, ab_t, noise_t), (_, ab_s, noise_s) = noise_schedule.level(t), noise_schedule.level(s)
    for name, timesteps, noise in (("t", t, noise_t), ("s", s, noise_s)):
        if (small := timesteps[(timesteps > 0) & (noise < SMALLEST)]).size:
            raise ValueError(f"{name} must be 0, or have 1 - alpha_bar above 0 in float32, got {small[0]}")
    beta = np.where(t > s, 1 - ab_t / np.where(t > s, ab_s, 1), 0.0)
    posterior_variance = np.divide(noise_s * beta, noise_t, out=np.zeros_like(beta), where=t > s)
    lambda_t, lambda_s = _lambda(ab_t, noise_t), _lambda(ab_s, noise_s)
    step = lambda_s - lambda_t
    result = Transition(t, s, ab_t, ab_s, noise_t, noise_s, beta, posterior_variance, lambda_t, step)
    for leaf in result:
        leaf.flags.writeable = False
    return result


def check_transitions(transitions: Transitions) -> Transitions:
    """Validates transitions and returns them with every leaf as an array.

    Raises ValueError unless they are `Transitions` with leaves (S,), S at least 1, whose values a schedule can have.
    Only the shape and the dtype of traced leaves are checked.
    """
    global _last_valid
    if not isinstance(transitions, Transition):
        raise ValueError(f"transitions must be the output of trajectory.descend, got {checks.shown(transitions)}")
    if all(map(operator.is_, transitions, _last_valid)):
        return transitions
    leaves = []
    for name, leaf in transitions._asdict().items():
        infinite = name.startswith("lambda")
        bounds = () if infinite else (0, np.inf) if name in "ts" else (0, 1)
        leaf = checks.reals(f"transitions.{name}", leaf, *bounds, infinite=infinite)
        if leaf.ndim != 1 or not leaf.size or leaf.shape != np.shape(transitions.t):
            raise ValueError(f"transitions.{name} must have the shape (S,) of the other leaves, got {leaf.shape}")
        leaves.append(leaf)
    checked = Transition(*leaves)
    if checks.traced(*leaves):
        return checked
    for level in "ts":
        alpha_bar, noise = (np.asarray(getattr(checked, f"{prefix}alpha_bar_{level}")) for prefix in ("", "one_minus_"))
        if ((alpha_bar < SMALLEST) & (alpha_bar != 0)).any():
            small = alpha_bar[alpha_bar != 0].min()
            raise ValueError(f"transitions.alpha_bar_{level} must be 0, or above 0 in float32, got {small}")
        if np.abs(alpha_bar + noise - 1).max() > 1e-3:
            raise ValueError(f"transitions.one_minus_alpha_bar_{level} must be 1 - alpha_bar_{level}")
    if not any(isinstance(leaf, np.ndarray) and leaf.flags.writeable for leaf in leaves):
        _last_valid = checked
    return checked


def check_signal(transitions: Transitions, name: str) -> None:
    """Raises ValueError if a step begins or ends at alpha_bar = 0, where sigma_bar is infinite.

    name: the sampler or the method, for the error message.
    """
    if checks.traced(*transitions):
        return
    if not (np.asarray(transitions.alpha_bar_t).all() and np.asarray(transitions.alpha_bar_s).all()):
        raise ValueError(
            f"transitions must have alpha_bar above 0 for {name}; ddim, ddpm, ddpm_hat and ddpm_learned support 0"
        )


def check_descends_to_0(transitions: Transitions) -> None:
    """Raises ValueError unless the transitions are consecutive and descend to s = 0.

    A likelihood bound is a sum over all steps, so no step may be missing.
    """
    if checks.traced(*transitions):
        return
    t, s = np.asarray(transitions.t), np.asarray(transitions.s)
    if s[-1] != 0 or (s > t).any() or (s[:-1] != t[1:]).any():
        raise ValueError("transitions must descend to 0, and each must begin where the previous one ended")


# The last valid transitions with read-only leaves: a run checks the same transitions for every batch.
_last_valid: tuple = (None,)


def _lambda(alpha_bar: np.ndarray, one_minus_alpha_bar: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar / one_minus_alpha_bar) / 2


def descend(noise_schedule: Schedule, tau: Sequence[float], end: int = 0, stride: int = 0) -> Transitions:
    """The transitions of sampling: tau[S] -> tau[S-1] -> ... -> tau[0] = end. Leaves (S,), on the host.

    tau: (S+1,), see `check`.
    end: the first entry of tau, where sampling ends. 0 is the clean image.
    stride: if above 0, every step goes from t to max(t - stride, end) instead of the next entry of tau. With T // S it
        is the step of diffusers' DDIMScheduler.
    """
    upper, lower = _upper_and_lower(noise_schedule, tau, end, stride)
    return transitions(noise_schedule, upper[::-1], lower[::-1])


def ascend(noise_schedule: Schedule, tau: Sequence[float], end: int = 0, stride: int = 0) -> Transitions:
    """The transitions of encoding: end = tau[0] -> ... -> tau[S]. Leaves (S,), on the host.

    They are the transitions of `descend` with t and s exchanged, in reverse order. end, stride: as for `descend`.
    """
    upper, lower = _upper_and_lower(noise_schedule, tau, end, stride)
    return transitions(noise_schedule, lower, upper)


def _upper_and_lower(noise_schedule, tau, end, stride):
    """The larger and the smaller timestep of every step, ascending."""
    checks.integer("stride", stride)
    tau = check(schedule_lib.check(noise_schedule).num_steps, tau, end)
    return tau[1:], np.maximum(tau[1:] - stride, end) if stride else tau[:-1]


def check(num_train_steps: int, tau: Sequence[float], end: int = 0) -> np.ndarray:
    """Validates tau and returns it as an array: int32 if all numbers are integers, else float64.

    num_train_steps: T.
    tau: (S+1,), S at least 1, numbers in [0, T]. The first is `end`. They ascend strictly in float32, the dtype in
        which the network and the noise get them.

    Raises ValueError otherwise.
    """
    checks.integer("num_train_steps", num_train_steps, 1)
    checks.real("end", end, 0, num_train_steps)
    given = np.asarray(checks.reals("tau", tau))
    if given.ndim != 1 or given.size < 2:
        raise ValueError(f"tau needs at least one step, got {checks.shown(tau)}")
    all_integers = (given == np.round(given)).all() and (np.abs(given) < 2**31).all()
    tau = given.astype(np.int32 if all_integers else np.float64)
    if tau[0] != end:
        raise ValueError(f"tau must begin with {end}{', the clean image' if end == 0 else ''}, got {tau[0]}")
    if tau.max() > num_train_steps:
        raise ValueError(f"tau must stay within 1..{num_train_steps}, got {tau.max()}")
    not_ascending = np.flatnonzero(np.diff(tau if all_integers else tau.astype(np.float32)) < SMALLEST)
    if not_ascending.size:
        raise ValueError(f"tau must ascend strictly, got {tau[not_ascending[0]]} and then {tau[not_ascending[0] + 1]}")
    return tau


def _counter(num_train_steps: int, num_steps: int) -> np.ndarray:
    """1..S, after S is checked."""
    checks.integer("num_train_steps", num_train_steps, 1, checks.MAX_STEPS)
    return np.arange(1, checks.integer("num_steps", num_steps, 1, num_train_steps) + 1)


def _from_zero(num_train_steps: int, steps: np.ndarray) -> np.ndarray:
    return check(num_train_steps, np.concatenate([[0], steps]))


def uniform(num_train_steps: int, num_steps: int) -> np.ndarray:
    """The "linear" tau of the paper (section D.2): `tau_i = floor(c i)` with `c = T / S`, so that tau_S = T.

    num_train_steps: T.
    num_steps: S, in 1..T.

    Returns (S+1,) ints.
    """
    i = _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, i * num_train_steps // num_steps)


def quadratic(num_train_steps: int, num_steps: int) -> np.ndarray:
    """The "quadratic" tau of the paper (section D.2): `tau_i = floor(c i^2)` with `c = T / S^2`, so that tau_S = T.

    If S > sqrt(T), c i^2 increases by less than 1 per step for small i, and floor(c i^2) repeats timesteps. There
    tau_i = i is used instead: `tau_i = max(i, floor(c i^2))`, which ascends strictly for every S in 1..T. Returns
    (S+1,) ints.
    """
    i = _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, np.maximum(i, i**2 * num_train_steps // num_steps**2))


def leading(num_train_steps: int, num_steps: int) -> np.ndarray:
    """diffusers' "leading" spacing: 1, 1 + r, 1 + 2 r, ... with `r = T // S`. It starts below T. (S+1,) ints."""
    i = _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, 1 + (i - 1) * (num_train_steps // num_steps))


def trailing(num_train_steps: int, num_steps: int) -> np.ndarray:
    """diffusers' "trailing" spacing: `round(T - i T / S)`, i = 0..S-1, ends at T (Lin et al. 2023, table 2).

    The floating-point operations are those of diffusers, because they determine the rounding of a half. Returns
    (S+1,) ints.
    """
    _counter(num_train_steps, num_steps)
    timesteps = np.arange(num_train_steps, 0, -num_train_steps / num_steps)[:num_steps]
    return _from_zero(num_train_steps, np.round(timesteps[::-1]))


def linspace(num_train_steps: int, num_steps: int) -> np.ndarray:
    """diffusers' "linspace" spacing: `1 + round((T - 1) (i - 1) / (S - 1))`, from 1 to T. For S = 1 it is 1.

    Returns (S+1,) ints.
    """
    _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, 1 + np.round(np.linspace(0, num_train_steps - 1, num_steps)))


def official_uniform(num_train_steps: int, num_steps: int) -> np.ndarray:
    """The "uniform" tau of the official DDIM code: `range(0, T, T // S)`, with timesteps from 0.

    It has ceil(T / (T // S)) steps, which may be more than S: S = 300 of T = 1000 gives 334 steps. Returns ints.
    """
    _counter(num_train_steps, num_steps)
    return _from_zero(num_train_steps, 1 + np.arange(0, num_train_steps, num_train_steps // num_steps))


def official_quadratic(num_train_steps: int, num_steps: int) -> np.ndarray:
    """The "quad" tau of the official DDIM code, without duplicates: `int(linspace(0, sqrt(0.8 T), S)^2)`, with
    timesteps from 0.

    It ends at 0.8 T and repeats timesteps (1 at S = 50, 4 at S = 100, 312 at S = 1000, for T = 1000). A repeated
    timestep is a step from a timestep to itself, which changes nothing at eta = 0. It is removed, so tau may have fewer
    than S steps. Returns ints.
    """
    _counter(num_train_steps, num_steps)
    steps = (np.linspace(0, np.sqrt(0.8 * num_train_steps), num_steps) ** 2).astype(int)
    return _from_zero(num_train_steps, 1 + np.unique(steps))


def respaced(num_train_steps: int, sections: Sequence[int]) -> np.ndarray:
    """The respaced timesteps of improved-diffusion and guided-diffusion (`timestep_respacing` "10,15,20").

    T is divided into len(sections) parts of equal length; the first T mod len(sections) are longer by 1. Part i has
    sections[i] timesteps, evenly spaced from its first to its last. A part with one timestep has its first.

    sections: the numbers of steps, from the part at t = 1 to the part at T. Each is at least 1 and at most the length
        of its part. Raises ValueError otherwise. Returns (S+1,) ints, S = sum(sections).
    """
    checks.integer("num_train_steps", num_train_steps, 1, checks.MAX_STEPS)
    sections = np.asarray(sections)
    if sections.ndim != 1 or not sections.size or not np.issubdtype(sections.dtype, np.integer):
        raise ValueError(f"sections must be a list of at least one int, got {checks.shown(sections.tolist())}")
    lengths = num_train_steps // len(sections) + (np.arange(len(sections)) < num_train_steps % len(sections))
    timesteps, begin = [], 1
    for i, (count, length) in enumerate(zip(sections.tolist(), lengths.tolist(), strict=True)):
        if not 1 <= count <= length:
            raise ValueError(f"sections[{i}] must be in 1..{length}, the length of that part of T, got {count}")
        # A running sum as in their code, because the floating-point operations decide how a half is rounded.
        strides = np.full(count - 1, (length - 1) / max(count - 1, 1))
        timesteps.append(begin + np.round(np.cumsum([0.0, *strides])))
        begin += length
    return _from_zero(num_train_steps, np.concatenate(timesteps))


def with_stride(num_train_steps: int, num_steps: int) -> np.ndarray:
    """ "ddimS" of improved-diffusion: `range(0, T, r)`, with timesteps from 0 and the integer r that gives S steps.

    Raises ValueError if no integer gives S steps. Returns (S+1,) ints.
    """
    _counter(num_train_steps, num_steps)
    strides = np.arange(1, num_train_steps + 1)
    strides = strides[-(-num_train_steps // strides) == num_steps]
    if not strides.size:
        raise ValueError(f"num_steps must be ceil({num_train_steps} / r) for an integer r, got {num_steps}")
    return _from_zero(num_train_steps, 1 + np.arange(0, num_train_steps, strides[0]))


def parse(num_train_steps: int, text: str) -> np.ndarray | None:
    """The tau that a text describes by numbers: "1,10,99.5,1000" is `explicit`, "respaced:10,15,20" is `respaced` and
    "ddim50" is `with_stride`. None for any other text. Raises ValueError as these functions.
    """
    if match := re.fullmatch(r"ddim(\d{1,9})", text):
        return with_stride(num_train_steps, int(match[1]))
    if match := re.fullmatch(r"respaced:([\d,\s]{1,10000})", text):
        return respaced(num_train_steps, [int(part[:10]) for part in match[1].split(",") if part.strip()])
    try:
        timesteps = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return None
    return explicit(num_train_steps, timesteps) if timesteps else None


def explicit(num_train_steps: int, tau: Sequence[float]) -> np.ndarray:
    """A tau of custom timesteps.

    num_train_steps: T.
    tau: ascending numbers in (0, T]. A 0 before them is optional.

    Returns (S+1,) numbers. Raises ValueError otherwise.
    """
    tau = np.asarray(checks.reals("tau", tau))
    return check(num_train_steps, tau if tau.ndim != 1 or tau[:1].tolist() == [0] else np.concatenate([[0], tau]))


def shift_and_truncate(num_train_steps: int, tau: Sequence[float], offset: int = 0, end: int = 0) -> np.ndarray:
    """Adds `offset` to the timesteps of tau and replaces its first entry 0 by `end`.

    offset: an int of at least 0, as steps_offset in diffusers.
    end: 1 corresponds to set_alpha_to_one = False in diffusers.

    Timesteps that are at most `end` are removed, because a step from a timestep to itself changes nothing. Returns
    (S+1,) numbers, or fewer. Raises ValueError if no step remains or a timestep exceeds T.
    """
    checks.integer("offset", offset)
    checks.real("end", end, 0)
    timesteps = np.atleast_1d(checks.reals("tau", tau))[1:] + offset
    return check(num_train_steps, [end, *timesteps[timesteps > end].tolist()], end)


def time(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real timesteps evenly spaced in t: `tau_i = i T / S`. num_steps: S, at least 1. (S+1,) numbers."""
    T, S = schedule_lib.check(noise_schedule).num_steps, _at_least_one(num_steps)
    return check(T, np.arange(S + 1) * T / S)


def log_snr(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real timesteps evenly spaced in the log-SNR from T to 1, then 0 (Lu et al. 2022a).

    The log-SNR is log(alpha_bar / (1 - alpha_bar)). num_steps: S, at least 1. Returns (S+1,) numbers.
    """
    return _spaced(noise_schedule, num_steps, lambda sigma: np.log(sigma), lambda u: np.exp(u))


def sigma(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real timesteps evenly spaced in `sigma_bar = sqrt((1 - alpha_bar) / alpha_bar)` from T to 1, then 0.

    num_steps: S, at least 1. Returns (S+1,) numbers.
    """
    return _spaced(noise_schedule, num_steps, lambda sigma: sigma, lambda u: u)


def karras(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real timesteps evenly spaced in `sigma_bar^(1/7)` from T to 1, then 0 (Karras et al. 2022, Eq. 5).

    num_steps: S, at least 1. Returns (S+1,) numbers.
    """
    return _spaced(noise_schedule, num_steps, lambda sigma: sigma ** (1 / 7), lambda u: u**7)


def _at_least_one(num_steps: int) -> int:
    return checks.integer("num_steps", num_steps, 1, checks.MAX_STEPS)


def _spaced(noise_schedule, num_steps, transform, inverse):
    """0, then timesteps from 1 to T whose transform(sigma_bar) are evenly spaced. A single step starts at T."""
    T = schedule_lib.check(noise_schedule).num_steps
    if noise_schedule.level(T).alpha_bar == 0:
        raise ValueError("noise_schedule must have alpha_bar[T] above 0 for this tau: at 0 sigma_bar is infinite")
    low, high = (transform(_sigma_bar(noise_schedule, t)) for t in (1.0, float(T)))
    sigma_bar = inverse(np.linspace(low, high, _at_least_one(num_steps))[1:-1])
    upper = [_timesteps_of(noise_schedule, sigma_bar), [float(T)]] if num_steps > 1 else [[float(T)]]
    return check(T, np.concatenate([[0.0], [1.0] * (num_steps > 1), *upper]))


def _sigma_bar(noise_schedule, t):
    level = noise_schedule.level(t)
    return np.sqrt(level.one_minus_alpha_bar / level.alpha_bar)


def _timesteps_of(noise_schedule, sigma_bar):
    """The t in [1, T] with these sigma_bar, by bisection to the precision of float64. sigma_bar increases with t."""
    low, high = np.ones_like(sigma_bar), np.full_like(sigma_bar, noise_schedule.num_steps)
    for _ in range(64):
        middle = (low + high) / 2
        above = _sigma_bar(noise_schedule, middle) > sigma_bar
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high
