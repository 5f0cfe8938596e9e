"""The training objective, Eq. (5)."""

from __future__ import annotations

import jax.numpy as jnp

from ddim_jax import gaussian
from ddim_jax.gaussian import EpsFn
from ddim_jax.schedule import Array, Level, level_at

# gamma as a function of the level. One network trained with any gamma > 0 serves all sampling processes (Theorem 1).
GAMMAS = {
    "one": lambda level: jnp.ones_like(level.alpha_bar),  # the paper's: the plain error of eps
    "x0": lambda level: level.one_minus_alpha_bar / level.alpha_bar,  # the plain error of the predicted x_0
    "v": lambda level: 1 / level.alpha_bar,  # the plain error of v
}


def l_gamma(eps_fn: EpsFn, table: Level, x_0: Array, t: Array, eps: Array, gamma: str = "one") -> Array:
    """The terms of Eq. (5): `gamma_t || eps_theta(x_t) - eps ||^2 / d`, with x_t of Eq. (4), one for each image.

    table: `schedule.levels(...)`. x_0, eps: (B, ...) with eps ~ N(0, I). t: (B,) ints in 1..T. gamma: a name in
    GAMMAS. Returns (B,) float32. Divided by the dimension d, as in DDPM's code, so that gradient norms do not
    depend on the image size; the mean over t uniform in 1..T and over the data is L_gamma / (T d).
    """
    level = level_at(table, t, x_0)
    error = eps_fn(gaussian.q_marginal(x_0, eps, level), t) - eps
    return jnp.mean(GAMMAS[gamma](level) * error**2, axis=tuple(range(1, x_0.ndim)))
