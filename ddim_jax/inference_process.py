"""The inference process q_sigma(x_1:T | x_0), Eq. (6), sampled in both directions.

`backward` samples from x_T down to x_1 by Eq. (7). `forward` samples from x_1 up to x_T by the non-Markovian forward
process, Eq. (8). Both have the same joint distribution, and every marginal is Eq. (4) (Lemma 1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import checks, gaussian, samplers
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import Denoise
from ddim_jax.schedule import Array, Schedule, precision


def backward(noise_schedule: Schedule, tau: np.ndarray, x_0: Array, key: Array, eta: float = 1.0) -> Array:
    """Samples x_T by Eq. (4), then every x_s by Eq. (7). Returns x at tau[S], ..., tau[1], (S, B, ...).

    It is the generative process with the true x_0 in place of the predicted x_0.

    tau: (S+1,), see `trajectory.check`.
    x_0: (B, ...), floating point.
    key: one key.
    eta: in the range of Eq. (7), see `gaussian.check_eta`. Raises ValueError otherwise.
    """
    x_0 = checks.batch("x_0", x_0)
    keys = samplers.image_keys(key, jnp.arange(len(x_0)))
    eps = samplers.initial_noise(keys, x_0.shape[1:], x_0.dtype)
    transitions = tau_lib.descend(noise_schedule, tau)
    first = jax.tree.map(lambda leaf: leaf[0], samplers.rounded(transitions, precision(x_0.dtype)).level_t)
    x_T = gaussian.q_marginal(x_0, eps, first).astype(x_0.dtype)
    denoise = Denoise(_predict_true_x0, x_0.astype(precision(x_0.dtype)))
    _, path = samplers.trajectory(samplers.ddim(eta), denoise, transitions, x_T, keys)
    return path.x[:-1]


def _predict_true_x0(x_0, x_t, level):
    return gaussian.from_x0_output(x_t, x_0, level)


def forward(noise_schedule: Schedule, tau: np.ndarray, x_0: Array, key: Array, eta: float = 1.0) -> Array:
    """Samples x at tau[1] by Eq. (4), then every x_t by Eq. (8). Returns x at tau[S], ..., tau[1], (S, B, ...).

    Eq. (8) depends on x_0 in addition to x_s, so the process is not a Markov chain. Arguments and errors as for
    `backward`.
    """
    x_0, key = checks.batch("x_0", x_0), checks.keys("key", key, ())
    dtype, x_0 = x_0.dtype, x_0.astype(precision(x_0.dtype))
    transitions = tau_lib.descend(noise_schedule, tau)
    gaussian.check_eta(eta, transitions)
    ascending = samplers.rounded(jax.tree.map(lambda leaf: jnp.asarray(leaf)[::-1], transitions), x_0.dtype)
    draw = lambda t: jax.random.normal(gaussian.level_key(key, t), x_0.shape, x_0.dtype)

    def body(x_s, transition):
        mean, variance = gaussian.q_sigma_forward(x_s, x_0, transition, gaussian.sigma_squared(eta, transition))
        x_t = mean + jnp.sqrt(variance) * draw(transition.t)
        return x_t, x_t

    first, others = jax.tree.map(lambda leaf: leaf[0], ascending), jax.tree.map(lambda leaf: leaf[1:], ascending)
    x_1 = gaussian.q_marginal(x_0, draw(first.t), first.level_t)
    _, x_t = jax.lax.scan(body, x_1, others)
    return jnp.concatenate([x_1[None], x_t])[::-1].astype(dtype)
