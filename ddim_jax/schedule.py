"""Noise schedules: how much of the image is left at each level t.

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
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class NoiseSchedule(NamedTuple):
    """The noise levels of a diffusion; all other quantities follow from `alpha_bar`.

    alpha_bar: (T+1,) float64 on the host, `alpha_bar[0] = 1`, strictly decreasing, above 0.
    """

    alpha_bar: Array

    @property
    def num_steps(self) -> int:
        """T, the number of training steps."""
        return self.alpha_bar.shape[0] - 1


class Level(NamedTuple):
    """What Eq. (4) needs to know of a noise level. Leaves of any one shape: (), (B, 1, ..., 1), or the table (T+1,)."""

    alpha_bar: Array
    one_minus_alpha_bar: Array  # subtracted in float64


def levels(noise_schedule: NoiseSchedule) -> Level:
    """All levels 0..T as one table, float64 on the host, leaves (T+1,)."""
    alpha_bar = np.asarray(noise_schedule.alpha_bar, np.float64)
    return Level(alpha_bar, 1 - alpha_bar)


def level_at(table: Level, t: Array, x: Array) -> Level:
    """Level t of a table, shaped to broadcast against a batch.

    table: `levels(...)`, leaves (T+1,). t: ints in 0..T, () or (B,). x: (B, ...), gives dtype and rank.
    Returns leaves () or (B, 1, ..., 1), in the dtype of x.
    """
    t = jnp.asarray(t)
    shape = t.shape + (1,) * (x.ndim - 1 if t.ndim else 0)
    return Level(*(jnp.asarray(leaf).astype(x.dtype)[t].reshape(shape) for leaf in table))


def from_betas(betas) -> NoiseSchedule:
    """`alpha_bar[t] = prod_{i<=t} (1 - beta[i])`, with `alpha_bar[0] = 1`.

    betas: (T,), each in (0, 1). Raises ValueError otherwise, and where the product falls below what float32 can hold.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas must be a list of at least one number, got shape {betas.shape}")
    outside = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if outside.size:
        raise ValueError(f"betas must lie in (0, 1), got beta[{outside[0] + 1}] = {betas[outside[0]]}")
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    if alpha_bar[-1] < np.finfo(np.float32).tiny:
        raise ValueError(f"alpha_bar[T] = {alpha_bar[-1]:.3g} is 0 in float32: too many or too large betas")
    return NoiseSchedule(alpha_bar)


def _check_range(num_steps: int, beta_start: float, beta_end: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
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
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    u = np.arange(num_steps + 1) / num_steps
    curve = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return from_betas(np.minimum(1 - curve[1:] / curve[:-1], max_beta))
