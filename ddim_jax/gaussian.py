"""The Gaussians of the paper: q(x_t | x_0), q_sigma(x_s | x_t, x_0), and what a prediction of eps says about x_0.

Everywhere `x_0`, `x_t`, `eps` are (B, ...) and a `Level` or a `Transition` has leaves that broadcast against them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ddim_jax.schedule import Array, Level, Levels, level_at

EpsFn = Callable[[Array, Array], Array]  # (x_t (B, ...), t () or (B,) in 1..T) -> eps (B, ...)


def noise(keys: Array, t: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """N(0, I) of level t, (B, *shape): image i's depends on keys[i] and t alone. keys: (B,). t: (), int or real."""
    return jax.vmap(lambda key: jax.random.normal(level_key(key, t), shape, dtype))(keys)


def level_key(key: Array, t: Array) -> Array:
    """The key of level t, () int or real, from that of an image."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        t = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(key, t)


def q_marginal(x_0: Array, eps: Array, level: Level) -> Array:
    """Eq. (4): `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`, a draw from q(x_t | x_0) for eps ~ N(0,
    I).
    """
    return jnp.sqrt(level.alpha_bar) * x_0 + jnp.sqrt(level.one_minus_alpha_bar) * eps


def predict_x0(x_t: Array, eps: Array, level: Level) -> Array:
    """Eq. (9): `f = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)`, the predicted x_0."""
    return (x_t - jnp.sqrt(level.one_minus_alpha_bar) * eps) / jnp.sqrt(level.alpha_bar)


def predict_eps(x_t: Array, x_0: Array, level: Level) -> Array:
    """Eq. (9) solved for eps: `(x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)`, for t >= 1."""
    return (x_t - jnp.sqrt(level.alpha_bar) * x_0) / jnp.sqrt(level.one_minus_alpha_bar)


def predict_v(x_0: Array, eps: Array, level: Level) -> Array:
    """`v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0` (Salimans and Ho 2022, Eq. 10)."""
    return jnp.sqrt(level.alpha_bar) * eps - jnp.sqrt(level.one_minus_alpha_bar) * x_0


def eps_from_v(x_t: Array, v: Array, level: Level) -> Array:
    """`eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t`: (x_t, v) is (x_0, eps) turned by an angle."""
    return jnp.sqrt(level.alpha_bar) * v + jnp.sqrt(level.one_minus_alpha_bar) * x_t


# What a network may predict, as the eps that follows from it: (x_t, prediction, level) -> eps.
PREDICTIONS = {
    "eps": lambda x_t, eps, level: eps,
    "x0": predict_eps,
    "v": eps_from_v,
}


def sigma_squared(eta: Array, transition) -> Array:
    """Eq. (16), squared: `sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_s)`.

    eta = 0 is DDIM, eta = 1 is DDPM. The square is what (7), (8) and (12) need; it also keeps
    `1 - alpha_bar_s - sigma^2` from falling below 0 in float32 at eta = 1, because the host's table is rounded
    once and rounding is monotone.
    """
    return eta**2 * transition.posterior_variance


def q_sigma(x_t: Array, x_0: Array, transition, sigma2: Array) -> tuple[Array, Array]:
    """Eq. (7): mean and variance of q_sigma(x_s | x_t, x_0), for `0 <= sigma2 <= 1 - alpha_bar_s`.

    `mean = sqrt(alpha_bar_s) x_0 + k (x_t - sqrt(alpha_bar_t) x_0)`,
    `k = sqrt((1 - alpha_bar_s - sigma^2) / (1 - alpha_bar_t))`.
    """
    k = jnp.sqrt((transition.one_minus_alpha_bar_s - sigma2) / transition.one_minus_alpha_bar_t)
    residual = x_t - jnp.sqrt(transition.alpha_bar_t) * x_0
    return jnp.sqrt(transition.alpha_bar_s) * x_0 + k * residual, sigma2


def q_sigma_forward(x_s: Array, x_0: Array, transition, sigma2: Array) -> tuple[Array, Array]:
    """Eq. (8): mean and variance of q_sigma(x_t | x_s, x_0), the same joint law by Bayes' rule, for s >= 1.

    With `r = (1 - alpha_bar_t) / (1 - alpha_bar_s)` and k of (7):
    `mean = sqrt(alpha_bar_t) x_0 + k r (x_s - sqrt(alpha_bar_s) x_0)`, `variance = sigma^2 r`.
    """
    k = jnp.sqrt((transition.one_minus_alpha_bar_s - sigma2) / transition.one_minus_alpha_bar_t)
    r = transition.one_minus_alpha_bar_t / transition.one_minus_alpha_bar_s
    residual = x_s - jnp.sqrt(transition.alpha_bar_s) * x_0
    return jnp.sqrt(transition.alpha_bar_t) * x_0 + k * r * residual, sigma2 * r


def clip_x0(eps_fn: EpsFn, table: Levels, low: float = -1.0, high: float = 1.0) -> EpsFn:
    """An eps_fn whose predicted x_0 stays in [low, high], for any sampler.

    eps is derived again from the clipped x_0, see `with_x0`. table: `schedule.levels(...)`. The paper
    does not clip; most published samplers of DDPM do.
    """
    return with_x0(eps_fn, table, Partial(_clip, low, high))


def _clip(low, high, x_0):
    return jnp.clip(x_0, low, high)


def threshold_x0(eps_fn: EpsFn, table: Levels, quantile: float, maximum: float) -> EpsFn:
    """An eps_fn with dynamic thresholding (Saharia et al. 2022, section 2.3), for any sampler.

    The predicted x_0 of each image is clipped to [-s, s] and divided by s, where s is the quantile of its absolute
    values, but at least 1 and at most maximum. eps is derived again, as in `clip_x0`.
    """
    return with_x0(eps_fn, table, Partial(_threshold, quantile, maximum))


def _threshold(quantile, maximum, x_0):
    s = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), quantile, axis=1)
    s = jnp.clip(s, 1, maximum).reshape(-1, *[1] * (x_0.ndim - 1))
    return jnp.clip(x_0, -s, s) / s


def with_x0(eps_fn: EpsFn, table: Levels, change: Callable[[Array], Array]) -> EpsFn:
    """An eps_fn whose predicted x_0 is `change` of what it was, and whose eps is derived again from that, so that (9)
    holds between the two. change: a pytree, such as a `jax.tree_util.Partial`. For t >= 1.
    """
    return Partial(_eps_with_x0, eps_fn, table, change)


def _eps_with_x0(eps_fn, table, change, x_t, t):
    level = level_at(table, t, x_t)
    return predict_eps(x_t, change(predict_x0(x_t, eps_fn(x_t, t), level)), level)
