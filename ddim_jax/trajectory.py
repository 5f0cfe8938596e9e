"""Which levels a sampler visits. Every off-by-one of the method lives here.

tau is a host array of S + 1 ascending numbers with tau[0] = 0: S steps between neighbours. The paper writes
tau_1..tau_S (section 4.2) and lets the last step end at the image; here that image has its own entry, the 0 in front.
The paper's levels are ints. Time is real too: levels between them are legal, and then S has no limit.

One file because each spacing is one line of the same arithmetic, and a reader compares them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddim_jax import checks
from ddim_jax import schedule as schedule_lib
from ddim_jax.schedule import SMALLEST, Array, Level, Schedule


class Transition(NamedTuple):
    """One step from level t to level s, with what float32 would lose taken from the host's float64.

    As `Transitions` every leaf is (S,), in the order of the steps; inside a step every leaf is a scalar.
    `t` is the timestep passed to the network; all coefficients come from the other leaves.
    """

    t: Array  # ints or reals in [0, T]
    s: Array
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
        return Level(self.t, self.alpha_bar_t, self.one_minus_alpha_bar_t)

    @property
    def level_s(self) -> Level:
        return Level(self.s, self.alpha_bar_s, self.one_minus_alpha_bar_s)


Transitions = Transition


def transitions(noise_schedule: Schedule, t: Sequence[float], s: Sequence[float]) -> Transitions:
    """The steps t[i] -> s[i], (S,) ints or reals each, in [0, T], t[i] != s[i]; ValueError otherwise, and for a level
    above 0 that is 0 in float32. Leaves (S,), on the host, read-only.

    A step need not begin where the one before it ended, as with a stride, see `descend`.
    """
    T = schedule_lib.check(noise_schedule).num_steps
    t, s = (np.array(checks.reals(name, levels)) for name, levels in (("t", t), ("s", s)))
    for name, levels in (("t", t), ("s", s)):
        if levels.ndim != 1 or not levels.size:
            raise ValueError(f"{name} must be a list of at least one number, got shape {levels.shape}")
        if not 0 <= levels.min() <= levels.max() <= T:
            raise ValueError(f"{name} must stay within 0..{T}, got {levels.min()}..{levels.max()}")
    if t.shape != s.shape or (t == s).any():
        where = f"{t.size} and {s.size} levels" if t.shape != s.shape else f"{t[t == s][0]} -> {t[t == s][0]}"
        raise ValueError(f"t and s must be of one length and differ in every step, got {where}")
    (_, ab_t, rest_t), (_, ab_s, rest_s) = noise_schedule.level(t), noise_schedule.level(s)
    for name, levels, rest in (("t", t, rest_t), ("s", s, rest_s)):
        if (small := levels[(levels > 0) & (rest < SMALLEST)]).size:
            raise ValueError(f"{name} must be 0, or have a noise that is not 0 in float32, got {small[0]}")
    beta = np.where(t > s, 1 - ab_t / np.where(t > s, ab_s, 1), 0.0)
    posterior_variance = np.divide(rest_s * beta, rest_t, out=np.zeros_like(beta), where=t > s)
    lambda_t, lambda_s = _lambda(ab_t, rest_t), _lambda(ab_s, rest_s)
    step = lambda_s - lambda_t
    made = Transition(t, s, ab_t, ab_s, rest_t, rest_s, beta, posterior_variance, lambda_t, step)
    for leaf in made:
        leaf.flags.writeable = False
    return made


def check_transitions(transitions: Transitions) -> Transitions:
    """The transitions, every leaf an array. ValueError unless they are `Transitions` whose leaves are (S,), S at least
    1, with values that a schedule can have; of traced leaves only the shape and the dtype are known.
    """
    global _known
    if not isinstance(transitions, Transition):
        raise ValueError(f"transitions must be what trajectory.descend returns, got {checks.shown(transitions)}")
    if all(map(operator.is_, transitions, _known)):
        return transitions
    leaves = []
    for name, leaf in transitions._asdict().items():
        infinite = name.startswith("lambda")
        bounds = () if infinite else (0, np.inf) if name in "ts" else (0, 1)
        leaf = checks.reals(f"transitions.{name}", leaf, *bounds, infinite=infinite)
        if leaf.ndim != 1 or not leaf.size or leaf.shape != np.shape(transitions.t):
            raise ValueError(f"transitions.{name} must have the shape (S,) of all leaves, got {leaf.shape}")
        leaves.append(leaf)
    checked = Transition(*leaves)
    if checks.traced(*leaves):
        return checked
    for level in "ts":
        alpha_bar, rest = (np.asarray(getattr(checked, f"{of}alpha_bar_{level}")) for of in ("", "one_minus_"))
        if ((alpha_bar < SMALLEST) & (alpha_bar != 0)).any():
            small = alpha_bar[alpha_bar != 0].min()
            raise ValueError(f"transitions.alpha_bar_{level} must be 0, or not be 0 in float32, got {small}")
        if np.abs(alpha_bar + rest - 1).max() > 1e-3:
            raise ValueError(f"transitions.one_minus_alpha_bar_{level} must be 1 - alpha_bar_{level}")
    if not any(isinstance(leaf, np.ndarray) and leaf.flags.writeable for leaf in leaves):
        _known = checked
    return checked


def check_signal(transitions: Transitions, name: str) -> None:
    """ValueError, naming what needs it, where a step begins or ends at alpha_bar = 0: there sigma_bar is infinite."""
    if checks.traced(*transitions):
        return
    if not (np.asarray(transitions.alpha_bar_t).all() and np.asarray(transitions.alpha_bar_s).all()):
        raise ValueError(f"transitions must have alpha_bar above 0 for {name}; from 0 ddim, ddpm and ddpm_hat can step")


def check_to_image(transitions: Transitions) -> None:
    """ValueError unless the steps descend to level 0, one from where the last one ended: a bound is a sum over all."""
    if checks.traced(*transitions):
        return
    t, s = np.asarray(transitions.t), np.asarray(transitions.s)
    if s[-1] != 0 or (s > t).any() or (s[:-1] != t[1:]).any():
        raise ValueError("transitions must descend from level to level down to 0")


_known: tuple = (None,)  # the last that were found right, and that cannot change: those of a run batch by batch


def _lambda(alpha_bar: np.ndarray, one_minus_alpha_bar: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar / one_minus_alpha_bar) / 2


def descend(noise_schedule: Schedule, tau: Sequence[float], end: int = 0, stride: int = 0) -> Transitions:
    """The steps of the generative process: tau[S] -> tau[S-1] -> ... -> tau[0] = end. Leaves (S,), on the host.

    end: 0, the image itself, or the level that tau begins with and the process is to stop at. stride: above 0, every
    step is from t to t - stride instead, at least end, whatever level comes next: with T // S the step of diffusers'
    DDIMScheduler.
    """
    t, s = _pairs(noise_schedule, tau, end, stride)
    return transitions(noise_schedule, t[::-1], s[::-1])


def ascend(noise_schedule: Schedule, tau: Sequence[float], end: int = 0, stride: int = 0) -> Transitions:
    """The same pairs the other way, end = tau[0] -> ... -> tau[S]: the steps that encode an image. Leaves (S,), on
    the host.
    """
    t, s = _pairs(noise_schedule, tau, end, stride)
    return transitions(noise_schedule, s, t)


def _pairs(noise_schedule, tau, end, stride):
    """The upper and the lower level of every step, upwards."""
    checks.integer("stride", stride)
    tau = check(schedule_lib.check(noise_schedule).num_steps, tau, end)
    return tau[1:], np.maximum(tau[1:] - stride, end) if stride else tau[:-1]


def check(num_train_steps: int, tau: Sequence[float], end: int = 0) -> np.ndarray:
    """tau as an array, of ints where all are whole, else of float64; or ValueError: at least one step, numbers from 0
    to T, first `end`, strictly ascending in float32, in which networks and noise know them.
    """
    checks.integer("num_train_steps", num_train_steps, 1)
    checks.real("end", end, 0, num_train_steps)
    given = np.asarray(checks.reals("tau", tau))
    if given.ndim != 1 or given.size < 2:
        raise ValueError(f"tau needs at least one step, got {checks.shown(tau)}")
    whole = (given == np.round(given)).all() and (np.abs(given) < 2**31).all()
    tau = given.astype(np.int32 if whole else np.float64)
    if tau[0] != end:
        raise ValueError(f"tau must begin with {end}{', the image itself' if end == 0 else ''}, got {tau[0]}")
    if tau.max() > num_train_steps:
        raise ValueError(f"tau must stay within 1..{num_train_steps}, got {tau.max()}")
    falls = np.flatnonzero(np.diff(tau if whole else tau.astype(np.float32)) < SMALLEST)
    if falls.size:
        raise ValueError(f"tau must ascend strictly, got {tau[falls[0]]} and then {tau[falls[0] + 1]}")
    return tau


def _counter(num_train_steps: int, num_steps: int) -> np.ndarray:
    """1..S, for a checked S."""
    checks.integer("num_train_steps", num_train_steps, 1, checks.MAX_STEPS)
    return np.arange(1, checks.integer("num_steps", num_steps, 1, num_train_steps) + 1)


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


def explicit(num_train_steps: int, tau: Sequence[float]) -> np.ndarray:
    """A tau of your own: the levels in ascending order, each above 0 and at most T; a 0 in front is optional. (S+1,)
    numbers.
    """
    tau = np.asarray(checks.reals("tau", tau))
    return check(num_train_steps, tau if tau.ndim != 1 or tau[:1].tolist() == [0] else np.concatenate([[0], tau]))


def shift_and_truncate(num_train_steps: int, tau: Sequence[float], offset: int = 0, end: int = 0) -> np.ndarray:
    """tau with `offset` added to its levels (diffusers' steps_offset) and `end` in place of the image (1 where its
    set_alpha_to_one is False). (S+1,) numbers, fewer where levels are at or below `end`.

    A step from a level to itself moves nothing; those that `end` would make are left out.
    """
    checks.integer("offset", offset)
    checks.real("end", end, 0)
    levels = np.atleast_1d(checks.reals("tau", tau))[1:] + offset
    return check(num_train_steps, [end, *levels[levels > end].tolist()], end)


def time(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real levels evenly spaced in t: `tau_i = i T / S`, for any S at least 1. (S+1,) numbers."""
    T, S = schedule_lib.check(noise_schedule).num_steps, _at_least_one(num_steps)
    return check(T, np.arange(S + 1) * T / S)


def log_snr(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real levels evenly spaced in log(alpha_bar / (1 - alpha_bar)) from T to 1, then the image (Lu et al. 2022a). For
    any S at least 1; (S+1,) numbers.
    """
    return _spaced(noise_schedule, num_steps, lambda sigma: np.log(sigma), lambda u: np.exp(u))


def sigma(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real levels evenly spaced in `sigma_bar = sqrt((1 - alpha_bar) / alpha_bar)` from T to 1, then the image. For any
    S at least 1; (S+1,) numbers.
    """
    return _spaced(noise_schedule, num_steps, lambda sigma: sigma, lambda u: u)


def karras(noise_schedule: Schedule, num_steps: int) -> np.ndarray:
    """Real levels evenly spaced in `sigma_bar^(1/7)` from T to 1, then the image (Karras et al. 2022, Eq. 5). For any S
    at least 1; (S+1,) numbers.
    """
    return _spaced(noise_schedule, num_steps, lambda sigma: sigma ** (1 / 7), lambda u: u**7)


def _at_least_one(num_steps: int) -> int:
    return checks.integer("num_steps", num_steps, 1, checks.MAX_STEPS)


def _spaced(noise_schedule, num_steps, to, back):
    """0, then levels from 1 to T whose `to(sigma_bar)` are evenly spaced; a single step is from T."""
    T = schedule_lib.check(noise_schedule).num_steps
    if noise_schedule.level(T).alpha_bar == 0:
        raise ValueError("noise_schedule must not end at alpha_bar = 0 here: sigma_bar is infinite there")
    low, high = (to(_sigma_bar(noise_schedule, t)) for t in (1.0, float(T)))
    wanted = back(np.linspace(low, high, _at_least_one(num_steps))[1:-1])
    inner = [_time_of(noise_schedule, wanted), [float(T)]] if num_steps > 1 else [[float(T)]]
    return check(T, np.concatenate([[0.0], [1.0] * (num_steps > 1), *inner]))


def _sigma_bar(noise_schedule, t):
    level = noise_schedule.level(t)
    return np.sqrt(level.one_minus_alpha_bar / level.alpha_bar)


def _time_of(noise_schedule, sigma_bar):
    """t in [1, T] with these sigma_bar, which rises with t: by bisection, to the last digit of float64."""
    low, high = np.ones_like(sigma_bar), np.full_like(sigma_bar, noise_schedule.num_steps)
    for _ in range(64):
        middle = (low + high) / 2
        above = _sigma_bar(noise_schedule, middle) > sigma_bar
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return high
