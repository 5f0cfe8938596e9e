"""The Gaussians of the paper: q(x_t | x_0), q_sigma(x_s | x_t, x_0), and the two halves of a prediction, x_0 and eps.

Everywhere `x_0`, `x_t`, `eps` are (B, ...) and a `Level` or a `Transition` has leaves that broadcast against them.

One file because all of it is the algebra of one pair, x_0 and eps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, register_pytree_node_class

from ddim_jax import checks
from ddim_jax.schedule import Array, Level, precision

EpsFn = Callable[[Array, Array], Array]  # (x_t (B, ...), t () or (B,) in 1..T) -> eps (B, ...)


class Prediction(NamedTuple):
    """What a network predicts of x_t, as both halves of `x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps`. Both are
    kept, because at alpha_bar = 0 nothing of x_0 follows from eps, and at alpha_bar = 1 nothing of eps from x_0.
    """

    x_0: Array  # (B, ...)
    eps: Array  # (B, ...)


@register_pytree_node_class
class Denoise:
    """A denoiser, (x_t (B, ...), level) -> `Prediction`: `function(*args, x_t, level)`. Made by `from_eps`, by
    `models.denoiser.Denoiser`, and by the combinators `clip_x0`, `threshold_x0`, `guidance.guided`,
    `guidance.inpainted`.

    A pytree whose children are the args: other values of the same shapes compile nothing. function is static, see
    `checks.function`. The level has the leaves () or, for a t (B,), alpha_bar (B, 1, ..., 1). Both halves are checked
    while they are traced: ValueError unless they are of the shape of x_t and of floating point. They are computed with
    in the precision of x_t, at least float32.
    """

    def __init__(self, function: Callable[..., Prediction], *args: Any):
        self.function, self.args = checks.function("function", function), args

    def predict(self, x_t: Array, level: Level) -> Prediction:
        return self.function(*self.args, x_t, level)

    def check(self, alpha_bar: Array) -> None:
        """ValueError where the prediction is undefined at one of these levels. On the host."""
        for arg in self.args:
            if isinstance(arg, Denoise):
                arg.check(alpha_bar)

    def __call__(self, x_t: Array, level: Level) -> Prediction:
        x_t = jnp.asarray(x_t)
        x_0, eps = self.predict(x_t, level)
        of = lambda name, value: checks.output(f"the {name} of a denoiser", value, x_t).astype(precision(x_t.dtype))
        return Prediction(of("x_0", x_0), of("eps", eps))

    def tree_flatten(self):
        return (self.function, *self.args), None

    @classmethod
    def tree_unflatten(cls, _, children):
        self = object.__new__(cls)
        self.function, *self.args = children
        return self


@register_pytree_node_class
class _FromEps(Denoise):
    """args: (eps_fn,). What is static: the dtype that eps_fn is given, and its name in messages."""

    def __init__(self, eps_fn: EpsFn, dtype: jnp.dtype | None, name: str):
        self.args, self.dtype, self.name = [checks.function(name, eps_fn)], dtype, name

    def predict(self, x_t, level):
        given = x_t if self.dtype is None else x_t.astype(self.dtype)
        eps = checks.output(self.name, self.args[0](given, level.t), x_t).astype(precision(x_t.dtype))
        return from_eps_output(x_t, eps, level)

    def check(self, alpha_bar):
        if not checks.traced(alpha_bar) and (np.asarray(alpha_bar) == 0).any():
            raise ValueError(
                f"{self.name} must predict x_0 or v where alpha_bar = 0: there nothing of x_0 follows from eps"
            )

    def tree_flatten(self):
        return self.args, _Name(self.dtype, self.name)

    @classmethod
    def tree_unflatten(cls, static, children):
        self = object.__new__(cls)
        self.args, self.dtype, self.name = list(children), static.dtype, static.name
        return self


@dataclasses.dataclass(frozen=True)
class _Name:
    """Equal to another of the same dtype: the name is for messages alone, and compiles nothing."""

    dtype: jnp.dtype | None
    name: str = dataclasses.field(compare=False)


Model = Denoise | EpsFn  # what every function and combinator takes


def from_eps(eps_fn: EpsFn, dtype: jnp.dtype | None = None, name: str = "eps_fn") -> Denoise:
    """The denoiser of a function (x_t, t) -> eps, with the x_0 that follows by Eq. (9). eps_fn: a plain function or a
    pytree such as `jax.tree_util.Partial`, see `checks.function`. dtype: what x_t is cast to for eps_fn alone; default:
    as it comes. name: of the function in messages. ValueError for what cannot be called, and, while it is traced, for
    an output that is not of the shape of x_t or not of floating point.
    """
    return _FromEps(eps_fn, dtype, name)


def as_denoise(model: Model, dtype: jnp.dtype | None = None, name: str = "model") -> Denoise:
    """The denoiser itself, or `from_eps` of a function: for the entry of every function and combinator that takes one
    or the other.
    """
    return model if isinstance(model, Denoise) else from_eps(model, dtype, name)


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


def from_eps_output(x_t: Array, eps: Array, level: Level) -> Prediction:
    """Of a network that predicts eps: x_0 by Eq. (9). Undefined at alpha_bar = 0."""
    return Prediction(predict_x0(x_t, eps, level), eps)


def from_x0_output(x_t: Array, x_0: Array, level: Level) -> Prediction:
    """Of a network that predicts x_0: eps by Eq. (9). Undefined at alpha_bar = 1."""
    return Prediction(x_0, predict_eps(x_t, x_0, level))


def from_v_output(x_t: Array, v: Array, level: Level) -> Prediction:
    """Of a network that predicts v: (x_t, v) is (x_0, eps) turned by an angle. Defined at every level."""
    signal, noise = jnp.sqrt(level.alpha_bar), jnp.sqrt(level.one_minus_alpha_bar)
    return Prediction(signal * x_t - noise * v, signal * v + noise * x_t)


# What a network may predict: (x_t, output of the network, level) -> Prediction.
PREDICTIONS = {"eps": from_eps_output, "x0": from_x0_output, "v": from_v_output}


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


def clip_x0(model: Model, low: float = -1.0, high: float = 1.0, *, keep_eps: bool = False) -> Denoise:
    """A denoiser whose predicted x_0 stays in [low, high], for any sampler.

    eps is derived again from the clipped x_0, see `with_x0`; keep_eps: it stays what it was, as in diffusers'
    schedulers with clip_sample. The paper does not clip; most published samplers of DDPM do. ValueError unless low is
    below high.
    """
    checks.real("low", low)
    checks.real("high", high)
    if not checks.traced(low, high) and not low < high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    return with_x0(model, Partial(_clip, low, high), keep_eps=keep_eps)


def _clip(low, high, x_0):
    return jnp.clip(x_0, low, high)


def threshold_x0(model: Model, quantile: float, maximum: float, *, keep_eps: bool = False) -> Denoise:
    """A denoiser with dynamic thresholding (Saharia et al. 2022, section 2.3), for any sampler.

    The predicted x_0 of each image is clipped to [-s, s] and divided by s, where s is the quantile of its absolute
    values, but at least 1 and at most maximum. eps is derived again, or kept, as in `clip_x0`. ValueError for a
    quantile outside (0, 1) and for a maximum below 1.
    """
    checks.real("quantile", quantile, 0, 1, open=True)
    checks.real("maximum", maximum, 1)
    return with_x0(model, Partial(_threshold, quantile, maximum), keep_eps=keep_eps)


def _threshold(quantile, maximum, x_0):
    s = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), quantile, axis=1)
    s = jnp.clip(s, 1, maximum).reshape(-1, *[1] * (x_0.ndim - 1))
    return jnp.clip(x_0, -s, s) / s


def with_x0(model: Model, change: Callable[[Array], Array], *, keep_eps: bool = False) -> Denoise:
    """A denoiser whose predicted x_0 is `change` of what it was, and whose eps is derived again from that, so that (9)
    holds between the two; keep_eps: eps stays. At alpha_bar = 1, where x_t is x_0 whatever is predicted, both stay.
    change: a function or a pytree, see `checks.function`.
    """
    function = _with_x0_and_same_eps if keep_eps else _with_x0
    return Denoise(function, as_denoise(model), checks.function("change", change))


def _with_x0(model, change, x_t, level):
    before = model(x_t, level)
    noisy = level.one_minus_alpha_bar > 0
    safe = level._replace(one_minus_alpha_bar=jnp.where(noisy, level.one_minus_alpha_bar, 1))
    changed = change(before.x_0)
    after = Prediction(changed, predict_eps(x_t, changed, safe))
    return jax.tree.map(lambda after, before: jnp.where(noisy, after, before), after, before)


def _with_x0_and_same_eps(model, change, x_t, level):
    before = model(x_t, level)
    return Prediction(jnp.where(level.one_minus_alpha_bar > 0, change(before.x_0), before.x_0), before.eps)
