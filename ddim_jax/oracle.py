"""The optimal eps in closed form for data with a known distribution, for exact tests and fast experiments.

If the data are a mixture of Gaussians, x_t is one too, and
`eps(x, t) = E[eps | x_t = x] = -sqrt(1 - alpha_bar_t) grad log q(x)` minimizes Eq. (5). Each function returns an eps_fn
(a `jax.tree_util.Partial`) for a schedule.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddim_jax import checks
from ddim_jax.gaussian import EpsFn
from ddim_jax.schedule import Array, Schedule, level_at, levels, precision


def gaussian(noise_schedule: Schedule, mean: Array = 0.0, std: Array = 1.0) -> EpsFn:
    """The optimal eps for data N(mean, diag(std^2)).

    `eps(x, t) = sqrt(1 - ab_t) (x - sqrt(ab_t) mean) / (ab_t std^2 + 1 - ab_t)`.

    mean, std: broadcast against one sample (...). std is at least 0.
    """
    mean, std = np.asarray(checks.reals("mean", mean)), np.asarray(checks.reals("std", std, 0))
    return Partial(_gaussian_eps, levels(noise_schedule), mean, std)


def _gaussian_eps(table, mean, std, x, t):
    x = x.astype(precision(x.dtype))
    for name, value in (("mean", mean), ("std", std)):
        checks.broadcasts(name, value, x.shape[1:])
    level = level_at(table, t, x)
    mean, std = (jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape[1:])[None] for value in (mean, std))
    centered = x - jnp.sqrt(level.alpha_bar) * mean
    return jnp.sqrt(level.one_minus_alpha_bar) * centered / (level.alpha_bar * std**2 + level.one_minus_alpha_bar)


def mixture(noise_schedule: Schedule, means: Array, stds: Array, weights: Array | None = None) -> EpsFn:
    """The optimal eps for a mixture of K Gaussians N(means[k], stds[k]^2 I) with the weights[k].

    `eps(x, t) = sqrt(1 - ab_t) sum_k r_k (x - sqrt(ab_t) m_k) / v_k`, `v_k = ab_t s_k^2 + 1 - ab_t`,
    with the responsibilities `r_k = softmax_k(log w_k - d/2 log v_k - |x - sqrt(ab_t) m_k|^2 / (2 v_k))`.

    means: (K, ...).
    stds: (K,), each at least 0. If one is 0, t must be at least 1.
    weights: (K,), each at least 0; default: equal. They are normalized.

    Raises ValueError for other shapes and values.
    """
    means, stds = np.asarray(checks.reals("means", means)), np.asarray(checks.reals("stds", stds, 0))
    if not means.ndim or not means.size:
        raise ValueError(f"means must have the shape (K, ...), K at least 1, got {means.shape}")
    weights = np.ones(len(means)) if weights is None else np.asarray(checks.reals("weights", weights, 0))
    if not weights.sum() > 0:
        raise ValueError("weights must not all be 0")
    weights = weights / weights.sum()
    if not stds.shape == weights.shape == means.shape[:1]:
        raise ValueError(
            f"means {means.shape}, stds {stds.shape} and weights {weights.shape} must have the same first axis"
        )
    with np.errstate(divide="ignore"):  # log(0) = -inf: a component of weight 0 has responsibility 0
        return Partial(_mixture_eps, levels(noise_schedule), means, stds, np.log(weights))


def finite(noise_schedule: Schedule, data: Array) -> EpsFn:
    """The optimal eps for the empirical distribution of a data set, that of a network that memorizes it. For t >= 1.

    data: (N, ...).
    """
    return mixture(noise_schedule, data, np.zeros(len(data)))


def _mixture_eps(table, means, stds, log_weights, x, t):
    x = x.astype(precision(x.dtype))
    means, stds, log_weights = (jnp.asarray(value, x.dtype) for value in (means, stds, log_weights))
    flat, centers = x.reshape(len(x), 1, -1), means.reshape(1, len(means), -1)  # (B, 1, d), (1, K, d)
    stds, log_weights = stds[None, :, None], log_weights[None, :, None]  # (1, K, 1)
    level = level_at(table, t, flat)  # () or (B, 1, 1)
    variance = level.alpha_bar * stds**2 + level.one_minus_alpha_bar
    centered = flat - jnp.sqrt(level.alpha_bar) * centers  # (B, K, d)
    distance = jnp.sum(centered**2, axis=-1, keepdims=True)  # (B, K, 1)
    logits = log_weights - flat.shape[-1] / 2 * jnp.log(variance) - distance / (2 * variance)
    responsibility = jax.nn.softmax(logits, axis=1)
    return (
        jnp.sqrt(level.one_minus_alpha_bar) * jnp.sum(responsibility * centered / variance, axis=1, keepdims=True)
    ).reshape(x.shape)
