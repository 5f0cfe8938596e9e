"""The Gaussians of the paper: q(x_t | x_0), q_sigma(x_s | x_t, x_0), and what a prediction of eps says about x_0.

Everywhere `x_0`, `x_t`, `eps` are (B, ...) and a `Level` or a `Transition` has leaves that broadcast against them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddim_jax import checks
from ddim_jax.schedule import Array, Level, Levels, check_levels, level_at, precision

EpsFn = Callable[[Array, Array], Array]  # (x_t (B, ...), t () or (B,) in 1..T) -> eps (B, ...)


def as_eps_fn(eps_fn: EpsFn, name: str = "eps_fn") -> EpsFn:
    """The same function as a pytree, for the entry of every function and combinator that takes one: a plain function
    becomes a `jax.tree_util.Partial`, see `checks.function`.

    What it returns is checked while it is traced, and is computed with in the precision of x_t, at least float32.
    ValueError, naming it, for what cannot be called, and for an output that is not of the shape of x_t or not of
    floating point.
    """
    if isinstance(eps_fn, Partial) and isinstance(eps_fn.func, _Checked):
        return eps_fn
    return Partial(_Checked(name), checks.function(name, eps_fn))


class _Checked:
    """Calls a function and checks its output. All are equal: the name is for messages alone."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, eps_fn, x_t, t):
        x_t = jnp.asarray(x_t)
        return checks.output(self._name, eps_fn(x_t, t), x_t).astype(precision(x_t.dtype))

    def __eq__(self, other):
        return isinstance(other, _Checked)

    def __hash__(self):
        return hash(_Checked)


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


def sigma(eta: Array, transition) -> Array:
    """Eq. (16): `sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)`.

    eta = 0 is DDIM, eta = 1 is DDPM. Smooth in eta, also at 0. Exactly 0 where the step has no posterior variance,
    whatever eta is: for the last step (s = 0), and for one that ascends.
    """
    return _effective(eta, transition) * jnp.sqrt(transition.posterior_variance)


def sigma_squared(eta: Array, transition) -> Array:
    """The square of (16), which (7), (8) and (12) need: it keeps `1 - alpha_bar_s - sigma^2` from falling below 0 in
    float32 at eta = 1, because the host's table is rounded once and rounding is monotone.
    """
    return _effective(eta, transition) ** 2 * transition.posterior_variance


def _effective(eta, transition):
    """eta, and 0 where nothing can come of it: the square of a large one may be infinite."""
    return eta * (transition.posterior_variance > 0)


def max_eta(transitions) -> float:
    """The largest eta with `sigma(eta)^2 <= 1 - alpha_bar_s` in every step: at least 1, infinite for a single step."""
    bound, unit = np.asarray(transitions.one_minus_alpha_bar_s), np.asarray(transitions.posterior_variance)
    ratio = np.divide(bound, unit, out=np.full(bound.shape, np.inf), where=unit > 0)
    return float(np.sqrt(ratio.min()))


def check_eta(eta: Array | float, transitions) -> None:
    """ValueError unless eta is a number from 0 to `max_eta`, and 0 if a step ascends. On the host; a traced eta beyond
    that gives NaN.
    """
    checks.real("eta", eta, 0)
    if checks.traced(eta) or eta == 0 or checks.traced(*transitions):
        return
    if (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
        raise ValueError(f"eta must be 0 where a step ascends (encoding is deterministic), got {eta}")
    limit = max_eta(transitions)
    if eta > limit:
        raise ValueError(
            f"eta must be in [0, {limit:.6g}] for this tau: beyond, sigma^2 of Eq. (16) exceeds 1 - alpha_bar_s; "
            f"got {eta}"
        )


def direction_variance(transition, sigma2: Array) -> Array:
    """`1 - alpha_bar_s - sigma^2`, the square of what (7), (8) and (12) keep of the direction to x_t. A difference that
    rounding alone took below 0, as it may at the largest eta, is 0; where sigma^2 is too large it is NaN.
    """
    bound = transition.one_minus_alpha_bar_s
    left = bound - sigma2
    rounding = 8 * jnp.finfo(jnp.result_type(left, jnp.float32)).eps
    return jnp.where(left >= 0, left, jnp.where(left >= -rounding * bound, 0, jnp.nan))


def root(variance: Array) -> Array:
    """The square root, whose derivative at 0 is 0: a step to the image has no variance, whatever eta is. At the largest
    eta, where the limit of the derivative from below is infinite, it counts as 0 too.
    """
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), variance * 0)


def _check_sigma2(sigma2: Array, transition, x: Array) -> None:
    checks.broadcasts("sigma2", checks.reals("sigma2", sigma2, 0), np.shape(x))
    if not checks.traced(sigma2, *transition):
        if (np.asarray(sigma2) > np.asarray(transition.one_minus_alpha_bar_s) * (1 + 1e-6)).any():
            raise ValueError("sigma2 must be at most 1 - alpha_bar_s")


def q_sigma(x_t: Array, x_0: Array, transition, sigma2: Array) -> tuple[Array, Array]:
    """Eq. (7): mean and variance of q_sigma(x_s | x_t, x_0). ValueError unless `0 <= sigma2 <= 1 - alpha_bar_s`.

    `mean = sqrt(alpha_bar_s) x_0 + k (x_t - sqrt(alpha_bar_t) x_0)`,
    `k = sqrt((1 - alpha_bar_s - sigma^2) / (1 - alpha_bar_t))`.
    """
    _check_sigma2(sigma2, transition, x_t)
    k = root(direction_variance(transition, sigma2) / transition.one_minus_alpha_bar_t)
    residual = x_t - jnp.sqrt(transition.alpha_bar_t) * x_0
    return jnp.sqrt(transition.alpha_bar_s) * x_0 + k * residual, sigma2


def q_sigma_forward(x_s: Array, x_0: Array, transition, sigma2: Array) -> tuple[Array, Array]:
    """Eq. (8): mean and variance of q_sigma(x_t | x_s, x_0), the same joint law by Bayes' rule, for s >= 1.

    With `r = (1 - alpha_bar_t) / (1 - alpha_bar_s)` and k of (7):
    `mean = sqrt(alpha_bar_t) x_0 + k r (x_s - sqrt(alpha_bar_s) x_0)`, `variance = sigma^2 r`.
    """
    _check_sigma2(sigma2, transition, x_s)
    k = root(direction_variance(transition, sigma2) / transition.one_minus_alpha_bar_t)
    r = transition.one_minus_alpha_bar_t / transition.one_minus_alpha_bar_s
    residual = x_s - jnp.sqrt(transition.alpha_bar_s) * x_0
    return jnp.sqrt(transition.alpha_bar_t) * x_0 + k * r * residual, sigma2 * r


def clip_x0(eps_fn: EpsFn, table: Levels, low: float = -1.0, high: float = 1.0) -> EpsFn:
    """An eps_fn whose predicted x_0 stays in [low, high], for any sampler.

    eps is derived again from the clipped x_0, see `with_x0`. table: `schedule.levels(...)`. The paper
    does not clip; most published samplers of DDPM do. ValueError unless low is below high.
    """
    checks.real("low", low)
    checks.real("high", high)
    if not checks.traced(low, high) and not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    return with_x0(eps_fn, table, Partial(_clip, low, high))


def _clip(low, high, x_0):
    return jnp.clip(x_0, low, high)


def threshold_x0(eps_fn: EpsFn, table: Levels, quantile: float, maximum: float) -> EpsFn:
    """An eps_fn with dynamic thresholding (Saharia et al. 2022, section 2.3), for any sampler.

    The predicted x_0 of each image is clipped to [-s, s] and divided by s, where s is the quantile of its absolute
    values, but at least 1 and at most maximum. eps is derived again, as in `clip_x0`. ValueError for a quantile
    outside (0, 1) and for a maximum below 1.
    """
    checks.real("quantile", quantile, 0, 1, open=True)
    checks.real("maximum", maximum, 1)
    return with_x0(eps_fn, table, Partial(_threshold, quantile, maximum))


def _threshold(quantile, maximum, x_0):
    s = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), quantile, axis=1)
    s = jnp.clip(s, 1, maximum).reshape(-1, *[1] * (x_0.ndim - 1))
    return jnp.clip(x_0, -s, s) / s


def with_x0(eps_fn: EpsFn, table: Levels, change: Callable[[Array], Array]) -> EpsFn:
    """An eps_fn whose predicted x_0 is `change` of what it was, and whose eps is derived again from that, so that (9)
    holds between the two. At t = 0, where x_t is x_0 whatever eps is, eps stays. eps_fn, change: functions or pytrees.
    """
    return Partial(_eps_with_x0, as_eps_fn(eps_fn), check_levels(table), checks.function("change", change))


def _eps_with_x0(eps_fn, table, change, x_t, t):
    level, eps = level_at(table, t, x_t), eps_fn(x_t, t)
    noisy = level.one_minus_alpha_bar > 0
    safe = level._replace(one_minus_alpha_bar=jnp.where(noisy, level.one_minus_alpha_bar, 1))
    return jnp.where(noisy, predict_eps(x_t, change(predict_x0(x_t, eps, level)), safe), eps)
