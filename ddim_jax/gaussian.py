"""The Gaussian distributions of the paper, q(x_t | x_0) and q_sigma(x_s | x_t, x_0), and the prediction (x_0, eps).

In all functions `x_0`, `x_t` and `eps` are (B, ...), and the leaves of a `Level` or a `Transition` broadcast against
them.

One file because all functions are formulas of the same pair, x_0 and eps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, register_pytree_node_class

from ddim_jax import checks
from ddim_jax.schedule import Array, Level, precision

EpsFn = Callable[[Array, Array], Array]  # (x_t (B, ...), t) -> eps (B, ...); t: see `Denoise`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The network's prediction at x_t: x_0 and eps, with `x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps`.

    Both are stored, because x_0 cannot be computed from eps at alpha_bar = 0, nor eps from x_0 at alpha_bar = 1.
    `x_0, eps = prediction` unpacks both.

    variance_fraction: None, unless the network also predicts the variance of the step (Nichol and Dhariwal 2021, Eq.
        15). The log of the variance is interpolated linearly: 0 gives the posterior variance, 1 gives beta_t. See
        `samplers.ddpm_learned`.
    """

    x_0: Array  # (B, ...)
    eps: Array  # (B, ...)
    variance_fraction: Array | None = None  # (B, ...)

    def __iter__(self) -> Iterator[Array]:
        return iter((self.x_0, self.eps))


@register_pytree_node_class
class Denoise:
    """A denoiser, (x_t, level) -> `Prediction`. It computes `function(*args, x_t, level)`.

    x_t: (B, ...).
    level: a `Level` whose leaves are (), or t (B,) and alpha_bar (B, 1, ..., 1).

    The timestep t = level.t, which is passed to the network, has the shape () or (B,) and counts 1..T. If tau is
    real-valued, t is a real number in (0, T]. In encoding, t is also 0, the clean image. The samplers pass t (), the
    losses pass t (B,). `models.denoiser.Denoiser` wraps a network that counts 0..T-1.

    Denoisers are built by `from_eps`, by `models.denoiser.Denoiser`, and by the combinators `clip_x0`, `threshold_x0`,
    `with_x0`, `with_variance`, `guidance.guided` and `guidance.inpainted`.

    A denoiser is a pytree whose children are args: new values of the same shapes do not trigger recompilation. function
    is static, see `checks.function`. The predicted x_0 and eps are checked during tracing: ValueError unless they have
    the shape of x_t and a floating-point dtype. They are cast to the dtype of x_t, at least float32.
    """

    def __init__(self, function: Callable[..., Prediction], *args: Any):
        self.function, self.args = checks.function("function", function), args

    def predict(self, x_t: Array, level: Level) -> Prediction:
        return self.function(*self.args, x_t, level)

    def check(self, alpha_bar: Array) -> None:
        """Raises ValueError if the prediction is undefined at one of the timesteps. Runs on the host.

        alpha_bar: (S,), the alpha_bar of the timesteps at which the denoiser will be called.
        """
        for arg in self.args:
            if isinstance(arg, Denoise):
                arg.check(alpha_bar)

    def __call__(self, x_t: Array, level: Level) -> Prediction:
        x_t = jnp.asarray(x_t)
        prediction = self.predict(x_t, level)
        if not isinstance(prediction, Prediction):
            raise ValueError(f"a denoiser must return a gaussian.Prediction, got {checks.shown(prediction)}")
        cast = lambda name, value: checks.output(f"the {name} of a denoiser", value, x_t).astype(precision(x_t.dtype))
        x_0, eps, fraction = cast("x_0", prediction.x_0), cast("eps", prediction.eps), prediction.variance_fraction
        return Prediction(x_0, eps, None if fraction is None else cast("variance_fraction", fraction))

    def tree_flatten(self):
        return (self.function, *self.args), None

    @classmethod
    def tree_unflatten(cls, _, children):
        self = object.__new__(cls)
        self.function, *self.args = children
        return self


@register_pytree_node_class
class _FromEps(Denoise):
    """args: (eps_fn,). Static: the dtype in which eps_fn gets x_t, and the name of eps_fn in error messages."""

    def __init__(self, eps_fn: EpsFn, dtype: jnp.dtype | None, name: str):
        self.args, self.dtype, self.name = [checks.function(name, eps_fn)], dtype, name

    def predict(self, x_t, level):
        x = x_t if self.dtype is None else x_t.astype(self.dtype)
        eps = checks.output(self.name, self.args[0](x, level.t), x_t).astype(precision(x_t.dtype))
        return from_eps_output(x_t, eps, level)

    def check(self, alpha_bar):
        if not checks.traced(alpha_bar) and (np.asarray(alpha_bar) == 0).any():
            raise ValueError(
                f"{self.name} must predict x_0 or v where alpha_bar = 0: there x_0 cannot be computed from eps"
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
    """The static data of `_FromEps`. Equal if the dtypes are equal: a new name does not trigger recompilation."""

    dtype: jnp.dtype | None
    name: str = dataclasses.field(compare=False)


Model = Denoise | EpsFn  # the type of every argument `model`


def from_eps(eps_fn: EpsFn, dtype: jnp.dtype | None = None, name: str = "eps_fn") -> Denoise:
    """The denoiser of a function (x_t, t) -> eps. x_0 follows by Eq. (9).

    eps_fn: a plain function or a pytree such as `jax.tree_util.Partial`, see `checks.function`. t: see `Denoise`.
    dtype: the dtype in which eps_fn gets x_t; default: the dtype of x_t.
    name: the name of eps_fn in error messages.

    Raises ValueError if eps_fn is not callable, and during tracing if its output does not have the shape of x_t or a
    floating-point dtype.
    """
    return _FromEps(eps_fn, dtype, name)


def as_denoise(model: Model, dtype: jnp.dtype | None = None, name: str = "model") -> Denoise:
    """Returns a `Denoise` unchanged, and converts a function by `from_eps`.

    Every function and combinator that takes a `Model` calls it first.
    """
    return model if isinstance(model, Denoise) else from_eps(model, dtype, name)


def noise(keys: Array, t: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """N(0, I) for the timestep t, (B, *shape). The noise of image i depends only on keys[i] and t.

    keys: (B,).
    t: (), int or real.
    """
    return jax.vmap(lambda key: jax.random.normal(level_key(key, t), shape, dtype))(keys)


def level_key(key: Array, t: Array) -> Array:
    """Derives the key of the timestep t from the key of an image. t: (), int or real."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.integer):
        t = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(key, t)


def q_marginal(x_0: Array, eps: Array, level: Level) -> Array:
    """Eq. (4): `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps`, a sample of q(x_t | x_0) if eps ~ N(0, I)."""
    return jnp.sqrt(level.alpha_bar) * x_0 + jnp.sqrt(level.one_minus_alpha_bar) * eps


def predict_x0(x_t: Array, eps: Array, level: Level) -> Array:
    """Eq. (9), the predicted x_0: `f = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)`."""
    return (x_t - jnp.sqrt(level.one_minus_alpha_bar) * eps) / jnp.sqrt(level.alpha_bar)


def predict_eps(x_t: Array, x_0: Array, level: Level) -> Array:
    """Eq. (9) solved for eps: `(x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)`, for t > 0."""
    return (x_t - jnp.sqrt(level.alpha_bar) * x_0) / jnp.sqrt(level.one_minus_alpha_bar)


def predict_v(x_0: Array, eps: Array, level: Level) -> Array:
    """`v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0` (Salimans and Ho 2022, Eq. 10)."""
    return jnp.sqrt(level.alpha_bar) * eps - jnp.sqrt(level.one_minus_alpha_bar) * x_0


def from_eps_output(x_t: Array, eps: Array, level: Level) -> Prediction:
    """The prediction of a network that outputs eps: x_0 by Eq. (9). Undefined at alpha_bar = 0."""
    return Prediction(predict_x0(x_t, eps, level), eps)


def from_x0_output(x_t: Array, x_0: Array, level: Level) -> Prediction:
    """The prediction of a network that outputs x_0: eps by Eq. (9). Undefined at alpha_bar = 1."""
    return Prediction(x_0, predict_eps(x_t, x_0, level))


def from_v_output(x_t: Array, v: Array, level: Level) -> Prediction:
    """The prediction of a network that outputs v. (x_t, v) is a rotation of (x_0, eps). Defined for every alpha_bar."""
    signal, noise = jnp.sqrt(level.alpha_bar), jnp.sqrt(level.one_minus_alpha_bar)
    return Prediction(signal * x_t - noise * v, signal * v + noise * x_t)


SIGMA_DATA = 0.5  # of EDM: the standard deviation of the images


def from_edm_output(x_t: Array, output: Array, level: Level) -> Prediction:
    """The prediction of a network with the preconditioning of EDM (Karras et al. 2022, Eq. 7). Defined for every
    alpha_bar.

    The paper has `x_sigma = x_0 + sigma eps` and `x_0 = c_skip x_sigma + c_out F`, with F the output. Here
    `x_t = sqrt(ab) x_sigma` and `sigma^2 = (1 - ab) / ab`. With sigma_data = d and `n^2 = (1 - ab) + d^2 ab`:
    `x_0 = (d^2 sqrt(ab) x_t / n + d sqrt(1 - ab) F) / n`, `eps = (sqrt(1 - ab) x_t / n - d sqrt(ab) F) / n`.

    With d = 1 this is `from_v_output` of -F.
    """
    signal, noise, scale = jnp.sqrt(level.alpha_bar), jnp.sqrt(level.one_minus_alpha_bar), _edm_scale(level)
    x, d = x_t / scale, SIGMA_DATA
    return Prediction((d**2 * signal * x + d * noise * output) / scale, (noise * x - d * signal * output) / scale)


def _edm_scale(level: Level) -> Array:
    """The standard deviation of x_t if that of x_0 is SIGMA_DATA."""
    return jnp.sqrt(level.one_minus_alpha_bar + SIGMA_DATA**2 * level.alpha_bar)


def _edm_inputs(x_t: Array, time: Array, level: Level) -> tuple[Array, Array]:
    """(c_in x_sigma, c_noise) of EDM: x_t with variance 1, and `ln(sigma) / 4`. Undefined at alpha_bar = 0 and 1."""
    return x_t / _edm_scale(level), jnp.log(level.one_minus_alpha_bar / level.alpha_bar) / 8


class Parametrization(NamedTuple):
    """The relation between a network and a denoiser: the inputs of the network, and the meaning of its output."""

    inputs: Callable[[Array, Array, Level], tuple[Array, Array]]  # (x_t, network time t - 1, level) -> (x, time)
    prediction: Callable[[Array, Array, Level], Prediction]  # (x_t, network output, level) -> Prediction
    undefined: Mapping[int, str] = {}  # alpha_bar, 0 or 1, at which x_0 or eps is undefined -> the reason


_unchanged = lambda x_t, time, level: (x_t, time)

PREDICTIONS = {
    "eps": Parametrization(_unchanged, from_eps_output, {0: "x_0 cannot be computed from eps"}),
    "x0": Parametrization(_unchanged, from_x0_output, {1: "eps cannot be computed from x_0"}),
    "v": Parametrization(_unchanged, from_v_output),
    "edm": Parametrization(
        _edm_inputs, from_edm_output, {0: "sigma of EDM is infinite", 1: "ln(sigma) of EDM is infinite"}
    ),
}


def sigma(eta: Array, transition) -> Array:
    """Eq. (16): `sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)`.

    eta = 0 is DDIM, eta = 1 is DDPM. sigma is differentiable in eta, also at eta = 0. It is exactly 0 for every eta if
    the posterior variance is 0: for the last step (s = 0), and for a step with s > t.
    """
    return _effective(eta, transition) * jnp.sqrt(transition.posterior_variance)


def sigma_squared(eta: Array, transition) -> Array:
    """sigma^2 of Eq. (16), for Eq. (7), (8) and (12).

    At eta = 1 `1 - alpha_bar_s - sigma^2` is never below 0 in float32: both terms are float64 values of the host that
    are rounded once, and rounding is monotone.
    """
    return _effective(eta, transition) ** 2 * transition.posterior_variance


def _effective(eta, transition):
    """eta, or 0 if the posterior variance is 0: a large eta squared may be infinite, and infinity times 0 is NaN."""
    return eta * (transition.posterior_variance > 0)


def max_eta(transitions) -> float:
    """The largest eta with `sigma(eta)^2 <= 1 - alpha_bar_s` in every step. It is at least 1.

    transitions: leaves (S,). For a single step to s = 0 the result is infinite.
    """
    bound, unit = np.asarray(transitions.one_minus_alpha_bar_s), np.asarray(transitions.posterior_variance)
    ratio = np.divide(bound, unit, out=np.full(bound.shape, np.inf), where=unit > 0)
    return float(np.sqrt(ratio.min()))


def check_eta(eta: Array | float, transitions) -> None:
    """Raises ValueError unless eta is in [0, `max_eta`], and 0 if a step has s > t. Runs on the host.

    The value of a traced eta is not checked; above `max_eta` the result is NaN.
    """
    checks.real("eta", eta, 0)
    if checks.traced(eta) or eta == 0 or checks.traced(*transitions):
        return
    if (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
        raise ValueError(f"eta must be 0 for a step with s > t, because encoding is deterministic; got {eta}")
    limit = max_eta(transitions)
    if eta > limit:
        raise ValueError(
            f"eta must be in [0, {limit:.6g}] for this tau, because a larger sigma^2 of Eq. (16) exceeds "
            f"1 - alpha_bar_s; got {eta}"
        )


def direction_variance(transition, sigma2: Array) -> Array:
    """`1 - alpha_bar_s - sigma^2`, the squared coefficient of the "direction pointing to x_t" in Eq. (12).

    It occurs in Eq. (7) and (8) too. A difference that is below 0 by rounding, as at the largest eta, is set to 0. If
    sigma^2 is too large, the result is NaN.
    """
    bound = transition.one_minus_alpha_bar_s
    difference = bound - sigma2
    tolerance = 8 * jnp.finfo(jnp.result_type(difference, jnp.float32)).eps
    return jnp.where(difference >= 0, difference, jnp.where(difference >= -tolerance * bound, 0, jnp.nan))


def root(variance: Array) -> Array:
    """The square root, with derivative 0 at 0: the last step (s = 0) has variance 0 for every eta.

    At the largest eta the left limit of the derivative is infinite; it is set to 0 there too.
    """
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), variance * 0)


def _check_sigma2(sigma2: Array, transition, x: Array) -> None:
    checks.broadcasts("sigma2", checks.reals("sigma2", sigma2, 0), np.shape(x))
    if not checks.traced(sigma2, *transition):
        if (np.asarray(sigma2) > np.asarray(transition.one_minus_alpha_bar_s) * (1 + 1e-6)).any():
            raise ValueError("sigma2 must be at most 1 - alpha_bar_s")


def q_sigma(x_t: Array, x_0: Array, transition, sigma2: Array) -> tuple[Array, Array]:
    """Eq. (7): the mean and the variance of q_sigma(x_s | x_t, x_0).

    `mean = sqrt(alpha_bar_s) x_0 + k (x_t - sqrt(alpha_bar_t) x_0)`,
    `k = sqrt((1 - alpha_bar_s - sigma^2) / (1 - alpha_bar_t))`.

    x_t, x_0: (B, ...).
    sigma2: sigma^2, broadcasts against x_t. Raises ValueError unless `0 <= sigma2 <= 1 - alpha_bar_s`.
    """
    _check_sigma2(sigma2, transition, x_t)
    k = root(direction_variance(transition, sigma2) / transition.one_minus_alpha_bar_t)
    residual = x_t - jnp.sqrt(transition.alpha_bar_t) * x_0
    return jnp.sqrt(transition.alpha_bar_s) * x_0 + k * residual, sigma2


def q_sigma_forward(x_s: Array, x_0: Array, transition, sigma2: Array) -> tuple[Array, Array]:
    """Eq. (8): the mean and the variance of q_sigma(x_t | x_s, x_0), by Bayes' rule from Eq. (7), for s >= 1.

    With `r = (1 - alpha_bar_t) / (1 - alpha_bar_s)` and k of Eq. (7):
    `mean = sqrt(alpha_bar_t) x_0 + k r (x_s - sqrt(alpha_bar_s) x_0)`, `variance = sigma^2 r`.
    Arguments and errors as for `q_sigma`.
    """
    _check_sigma2(sigma2, transition, x_s)
    k = root(direction_variance(transition, sigma2) / transition.one_minus_alpha_bar_t)
    r = transition.one_minus_alpha_bar_t / transition.one_minus_alpha_bar_s
    residual = x_s - jnp.sqrt(transition.alpha_bar_s) * x_0
    return jnp.sqrt(transition.alpha_bar_t) * x_0 + k * r * residual, sigma2 * r


def clip_x0(model: Model, low: float = -1.0, high: float = 1.0, *, keep_eps: bool = False) -> Denoise:
    """A denoiser whose predicted x_0 is clipped to [low, high], for any sampler.

    low, high: scalars. Raises ValueError unless low < high.
    keep_eps: False recomputes eps from the clipped x_0, see `with_x0`. True does not change eps, as clip_sample in
        diffusers.

    The paper does not clip. Most published DDPM samplers do.
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

    The predicted x_0 of each image is clipped to [-s, s] and divided by s. s is the given quantile of |x_0|, clipped to
    [1, maximum].

    quantile: in (0, 1).
    maximum: at least 1.
    keep_eps: as for `clip_x0`.

    Raises ValueError for values outside these ranges.
    """
    checks.real("quantile", quantile, 0, 1, open=True)
    checks.real("maximum", maximum, 1)
    return with_x0(model, Partial(_threshold, quantile, maximum), keep_eps=keep_eps)


def _threshold(quantile, maximum, x_0):
    s = jnp.quantile(jnp.abs(x_0).reshape(x_0.shape[0], -1), quantile, axis=1)
    s = jnp.clip(s, 1, maximum).reshape(-1, *[1] * (x_0.ndim - 1))
    return jnp.clip(x_0, -s, s) / s


def with_x0(model: Model, change: Callable[[Array], Array], *, keep_eps: bool = False) -> Denoise:
    """A denoiser that replaces the predicted x_0 by change(x_0).

    change: a function (B, ...) -> (B, ...), or a pytree, see `checks.function`.
    keep_eps: False recomputes eps from the new x_0 by Eq. (9). True does not change eps.

    At alpha_bar = 1, x_t = x_0 for every prediction: neither x_0 nor eps is changed.
    """
    function = _with_x0_and_same_eps if keep_eps else _with_x0
    return Denoise(function, as_denoise(model), checks.function("change", change))


def _with_x0(model, change, x_t, level):
    prediction = model(x_t, level)
    noisy = level.one_minus_alpha_bar > 0
    safe = level._replace(one_minus_alpha_bar=jnp.where(noisy, level.one_minus_alpha_bar, 1))
    x_0 = change(prediction.x_0)
    eps = predict_eps(x_t, x_0, safe)
    replace = lambda new, old: jnp.where(noisy, new, old)
    return dataclasses.replace(prediction, x_0=replace(x_0, prediction.x_0), eps=replace(eps, prediction.eps))


def _with_x0_and_same_eps(model, change, x_t, level):
    prediction = model(x_t, level)
    x_0 = jnp.where(level.one_minus_alpha_bar > 0, change(prediction.x_0), prediction.x_0)
    return dataclasses.replace(prediction, x_0=x_0)


def with_variance(model: Model, fraction: Array | float) -> Denoise:
    """A denoiser that replaces the predicted variance_fraction by the given one.

    fraction: finite, broadcasts against x_t. 0 is the posterior variance, 1 is beta_t.
    """
    return Denoise(_with_variance, as_denoise(model), checks.reals("fraction", fraction))


def _with_variance(model, fraction, x_t, level):
    checks.broadcasts("fraction", fraction, x_t.shape)
    fraction = jnp.broadcast_to(jnp.asarray(fraction, precision(x_t.dtype)), x_t.shape)
    return dataclasses.replace(model(x_t, level), variance_fraction=fraction)
