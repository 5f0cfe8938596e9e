"""The objectives: L_gamma of Eq. (5), which trains, and J_sigma of Eq. (11), the bound that it stands for."""

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
    """gamma_t of Eq. (5), as `factor(level)` times the squared error of one quantity. The errors of eps, x_0 and v at a
    level are multiples of each other, `err_x0^2 = (1 - ab) / ab err_eps^2` and `err_v^2 = 1 / ab err_eps^2`; the one is
    taken that is finite and does not cancel. One network trained with any gamma > 0 serves all sampling processes
    (Theorem 1).
    """

    error_of: Callable[[Prediction, Level], Array]  # what the error is taken of
    factor: Callable[[Level], Array]  # () or (B, 1, ..., 1)


_eps = lambda prediction, level: prediction.eps
_x0 = lambda prediction, level: prediction.x_0
_v = lambda prediction, level: gaussian.predict_v(*prediction, level)
_one = lambda level: jnp.ones_like(level.alpha_bar)


def weight_one() -> LossWeight:
    """`gamma = 1`, the paper's: the error of eps."""
    return LossWeight(_eps, _one)


def weight_x0() -> LossWeight:
    """`gamma = (1 - ab) / ab`: the error of x_0."""
    return LossWeight(_x0, _one)


def weight_v() -> LossWeight:
    """`gamma = 1 / ab`: the error of v (Salimans and Ho 2022)."""
    return LossWeight(_v, _one)


def weight_min_snr(gamma: float = 5.0) -> LossWeight:
    """`gamma_t = min(SNR, gamma) / SNR`, with SNR = ab / (1 - ab) (Hang et al. 2023). ValueError unless gamma is above
    0.
    """
    checks.real("gamma", gamma, 0, open=True)
    return LossWeight(_v, lambda level: jnp.minimum(level.alpha_bar, gamma * level.one_minus_alpha_bar))


def weight_p2(k: float = 1.0, gamma: float = 1.0) -> LossWeight:
    """`gamma_t = 1 / (k + SNR)^gamma` (Choi et al. 2022, Eq. 8). ValueError unless k is above 0 and gamma at least
    0.
    """
    checks.real("k", k, 0, open=True)
    checks.real("gamma", gamma, 0)

    def factor(level):
        noise, signal = level.one_minus_alpha_bar, level.alpha_bar
        return signal * (noise / (k * noise + signal)) ** gamma

    return LossWeight(_v, factor)


WEIGHTS = {
    "one": weight_one,
    "x0": weight_x0,
    "v": weight_v,
    "min_snr": weight_min_snr,
    "p2": weight_p2,
}


def as_weight(gamma: LossWeight | Callable[[Level], Array] | str) -> LossWeight:
    """The LossWeight itself, or that of a name in WEIGHTS, or of a function: level -> gamma_t. ValueError otherwise."""
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
    """The terms of Eq. (5): `gamma_t || eps_theta(x_t) - eps ||^2 / d`, with x_t of Eq. (4), one for each image.

    model: as in `samplers.integrate`. table: `schedule.levels(...)`. x_0, eps: (B, ...) with eps ~ N(0, I). t: (B,) in
    [1, T]. gamma: a name in WEIGHTS, a `LossWeight`, or a function from a level to gamma_t. Returns (B,) float32.
    Divided by the dimension d, as in DDPM's code, so that gradient norms do not depend on the image size; the mean over
    t uniform in 1..T and over the data is L_gamma / (T d). ValueError for arguments of other shapes, dtypes or ranges.
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
    """The weights for which Theorem 1 holds: `J_sigma = L_gamma + C`, with the error of eps summed over dimensions, not
    averaged. (S,), on the host in float64.

    The means of q_sigma(x_s | x_t, x_0) and of the same with the predicted f differ by `c (x_0 - f)`,
    `c = sqrt(ab_s) - sqrt((1 - ab_s - sigma^2) ab_t / (1 - ab_t))`, so that
    `gamma_t = c^2 (1 - ab_t) / (2 sigma^2 ab_t)`. To the image, where x_0 itself is told by N(f, sigma^2), c is 1.
    transitions: `descend` to 0. sigma2: (S,), above 0; the last is the decoder's variance. ValueError otherwise.
    """
    t = tau_lib.check_transitions(transitions)
    sigma2 = _positive(sigma2, t)
    room = np.maximum(t.one_minus_alpha_bar_s - sigma2, 0)
    c = np.sqrt(t.alpha_bar_s) - np.sqrt(room * t.alpha_bar_t / t.one_minus_alpha_bar_t)
    return np.where(t.s > 0, c, 1.0) ** 2 * t.one_minus_alpha_bar_t / (2 * sigma2 * t.alpha_bar_t)


def gamma_paper(transitions: Transitions, sigma2: Array, dimension: int) -> np.ndarray:
    """The weights that the paper prints with Theorem 1, `1 / (2 d sigma^2 alpha_bar_t)`, (S,). dimension: d.

    They leave c, and 1 - alpha_bar_t, out of `gamma_exact`, so J_sigma is not L_gamma with them. The theorem's use does
    not depend on it: where every level has a network of its own, all gamma > 0 have the same optimum.
    """
    transitions, d = tau_lib.check_transitions(transitions), checks.integer("dimension", dimension, 1)
    return 1 / (2 * d * _positive(sigma2, transitions) * transitions.alpha_bar_t)


def _positive(sigma2: Array, transitions: Transitions) -> Array:
    sigma2 = checks.reals("sigma2", sigma2, 0, open=True)
    if np.shape(sigma2) not in ((), transitions.t.shape):
        raise ValueError(f"sigma2 must have the shape {transitions.t.shape}, got {np.shape(sigma2)}")
    return sigma2


def decoder_nats(x_0: Array, mean: Array, sigma2: Array) -> Array:
    """`-log N(x_0; mean, sigma^2 I)`, the paper's decoder at t = 1, in nats of a density. (B,)"""
    each = (x_0 - mean) ** 2 / (2 * sigma2) + jnp.log(2 * jnp.pi * sigma2) / 2
    return jnp.sum(each, axis=tuple(range(1, x_0.ndim)))


def decoder_nats_of_pixels(x_0: Array, mean: Array, sigma2: Array) -> Array:
    """The same for pixels: minus the log of the Gaussian's mass in each value's bin of width 2/255, the first and the
    last bin open (Ho et al. 2020, Eq. 13). x_0: (B, ...), the 256 values of `scaling.to_unit`. (B,)
    """
    std = jnp.sqrt(sigma2)
    upper, lower = (x_0 - mean + 1 / 255) / std, (x_0 - mean - 1 / 255) / std
    below, above = jax.scipy.special.log_ndtr(upper), jax.scipy.special.log_ndtr(-lower)
    # log(ndtr(upper) - ndtr(lower)), from the side on which it does not cancel
    left, right = jnp.where(lower > 0, -upper, lower), jnp.where(lower > 0, -lower, upper)
    low, high = jax.scipy.special.log_ndtr(left), jax.scipy.special.log_ndtr(right)
    between = high + jnp.log1p(-jnp.exp(jnp.minimum(low - high, -1e-7)))
    log_mass = jnp.where(x_0 < -0.999, below, jnp.where(x_0 > 0.999, above, between))
    return -jnp.sum(log_mass, axis=tuple(range(1, x_0.ndim)))


DECODERS = {"gaussian": decoder_nats, "pixels": decoder_nats_of_pixels}


def sigma2_of(transitions: Transitions, eta: float) -> np.ndarray:
    """sigma^2 of every step, (S,), on the host: Eq. (16), but `1 - ab_t` to the image, where (16) is 0: beta_1 of
    DDPM where the step is from level 1. ValueError for an eta that (16) does not allow.
    """
    transitions = tau_lib.check_transitions(transitions)
    gaussian.check_eta(eta, transitions)
    return np.where(transitions.s > 0, gaussian.sigma_squared(eta, transitions), transitions.one_minus_alpha_bar_t)


def j_sigma(
    model: Model, transitions: Transitions, x_0: Array, keys: Array, eta: float = 1.0, decoder: str = "gaussian"
) -> Array:
    """The objective of Theorem 1, Eq. (11): an upper bound of `-log p(x_0)` in nats, (B,), estimated with one draw of
    every x_t.

    `E_q[log q_sigma(x_1:T | x_0) - log p(x_0:T)] = KL(q(x_T | x_0) || p(x_T)) + sum KL(q_sigma(x_s | x_t, x_0) ||
    q_sigma(x_s | x_t, f)) - log p(x_0 | x_1)`. transitions: `descend` to 0, on the host. x_0: (B, ...). keys: (B,), one
    for each image, as of `samplers.image_keys`. eta: above 0, for at 0 q_sigma is not a density. decoder: "gaussian",
    or "pixels" for images of 256 values; with these `nats / (d log 2)` are bits per dimension. ValueError for another
    eta or decoder, and for what the other arguments cannot be.
    """
    checks.lookup(DECODERS, decoder, "decoder")
    checks.real("eta", eta, 0, open=True)  # at 0 J_sigma is infinite
    transitions, x_0 = tau_lib.check_transitions(transitions), checks.batch("x_0", x_0)
    tau_lib.check_to_image(transitions)
    tau_lib.check_signal(transitions, "J_sigma")
    keys, sigma2 = checks.keys("keys", keys, x_0.shape[:1]), sigma2_of(transitions, eta)
    steps = transitions, sigma2, gamma_exact(transitions, sigma2)
    return _bound(gaussian.as_denoise(model, x_0.dtype), steps, x_0, keys, decoder)


@functools.partial(jax.jit, static_argnames="decoder")
def _bound(denoise, steps, x_0, keys, decoder):
    x_0 = x_0.astype(precision(x_0.dtype))
    floats = lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(x_0.dtype)
    steps = jax.tree.map(lambda leaf: floats(jnp.asarray(leaf)), steps)
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
