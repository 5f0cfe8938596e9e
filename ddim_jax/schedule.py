"""Noise schedules: alpha_bar as a function of the timestep t.

One file because every schedule is one formula of alpha_bar, and a reader compares the formulas.

Notation, here and in all modules (Song, Meng, Ermon 2020, arXiv:2010.02502):

| code                           | the paper               | DDPM (Ho et al. 2020)       | elsewhere                  |
|--------------------------------|-------------------------|-----------------------------|----------------------------|
| `alpha_bar[t]`, t = 0..T       | alpha_t                 | alpha-bar_t                 | `alphas_cumprod[t - 1]`    |
| `beta[t]`, t = 1..T            | 1 - alpha_t / alpha_t-1 | beta_t                      |                            |
| `sigma`, the std of the noise  | sigma_t, Eq. (16)       | posterior std, at eta = 1   | not the noise scale, which |
| that a step adds               |                         |                             | is `sqrt(1 - alpha_bar)`   |
| `t -> s`, neighbors in `tau`  | tau_i -> tau_i-1        | t -> t-1                    | `prev_timestep`            |
| `x_0`, `x_t`, `eps`            | x_0, x_t, epsilon       | the same                    | `sample`, `noise`          |
| T = `num_steps`, S = dim(tau)  | T, dim(tau)             | T                           | `num_inference_steps` = S  |

A timestep t counts 1..T. t = 0 is the clean image x_0, with `alpha_bar[0] = 1`. Schedules are built on the host in
float64, because `1 - alpha_bar` at small t keeps only four digits if it is subtracted in float32.

A timestep may also be a real number. Between two integer timesteps a table is interpolated, and a `ContinuousSchedule`
evaluates its formula.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static

from ddim_jax import checks

Array = jax.Array | np.ndarray
SMALLEST = float(np.finfo(np.float32).tiny)  # the smallest normal float32: smaller values count as 0


class Level(NamedTuple):
    """A noise level: the timestep t, which is passed to the network, and the coefficients of Eq. (4).

    The leaves are () or (S,). For a batch with one timestep per image t is (B,), and the other leaves are
    (B, 1, ..., 1).
    """

    t: Array  # ints or reals in [0, T]
    alpha_bar: Array
    one_minus_alpha_bar: Array  # subtracted in float64


class NoiseSchedule(NamedTuple):
    """A noise schedule as a table. All other quantities follow from `alpha_bar`.

    alpha_bar: (T+1,) float64 on the host, `alpha_bar[0] = 1`, strictly decreasing, positive. Only alpha_bar[T] may be
        0, see `zero_terminal_snr`.

    Between two integer timesteps log(alpha_bar) is linear in t, so the noise rate is constant there. If the next
    alpha_bar is 0, alpha_bar itself is linear in t.
    """

    alpha_bar: Array

    @property
    def num_steps(self) -> int:
        """T, the number of training steps."""
        return np.shape(self.alpha_bar)[0] - 1

    def level(self, t: np.ndarray) -> Level:
        """The noise levels at the timesteps t, in float64 on the host.

        t: ints or reals in [0, T], any shape. Raises ValueError for other values.
        """
        table, t = self.levels(), checks.reals("t", t, 0, self.num_steps)
        if np.issubdtype(np.asarray(t).dtype, np.integer):
            return Level(t, table.alpha_bar[t], table.one_minus_alpha_bar[t])
        return _interpolate(table.log_alpha_bar, t, np)

    def levels(self) -> LevelTable:
        alpha_bar = np.asarray(self.alpha_bar, np.float64)
        with np.errstate(divide="ignore"):  # log(0) = -inf
            return LevelTable(alpha_bar, 1 - alpha_bar, np.log(alpha_bar))


@dataclasses.dataclass(frozen=True)
class ContinuousSchedule:
    """A noise schedule in closed form. It can be used wherever a `NoiseSchedule` can be used.

    A subclass is a frozen dataclass that defines `log_alpha_bar`. Schedules with equal fields are equal and compile
    once. A schedule is a pytree without leaves.
    """

    num_steps: int  # T: t is in [0, T], and networks are called with t in [1, T]

    def __init_subclass__(cls) -> None:
        register_static(cls)

    def log_alpha_bar(self, t: Array) -> Array:
        """log(alpha_bar) at t > 0, strictly decreasing. t: a NumPy array or a JAX array, any shape."""
        raise NotImplementedError

    @property
    def alpha_bar(self) -> np.ndarray:
        """(T+1,): alpha_bar at the integer timesteps 0..T."""
        return self.level(np.arange(self.num_steps + 1)).alpha_bar

    def level(self, t: np.ndarray) -> Level:
        """The noise levels at the timesteps t, in float64 on the host.

        t: reals in [0, T], any shape. Raises ValueError for other values.
        """
        t = np.asarray(checks.reals("t", t, 0, self.num_steps), np.float64)
        with np.errstate(all="ignore"):  # at t = 0, where the formula is not used
            return _level_from_log(t, np.where(t > 0, self.log_alpha_bar(t), 0.0), np)

    def levels(self) -> ContinuousSchedule:
        return self

    @property
    def alpha_bar_T(self) -> np.ndarray:
        return np.exp(self.log_alpha_bar(np.float64(self.num_steps)))

    def at(self, t: Array, dtype: jnp.dtype) -> Level:
        """The noise levels at the timesteps t, see `Levels.at`."""
        t = t.astype(jnp.promote_types(dtype, jnp.float32))
        log = jnp.where(t > 0, self.log_alpha_bar(jnp.where(t > 0, t, 1)), 0)
        return _cast(_level_from_log(t, log, jnp), dtype)


Schedule = NoiseSchedule | ContinuousSchedule


def _level_from_log(t, log_alpha_bar, xp):
    """xp: numpy or jax.numpy."""
    return Level(t, xp.exp(log_alpha_bar), 0 - xp.expm1(log_alpha_bar))  # `0 -` gives 0 at t = 0, not -0


def _interpolate(log_alpha_bar, t, xp):
    """Noise levels at real timesteps t, interpolated in a table (T+1,) of log(alpha_bar). xp: numpy or jax.numpy."""
    below = xp.clip(xp.floor(t), 0, len(log_alpha_bar) - 2).astype(xp.int32)
    low, high, fraction = log_alpha_bar[below], log_alpha_bar[below + 1], (t - below).astype(log_alpha_bar.dtype)
    high_is_zero = xp.isneginf(high)  # alpha_bar = 0 at the next integer timestep
    level = _level_from_log(t, low + fraction * xp.where(high_is_zero, 0, high - low), xp)
    alpha_bar = xp.where(high_is_zero, (1 - fraction) * level.alpha_bar, level.alpha_bar)
    return Level(t, alpha_bar, xp.where(high_is_zero, 1 - alpha_bar, level.one_minus_alpha_bar))


def _cast(level, dtype):
    return Level(level.t, level.alpha_bar.astype(dtype), level.one_minus_alpha_bar.astype(dtype))


class Levels(Protocol):
    """All noise levels of a schedule, as a pytree that can be passed to a compiled function."""

    @property
    def num_steps(self) -> int: ...

    @property
    def alpha_bar_T(self) -> Array: ...

    def at(self, t: Array, dtype: jnp.dtype) -> Level:
        """The noise levels at the timesteps t, ints or reals in [0, T], any shape. Traceable."""


class LevelTable(NamedTuple):
    """The `Levels` of a `NoiseSchedule`. The leaves are (T+1,)."""

    alpha_bar: Array
    one_minus_alpha_bar: Array
    log_alpha_bar: Array

    @property
    def num_steps(self) -> int:
        return np.shape(self.alpha_bar)[0] - 1

    @property
    def alpha_bar_T(self) -> Array:
        return self.alpha_bar[-1]

    def at(self, t, dtype):
        if jnp.issubdtype(t.dtype, jnp.integer):
            exact = self.alpha_bar, self.one_minus_alpha_bar
            return Level(t, *(jnp.asarray(leaf).astype(dtype)[t] for leaf in exact))
        log_alpha_bar = jnp.asarray(self.log_alpha_bar).astype(jnp.promote_types(dtype, jnp.float32))
        return _cast(_interpolate(log_alpha_bar, t, jnp), dtype)


def levels(noise_schedule: Schedule) -> Levels:
    """All noise levels of a schedule: a table in float64 on the host, or the formula.

    Raises ValueError for an invalid schedule, see `check`.
    """
    return check(noise_schedule).levels()


def check(noise_schedule: Schedule) -> Schedule:
    """Validates a schedule and returns it.

    Raises ValueError unless alpha_bar begins with 1, decreases strictly, and is at least the smallest normal float32.
    Only alpha_bar[T] may be exactly 0. A formula is evaluated at up to 1001 timesteps.
    """
    if isinstance(noise_schedule, NoiseSchedule):
        alpha_bar = np.asarray(checks.reals("noise_schedule.alpha_bar", noise_schedule.alpha_bar, 0, 1), np.float64)
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2:
            raise ValueError(
                f"noise_schedule.alpha_bar must have the shape (T+1,), T at least 1, got {alpha_bar.shape}"
            )
        noise = 1 - alpha_bar
    elif isinstance(noise_schedule, ContinuousSchedule):
        T = checks.integer("noise_schedule.num_steps", noise_schedule.num_steps, 1)
        _, alpha_bar, noise = noise_schedule.level(np.linspace(0, T, min(T, 1000) + 1))
    else:
        raise ValueError(
            f"noise_schedule must be a NoiseSchedule or a ContinuousSchedule, got {checks.shown(noise_schedule)}"
        )
    if 0 < alpha_bar[-1] < SMALLEST or alpha_bar[:-1].min() < SMALLEST:
        raise ValueError(f"noise_schedule must have alpha_bar above 0 in float32, got {alpha_bar.min():.3g}")
    if alpha_bar[0] != 1 or not ((np.diff(alpha_bar) < 0) | (np.diff(noise) > 0)).all():
        raise ValueError("noise_schedule must begin with alpha_bar = 1, and alpha_bar must decrease strictly")
    return noise_schedule


def check_levels(table: Levels) -> Levels:
    """Validates the output of `levels` and returns it. Raises ValueError for anything else."""
    if not callable(getattr(table, "at", None)):
        raise ValueError(f"table must be the output of schedule.levels, got {checks.shown(table)}")
    return table


def precision(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of computations on an x of this dtype: at least float32, because alpha_bar may underflow in float16."""
    return jnp.promote_types(dtype, jnp.float32)


def level_at(table: Levels, t: Array, x: Array) -> Level:
    """The noise level at the timestep t, shaped to broadcast against a batch.

    table: the output of `levels`.
    t: ints or reals in [0, T], () or (B,).
    x: (B, ...); only its dtype and rank are used.

    Returns t unchanged, and the other leaves as () or (B, 1, ..., 1) in the dtype of x, at least float32. Raises
    ValueError for another shape of t, and for values outside [0, T] unless t is traced.
    """
    t = jnp.asarray(checks.reals("t", t, 0, table.num_steps))
    if t.ndim and t.shape != x.shape[:1]:
        raise ValueError(f"t must have the shape () or {x.shape[:1]}, got {t.shape}")
    shape = t.shape + (1,) * (x.ndim - 1 if t.ndim else 0)
    _, alpha_bar, one_minus_alpha_bar = table.at(t, precision(x.dtype))
    return Level(t, alpha_bar.reshape(shape), one_minus_alpha_bar.reshape(shape))


def from_betas(betas) -> NoiseSchedule:
    """The schedule `alpha_bar[t] = prod_{i<=t} (1 - beta[i])`, with `alpha_bar[0] = 1`.

    betas: (T,), each in (0, 1). The last one may be 1: then alpha_bar[T] = 0, see `zero_terminal_snr`.

    Raises ValueError for other values, and if the product underflows in float32.
    """
    betas = np.asarray(checks.reals("betas", betas), np.float64)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas must be a list of at least one number, got shape {betas.shape}")
    outside = np.flatnonzero(~((betas > 0) & (betas < 1) | (betas == 1) & (np.arange(betas.size) == betas.size - 1)))
    if outside.size:
        raise ValueError(f"betas must be in (0, 1), got beta[{outside[0] + 1}] = {betas[outside[0]]}")
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    if alpha_bar[-2 if betas[-1] == 1 else -1] < SMALLEST:
        raise ValueError(
            f"alpha_bar[T] must be above 0 in float32, got {alpha_bar[-1]:.3g}: use fewer or smaller betas"
        )
    return check(NoiseSchedule(alpha_bar))


def zero_terminal_snr(noise_schedule: NoiseSchedule) -> NoiseSchedule:
    """Rescales a schedule so that `alpha_bar[T] = 0` (Lin et al. 2023, Algorithm 1).

    sqrt(alpha_bar) is shifted so that it ends at 0, and scaled so that alpha_bar[1] keeps its value. The network must
    predict x_0 or v, because at alpha_bar = 0 x_0 cannot be computed from eps. Raises ValueError for a
    `ContinuousSchedule` and for T = 1.
    """
    if not isinstance(check(noise_schedule), NoiseSchedule) or noise_schedule.num_steps < 2:
        raise ValueError("noise_schedule must be a NoiseSchedule of at least 2 timesteps, not a ContinuousSchedule")
    root = np.sqrt(np.asarray(noise_schedule.alpha_bar, np.float64)[1:])
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return check(NoiseSchedule(np.concatenate([[1.0], root**2])))


def _check_range(num_steps: int, beta_start: float, beta_end: float) -> None:
    checks.integer("num_steps", num_steps, 1, checks.MAX_STEPS)
    checks.real("beta_start", beta_start)
    checks.real("beta_end", beta_end)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}"
        )


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """beta is linear in t (Ho et al. 2020, section 4). All experiments of the paper use this schedule. num_steps: T."""
    _check_range(num_steps, beta_start, beta_end)
    return from_betas(np.linspace(beta_start, beta_end, num_steps))


def scaled_linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """sqrt(beta) is linear in t (Rombach et al. 2022). Latent diffusion models use this schedule. num_steps: T."""
    _check_range(num_steps, beta_start, beta_end)
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def sigmoid(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """beta is a sigmoid over [-6, 6], scaled to [beta_start, beta_end] (an option of the official DDIM code)."""
    _check_range(num_steps, beta_start, beta_end)
    curve = 1 / (1 + np.exp(-np.linspace(-6, 6, num_steps)))
    return from_betas(beta_start + (beta_end - beta_start) * curve)


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar is a squared cosine in t, with each beta at most max_beta (Nichol and Dhariwal 2021, Eq. 17)."""
    checks.integer("num_steps", num_steps, 1, checks.MAX_STEPS)
    checks.real("offset", offset, 0)
    checks.real("max_beta", max_beta, 0, 1, open=True)
    u = np.arange(num_steps + 1) / num_steps
    curve = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - curve[1:] / curve[:-1], max_beta))


@dataclasses.dataclass(frozen=True)
class VP(ContinuousSchedule):
    beta_start: float
    beta_end: float

    def log_alpha_bar(self, t):
        return -(self.beta_start * t + (self.beta_end - self.beta_start) * t**2 / (2 * self.num_steps))


def vp(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> VP:
    """The variance-preserving process in closed form, with a noise rate linear in t (Song et al. 2021, Eq. 32 and 33).

    `log(alpha_bar) = -(beta_start t + (beta_end - beta_start) t^2 / (2 T))`. It is the limit of `linear` for small
    steps. In the time t / T its rates are T beta_start and T beta_end: 0.1 and 20 by default.
    """
    _check_range(num_steps, beta_start, beta_end)
    return check(VP(num_steps, beta_start, beta_end))


@dataclasses.dataclass(frozen=True)
class LogSNR(ContinuousSchedule):
    log_snr_max: float
    log_snr_min: float

    def log_alpha_bar(self, t):
        xp = t.__array_namespace__()
        log_snr = self.log_snr_max + (self.log_snr_min - self.log_snr_max) * t / self.num_steps
        return -xp.logaddexp(xp.zeros_like(t), -log_snr)


def log_snr(num_steps: int = 1000, log_snr_max: float = 13.3, log_snr_min: float = -10.0) -> LogSNR:
    """log(alpha_bar / (1 - alpha_bar)) is linear in t, in closed form (Kingma et al. 2021, appendix F).

    It falls from log_snr_max at t -> 0 to log_snr_min at t = T. Kingma et al. learn such a range. At t = 0 itself
    alpha_bar = 1. Raises ValueError unless `-80 <= log_snr_min < log_snr_max <= 80`.
    """
    checks.integer("num_steps", num_steps, 1, checks.MAX_STEPS)
    checks.real("log_snr_max", log_snr_max)
    checks.real("log_snr_min", log_snr_min)
    if not -80 <= log_snr_min < log_snr_max <= 80:
        raise ValueError(f"expected -80 <= log_snr_min < log_snr_max <= 80, got {log_snr_min} and {log_snr_max}")
    return LogSNR(num_steps, log_snr_max, log_snr_min)
