"""The objectives: L_gamma of Eq. (5), the training loss, and J_sigma of Eq. (11), the variational bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import checks, gaussian
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import Model, Prediction
from ddim_jax.schedule import Array, Level, Levels, check_levels, level_at, precision
from ddim_jax.trajectory import Transitions


class LossWeight(NamedTuple):
    """gamma_t of Eq. (5), as factor(level) times the squared error of eps, x_0 or v.

    At a noise level the squared errors are multiples of each other: `err_x0^2 = (1 - ab) / ab err_eps^2`,
    `err_v^2 = 1 / ab err_eps^2`. A weight uses the one that is finite and loses no digits. A network trained with any
    gamma > 0 can be used with all samplers (Theorem 1).
    """

    error_of: Callable[[Prediction, Level], Array]  # the quantity whose error is squared: eps, x_0 or v
    factor: Callable[[Level], Array]  # () or (B, 1, ..., 1)


_eps = lambda prediction, level: prediction.eps
_x0 = lambda prediction, level: prediction.x_0
_v = lambda prediction, level: gaussian.predict_v(*prediction, level)
_one = lambda level: jnp.ones_like(level.alpha_bar)


def weight_one() -> LossWeight:
    """`gamma_t = 1`, the choice of the paper: the squared error of eps."""
    return LossWeight(_eps, _one)


def weight_x0() -> LossWeight:
    """`gamma_t = (1 - ab) / ab`: the squared error of x_0."""
    return LossWeight(_x0, _one)


def weight_v() -> LossWeight:
    """`gamma_t = 1 / ab`: the squared error of v (Salimans and Ho 2022)."""
    return LossWeight(_v, _one)


def weight_min_snr(gamma: float = 5.0) -> LossWeight:
    """`gamma_t = min(SNR, gamma) / SNR`, with SNR = ab / (1 - ab) (Hang et al. 2023).

    gamma: above 0. Raises ValueError otherwise.
    """
    checks.real("gamma", gamma, 0, open=True)
    return LossWeight(_v, lambda level: jnp.minimum(level.alpha_bar, gamma * level.one_minus_alpha_bar))


def weight_p2(k: float = 1.0, gamma: float = 1.0) -> LossWeight:
    """`gamma_t = 1 / (k + SNR)^gamma` (Choi et al. 2022, Eq. 8).

    k: above 0. gamma: at least 0. Raises ValueError otherwise.
    """
    checks.real("k", k, 0, open=True)
    checks.real("gamma", gamma, 0)

    def factor(level):
        noise, signal = level.one_minus_alpha_bar, level.alpha_bar
        return signal * (noise / (k * noise + signal)) ** gamma

    return LossWeight(_v, factor)


def weight_edm() -> LossWeight:
    """`gamma_t = (ab + 4 (1 - ab)) / ab`: the squared error of the network output of EDM.

    It is the weight lambda(sigma) of Karras et al. (2022, table 1) with sigma_data = 0.5, times sigma^2.
    """
    return LossWeight(_v, lambda level: level.alpha_bar + level.one_minus_alpha_bar / gaussian.SIGMA_DATA**2)


WEIGHTS = {
    "one": weight_one,
    "x0": weight_x0,
    "v": weight_v,
    "min_snr": weight_min_snr,
    "p2": weight_p2,
    "edm": weight_edm,
}


def as_weight(gamma: LossWeight | Callable[[Level], Array] | str) -> LossWeight:
    """Converts gamma to a `LossWeight`.

    gamma: a `LossWeight`, a name in WEIGHTS, or a function level -> gamma_t. Raises ValueError otherwise.
    """
    if isinstance(gamma, LossWeight):
        return gamma
    if callable(gamma):
        return LossWeight(_v, lambda level: gamma(level) * level.alpha_bar)
    return checks.lookup(WEIGHTS, gamma, "gamma")()


def l_gamma(
    model: Model,
    table: Levels,
    x_0: Array,
    t: Array,
    eps: Array,
    gamma: LossWeight | Callable[[Level], Array] | str = "one",
) -> Array:
    """The terms of Eq. (5), one per image: `gamma_t || eps_theta(x_t) - eps ||^2 / d`, with x_t of Eq. (4).

    model: see `samplers.integrate`.
    table: the output of `schedule.levels`.
    x_0: (B, ...), floating point.
    t: (B,), ints or reals in [1, T].
    eps: N(0, I), (B, ...).
    gamma: a name in WEIGHTS, a `LossWeight`, or a function level -> gamma_t.

    Returns (B,), in the dtype of x_0, at least float32. Each term is divided by the dimension d, as in the code of
    DDPM, so that the gradient norm does not depend on the image size. The mean over the data and over t, uniform in
    1..T, is L_gamma / (T d). Raises ValueError for arguments of other shapes, dtypes or ranges.
    """
    x_0 = checks.batch("x_0", x_0)
    eps, t = checks.floating("eps", eps, x_0.shape), checks.reals("t", t, 1, check_levels(table).num_steps)
    if np.shape(t) != x_0.shape[:1]:
        raise ValueError(f"t must have the shape {x_0.shape[:1]}, got {np.shape(t)}")
    error_of, factor = as_weight(gamma)
    denoise = gaussian.as_denoise(model, x_0.dtype)
    denoise.check(table.alpha_bar_T)
    level = level_at(table, t, x_0)
    x_t = gaussian.q_marginal(x_0, eps, level).astype(x_0.dtype)
    error = error_of(denoise(x_t, level), level) - error_of(Prediction(x_0, eps), level)
    return jnp.mean(factor(level) * error**2, axis=tuple(range(1, x_0.ndim)))


def gamma_exact(transitions: Transitions, sigma2: Array) -> np.ndarray:
    """The weights gamma_t for which Theorem 1 holds, `J_sigma = L_gamma + C`. (S,), on the host in float64.

    The mean of q_sigma(x_s | x_t, x_0) and its mean with the predicted x_0, f, differ by `c (x_0 - f)`,
    `c = sqrt(ab_s) - sqrt((1 - ab_s - sigma^2) ab_t / (1 - ab_t))`,
    so that `gamma_t = c^2 (1 - ab_t) / (2 sigma^2 ab_t)`. For the last step (s = 0), where the decoder is N(f,
    sigma^2), c = 1. The squared error of eps is summed over the dimensions, not averaged.

    transitions: the output of `trajectory.descend`, down to 0.
    sigma2: (S,), above 0; the last one is the variance of the decoder. Raises ValueError otherwise.
    """
    t = tau_lib.check_transitions(transitions)
    sigma2 = _positive(sigma2, t)
    direction = np.maximum(t.one_minus_alpha_bar_s - sigma2, 0)
    c = np.sqrt(t.alpha_bar_s) - np.sqrt(direction * t.alpha_bar_t / t.one_minus_alpha_bar_t)
    return np.where(t.s > 0, c, 1.0) ** 2 * t.one_minus_alpha_bar_t / (2 * sigma2 * t.alpha_bar_t)


def gamma_paper(transitions: Transitions, sigma2: Array, dimension: int) -> np.ndarray:
    """The weights that the paper prints with Theorem 1, `1 / (2 d sigma^2 alpha_bar_t)`, (S,).

    They lack the factors c^2 and 1 - alpha_bar_t of `gamma_exact`, so J_sigma is not L_gamma with these weights. The
    conclusion of the theorem does not depend on them: if every timestep has its own parameters, all gamma > 0 have the
    same optimum.

    sigma2: as for `gamma_exact`.
    dimension: d.
    """
    transitions, d = tau_lib.check_transitions(transitions), checks.integer("dimension", dimension, 1)
    return 1 / (2 * d * _positive(sigma2, transitions) * transitions.alpha_bar_t)


def _positive(sigma2: Array, transitions: Transitions) -> Array:
    sigma2 = checks.reals("sigma2", sigma2, 0, open=True)
    if np.shape(sigma2) not in ((), transitions.t.shape):
        raise ValueError(f"sigma2 must have the shape {transitions.t.shape}, got {np.shape(sigma2)}")
    return sigma2


def decoder_nats(x_0: Array, mean: Array, sigma2: Array) -> Array:
    """`-log N(x_0; mean, sigma^2 I)` in nats, (B,): the decoder of the paper at t = 1, as a density."""
    each = (x_0 - mean) ** 2 / (2 * sigma2) + jnp.log(2 * jnp.pi * sigma2) / 2
    return jnp.sum(each, axis=tuple(range(1, x_0.ndim)))


def decoder_nats_of_pixels(x_0: Array, mean: Array, sigma2: Array) -> Array:
    """The negative log-likelihood of the discretized Gaussian decoder in nats, (B,) (Ho et al. 2020, Eq. 13).

    The probability of a pixel value is the mass of N(mean, sigma^2) in its bin of width 2/255. The first and the last
    bin are unbounded.

    x_0: (B, ...), with the 256 values of `scaling.to_unit`.
    """
    std = jnp.sqrt(sigma2)
    upper, lower = (x_0 - mean + 1 / 255) / std, (x_0 - mean - 1 / 255) / std
    first_bin, last_bin = jax.scipy.special.log_ndtr(upper), jax.scipy.special.log_ndtr(-lower)
    # log(ndtr(upper) - ndtr(lower)), computed in the tail where the difference does not cancel
    left, right = jnp.where(lower > 0, -upper, lower), jnp.where(lower > 0, -lower, upper)
    low, high = jax.scipy.special.log_ndtr(left), jax.scipy.special.log_ndtr(right)
    other_bins = high + jnp.log1p(-jnp.exp(jnp.minimum(low - high, -1e-7)))
    log_mass = jnp.where(x_0 < -0.999, first_bin, jnp.where(x_0 > 0.999, last_bin, other_bins))
    return -jnp.sum(log_mass, axis=tuple(range(1, x_0.ndim)))


DECODERS = {"gaussian": decoder_nats, "pixels": decoder_nats_of_pixels}


def sigma2_of(transitions: Transitions, eta: float) -> np.ndarray:
    """sigma^2 of every step, (S,), on the host: Eq. (16), but `1 - ab_t` for the last step (s = 0).

    There Eq. (16) is 0. For a last step from t = 1 the value is beta_1 of DDPM. eta: see `gaussian.check_eta`. Raises
    ValueError otherwise.
    """
    transitions = tau_lib.check_transitions(transitions)
    gaussian.check_eta(eta, transitions)
    return np.where(transitions.s > 0, gaussian.sigma_squared(eta, transitions), transitions.one_minus_alpha_bar_t)


def j_sigma(
    model: Model, transitions: Transitions, x_0: Array, keys: Array, eta: float = 1.0, decoder: str = "gaussian"
) -> Array:
    """J_sigma of Eq. (11), an upper bound of `-log p(x_0)` in nats, (B,).

    It is a Monte Carlo estimate with one x_t per timestep of
    `E_q[log q_sigma(x_1:T | x_0) - log p(x_0:T)] = KL(q(x_T | x_0) || p(x_T))`
    `+ sum KL(q_sigma(x_s | x_t, x_0) || q_sigma(x_s | x_t, f)) - log p(x_0 | x_1)`.

    model: see `samplers.integrate`.
    transitions: the output of `trajectory.descend`, down to 0, on the host.
    x_0: (B, ...), floating point.
    keys: (B,), one per image, see `samplers.image_keys`.
    eta: above 0, because at 0 q_sigma has no density.
    decoder: "gaussian", or "pixels" for images of 256 values; then `nats / (d log 2)` is in bits per dimension.

    Raises ValueError for an invalid argument.
    """
    checks.lookup(DECODERS, decoder, "decoder")
    checks.real("eta", eta, 0, open=True)  # J_sigma is infinite at eta = 0
    transitions, x_0 = tau_lib.check_transitions(transitions), checks.batch("x_0", x_0)
    tau_lib.check_descends_to_0(transitions)
    tau_lib.check_signal(transitions, "J_sigma")
    keys, sigma2 = checks.keys("keys", keys, x_0.shape[:1]), sigma2_of(transitions, eta)
    steps = transitions, sigma2, gamma_exact(transitions, sigma2)
    return _bound(gaussian.as_denoise(model, x_0.dtype), steps, x_0, keys, decoder)


@functools.partial(jax.jit, static_argnames="decoder")
def _bound(denoise, steps, x_0, keys, decoder):
    x_0 = x_0.astype(precision(x_0.dtype))
    cast = lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(x_0.dtype)
    steps = jax.tree.map(lambda leaf: cast(jnp.asarray(leaf)), steps)
    axes = tuple(range(1, x_0.ndim))
    alpha_bar, one_minus = steps[0].alpha_bar_t[0], steps[0].one_minus_alpha_bar_t[0]
    prior = (alpha_bar * x_0**2 - alpha_bar - jnp.log(one_minus)) / 2

    def body(total, step):
        transition, sigma2, gamma = step
        eps = gaussian.noise(keys, transition.t, x_0.shape[1:], x_0.dtype)
        x_t = gaussian.q_marginal(x_0, eps, transition.level_t)
        predicted = denoise(x_t, transition.level_t)
        kl = gamma * jnp.sum((predicted.eps - eps) ** 2, axis=axes)
        nats = DECODERS[decoder](x_0, predicted.x_0, sigma2)
        return total + jnp.where(transition.s > 0, kl, nats), None

    return jax.lax.scan(body, jnp.sum(prior, axis=axes), steps)[0]
