"""Noise schedules: how much of the image is left at each level t.

One file because every schedule is one formula of the same table, and a reader compares them.

Notation, here and in the whole project (Song, Meng, Ermon 2020, arXiv:2010.02502):

| code                          | the paper               | DDPM (Ho et al. 2020)       | elsewhere                  |
|-------------------------------|-------------------------|-----------------------------|----------------------------|
| `alpha_bar[t]`, t = 0..T      | alpha_t                 | alpha-bar_t                 | `alphas_cumprod[t - 1]`    |
| `beta[t]`, t = 1..T           | 1 - alpha_t / alpha_t-1 | beta_t                      |                            |
| `sigma`, how stochastic       | sigma_t, Eq. (16)       | posterior std, at eta = 1   | not the noise scale, which |
| a step is                     |                         |                             | is `sqrt(1 - alpha_bar)`   |
| `t -> s`, neighbours in `tau` | tau_i -> tau_i-1        | t -> t-1                    | `prev_timestep`            |
| `x_0`, `x_t`, `eps`           | x_0, x_t, epsilon       | the same                    | `sample`, `noise`          |
| T = `num_steps`, S = dim(tau) | T, dim(tau)             | T                           | `num_inference_steps` = S  |

A level t counts 1..T; t = 0 is the image itself, `alpha_bar[0] = 1`. Schedules are built on the host in
float64, because `1 - alpha_bar` at small t keeps only four digits if it is subtracted in float32.

Time is real as well: between its levels a schedule goes on, a table by interpolation, a `ContinuousSchedule` by its
formula.
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
SMALLEST = float(np.finfo(np.float32).tiny)  # what is below counts as 0 in float32


class Level(NamedTuple):
    """A noise level: t, which a network is given, and what Eq. (4) needs to know. Leaves () or (S,); for a batch with a
    level for each image t is (B,), the others (B, 1, ..., 1).
    """

    t: Array  # int or real, in [0, T]
    alpha_bar: Array
    one_minus_alpha_bar: Array  # subtracted in float64


class NoiseSchedule(NamedTuple):
    """The noise levels of a diffusion; all other quantities follow from `alpha_bar`.

    alpha_bar: (T+1,) float64 on the host, `alpha_bar[0] = 1`, strictly decreasing, above 0; at T alone it may be 0, see
    `zero_terminal_snr`. Between two levels log(alpha_bar) is linear in t: noise comes at the rate with which it is
    there by the next one. Before an alpha_bar of 0, alpha_bar itself is linear.
    """

    alpha_bar: Array

    @property
    def num_steps(self) -> int:
        """T, the number of training steps."""
        return np.shape(self.alpha_bar)[0] - 1

    def level(self, t: np.ndarray) -> Level:
        """Levels t, ints or reals in [0, T], in float64 on the host. ValueError for another t."""
        table, t = self.levels(), checks.reals("t", t, 0, self.num_steps)
        if np.issubdtype(np.asarray(t).dtype, np.integer):
            return Level(t, table.alpha_bar[t], table.one_minus_alpha_bar[t])
        return _between(table.log_alpha_bar, t, np)

    def levels(self) -> LevelTable:
        alpha_bar = np.asarray(self.alpha_bar, np.float64)
        with np.errstate(divide="ignore"):  # log(0) = -inf
            return LevelTable(alpha_bar, 1 - alpha_bar, np.log(alpha_bar))


@dataclasses.dataclass(frozen=True)
class ContinuousSchedule:
    """A noise schedule in closed form, to stand wherever a NoiseSchedule stands. Make it a frozen dataclass with a
    `log_alpha_bar`: schedules of equal fields are equal, and compile once. A pytree without leaves.
    """

    num_steps: int  # T: t runs over [0, T], and networks are asked about t in [1, T]

    def __init_subclass__(cls) -> None:
        register_static(cls)

    def log_alpha_bar(self, t: Array) -> Array:
        """log(alpha_bar) at t > 0, strictly decreasing, for arrays of NumPy's and of JAX's."""
        raise NotImplementedError

    @property
    def alpha_bar(self) -> np.ndarray:
        """(T+1,): the levels 0..T."""
        return self.level(np.arange(self.num_steps + 1)).alpha_bar

    def level(self, t: np.ndarray) -> Level:
        """Levels t, in [0, T], in float64 on the host. ValueError for another t."""
        t = np.asarray(checks.reals("t", t, 0, self.num_steps), np.float64)
        with np.errstate(all="ignore"):  # at 0, where the formula is not asked
            return _from_log(t, np.where(t > 0, self.log_alpha_bar(t), 0.0), np)

    def levels(self) -> ContinuousSchedule:
        return self

    @property
    def alpha_bar_T(self) -> np.ndarray:
        return np.exp(self.log_alpha_bar(np.float64(self.num_steps)))

    def at(self, t: Array, dtype: jnp.dtype) -> Level:
        """Levels t, see `Levels`."""
        t = t.astype(jnp.promote_types(dtype, jnp.float32))
        log = jnp.where(t > 0, self.log_alpha_bar(jnp.where(t > 0, t, 1)), 0)
        return _cast(_from_log(t, log, jnp), dtype)


Schedule = NoiseSchedule | ContinuousSchedule


def _from_log(t, log_alpha_bar, numpy):
    return Level(t, numpy.exp(log_alpha_bar), 0 - numpy.expm1(log_alpha_bar))  # 0 at the image, not -0


def _between(log_alpha_bar, t, numpy):
    """Real levels t of a table of log(alpha_bar), (T+1,)."""
    below = numpy.clip(numpy.floor(t), 0, len(log_alpha_bar) - 2).astype(numpy.int32)
    low, high, part = log_alpha_bar[below], log_alpha_bar[below + 1], (t - below).astype(log_alpha_bar.dtype)
    ends_at_0 = numpy.isneginf(high)
    level = _from_log(t, low + part * numpy.where(ends_at_0, 0, high - low), numpy)
    alpha_bar = numpy.where(ends_at_0, (1 - part) * level.alpha_bar, level.alpha_bar)
    return Level(t, alpha_bar, numpy.where(ends_at_0, 1 - alpha_bar, level.one_minus_alpha_bar))


def _cast(level, dtype):
    return Level(level.t, level.alpha_bar.astype(dtype), level.one_minus_alpha_bar.astype(dtype))


class Levels(Protocol):
    """All levels of a schedule, as a pytree that crosses the border to the device."""

    @property
    def num_steps(self) -> int: ...

    @property
    def alpha_bar_T(self) -> Array: ...

    def at(self, t: Array, dtype: jnp.dtype) -> Level:
        """Levels t, ints or reals in [0, T], of any shape. Traceable."""


class LevelTable(NamedTuple):
    """Of a NoiseSchedule: leaves (T+1,)."""

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
        return _cast(_between(log_alpha_bar, t, jnp), dtype)


def levels(noise_schedule: Schedule) -> Levels:
    """All levels of a schedule: a table in float64 on the host, or a formula. ValueError for what is no schedule, see
    `check`.
    """
    return check(noise_schedule).levels()


def check(noise_schedule: Schedule) -> Schedule:
    """The schedule itself. ValueError unless alpha_bar begins with 1, falls strictly, and stays above what is 0 in
    float32, but for an alpha_bar[T] that is exactly 0; of a formula, at up to 1000 levels.
    """
    if isinstance(noise_schedule, NoiseSchedule):
        alpha_bar = np.asarray(checks.reals("noise_schedule.alpha_bar", noise_schedule.alpha_bar, 0, 1), np.float64)
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2:
            raise ValueError(f"noise_schedule.alpha_bar must be (T+1,), T at least 1, got shape {alpha_bar.shape}")
        noise = 1 - alpha_bar
    elif isinstance(noise_schedule, ContinuousSchedule):
        T = checks.integer("noise_schedule.num_steps", noise_schedule.num_steps, 1)
        _, alpha_bar, noise = noise_schedule.level(np.linspace(0, T, min(T, 1000) + 1))
    else:
        raise ValueError(
            f"noise_schedule must be a NoiseSchedule or a ContinuousSchedule, got {checks.shown(noise_schedule)}"
        )
    if 0 < alpha_bar[-1] < SMALLEST or alpha_bar[:-1].min() < SMALLEST:
        raise ValueError(f"noise_schedule falls to alpha_bar = {alpha_bar.min():.3g}, which is 0 in float32")
    if alpha_bar[0] != 1 or not ((np.diff(alpha_bar) < 0) | (np.diff(noise) > 0)).all():
        raise ValueError("noise_schedule must begin with alpha_bar = 1 and fall strictly")
    return noise_schedule


def check_levels(table: Levels) -> Levels:
    """The table itself. ValueError unless it is what `levels` returns."""
    if not callable(getattr(table, "at", None)):
        raise ValueError(f"table must be what schedule.levels returns, got {checks.shown(table)}")
    return table


def precision(dtype: jnp.dtype) -> jnp.dtype:
    """What is computed in for an x of this dtype: at least float32, because alpha_bar may be 0 in float16."""
    return jnp.promote_types(dtype, jnp.float32)


def level_at(table: Levels, t: Array, x: Array) -> Level:
    """Level t, shaped to broadcast against a batch.

    table: `levels(...)`. t: ints or reals in [0, T], () or (B,). x: (B, ...), gives dtype and rank. Returns t as it
    is, and leaves () or (B, 1, ..., 1) in the dtype of x, at least float32. ValueError for another t, as far as it is
    known.
    """
    t = jnp.asarray(checks.reals("t", t, 0, table.num_steps))
    if t.ndim and t.shape != x.shape[:1]:
        raise ValueError(f"t must have the shape () or {x.shape[:1]}, got {t.shape}")
    shape = t.shape + (1,) * (x.ndim - 1 if t.ndim else 0)
    _, alpha_bar, one_minus_alpha_bar = table.at(t, precision(x.dtype))
    return Level(t, alpha_bar.reshape(shape), one_minus_alpha_bar.reshape(shape))


def from_betas(betas) -> NoiseSchedule:
    """`alpha_bar[t] = prod_{i<=t} (1 - beta[i])`, with `alpha_bar[0] = 1`.

    betas: (T,), each in (0, 1), the last at most 1: a beta_T of 1 leaves no signal, see `zero_terminal_snr`. Raises
    ValueError otherwise, and where the product falls below what float32 can hold.
    """
    betas = np.asarray(checks.reals("betas", betas), np.float64)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas must be a list of at least one number, got shape {betas.shape}")
    outside = np.flatnonzero(~((betas > 0) & (betas < 1) | (betas == 1) & (np.arange(betas.size) == betas.size - 1)))
    if outside.size:
        raise ValueError(f"betas must lie in (0, 1), got beta[{outside[0] + 1}] = {betas[outside[0]]}")
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    if alpha_bar[-2 if betas[-1] == 1 else -1] < SMALLEST:
        raise ValueError(f"alpha_bar[T] = {alpha_bar[-1]:.3g} is 0 in float32: too many or too large betas")
    return check(NoiseSchedule(alpha_bar))


def zero_terminal_snr(noise_schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule without signal at T, `alpha_bar[T] = 0` (Lin et al. 2023, Algorithm 1): sqrt(alpha_bar) is shifted
    to end at 0, and scaled to begin at alpha_bar[1] as before. For networks that predict x_0 or v; from eps nothing of
    x_0 follows at T. ValueError for a schedule in closed form, and for T = 1.
    """
    if not isinstance(check(noise_schedule), NoiseSchedule) or noise_schedule.num_steps < 2:
        raise ValueError("noise_schedule must be a NoiseSchedule of at least 2 levels, not one in closed form")
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
    """beta linear in t (Ho et al. 2020, section 4): the schedule of all the paper's experiments."""
    _check_range(num_steps, beta_start, beta_end)
    return from_betas(np.linspace(beta_start, beta_end, num_steps))


def scaled_linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """sqrt(beta) linear in t (Rombach et al. 2022, the schedule of latent diffusion)."""
    _check_range(num_steps, beta_start, beta_end)
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def sigmoid(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """beta a logistic curve over [-6, 6], scaled to [beta_start, beta_end] (an option of the official DDIM code)."""
    _check_range(num_steps, beta_start, beta_end)
    curve = 1 / (1 + np.exp(-np.linspace(-6, 6, num_steps)))
    return from_betas(beta_start + (beta_end - beta_start) * curve)


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar a squared cosine in t, each beta at most max_beta (Nichol and Dhariwal 2021, Eq. 17)."""
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
    """The variance-preserving process with a rate linear in t (Song et al. 2021, Eq. 32 and 33), in closed form:
    `log(alpha_bar) = -(beta_start t + (beta_end - beta_start) t^2 / (2 T))`.

    It is `linear` as its steps become small; in the time t / T its rates are T beta_start and T beta_end, 0.1 and 20.
    """
    _check_range(num_steps, beta_start, beta_end)
    return check(VP(num_steps, beta_start, beta_end))


@dataclasses.dataclass(frozen=True)
class LogSNR(ContinuousSchedule):
    log_snr_max: float
    log_snr_min: float

    def log_alpha_bar(self, t):
        numpy = t.__array_namespace__()
        log_snr = self.log_snr_max + (self.log_snr_min - self.log_snr_max) * t / self.num_steps
        return -numpy.logaddexp(numpy.zeros_like(t), -log_snr)


def log_snr(num_steps: int = 1000, log_snr_max: float = 13.3, log_snr_min: float = -10.0) -> LogSNR:
    """log(alpha_bar / (1 - alpha_bar)) linear in t (Kingma et al. 2021, appendix F, which learned such a range). The
    image itself, t = 0, is beyond the line.
    """
    checks.integer("num_steps", num_steps, 1, checks.MAX_STEPS)
    checks.real("log_snr_max", log_snr_max)
    checks.real("log_snr_min", log_snr_min)
    if not -80 <= log_snr_min < log_snr_max <= 80:
        raise ValueError(f"-80 <= log_snr_min < log_snr_max <= 80 must hold, got {log_snr_min} and {log_snr_max}")
    return LogSNR(num_steps, log_snr_max, log_snr_min)
