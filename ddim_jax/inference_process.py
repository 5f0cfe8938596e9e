"""The inference process q_sigma(x_1:T | x_0), Eq. (6), drawn as a whole: from the top down by Eq. (7), and from the
image up by its non-Markovian forward steps, Eq. (8). Both have one joint law, and every marginal is Eq. (4) (Lemma 1).
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
    """x at tau[S], ..., tau[1], (S, B, ...): x_T by (4), then each by (7) from the one before it.

    It is the generative process with x_0 itself in place of the predicted one. x_0: (B, ...). key: one key. ValueError
    for an eta that (7) does not allow.
    """
    x_0 = checks.batch("x_0", x_0)
    keys = samplers.image_keys(key, jnp.arange(len(x_0)))
    top = samplers.initial_noise(keys, x_0.shape[1:], x_0.dtype)
    transitions = tau_lib.descend(noise_schedule, tau)
    first = jax.tree.map(lambda leaf: leaf[0], samplers.rounded(transitions, precision(x_0.dtype)).level_t)
    x_T = gaussian.q_marginal(x_0, top, first).astype(x_0.dtype)
    known = Denoise(_known, x_0.astype(precision(x_0.dtype)))
    _, path = samplers.trajectory(samplers.ddim(eta), known, transitions, x_T, keys)
    return path.x[:-1]


def _known(x_0, x_t, level):
    return gaussian.from_x0_output(x_t, x_0, level)


def forward(noise_schedule: Schedule, tau: np.ndarray, x_0: Array, key: Array, eta: float = 1.0) -> Array:
    """The same x, in the same order, drawn from the image up: x at tau[1] by (4), then each by (8) from the one below
    it, which needs x_0 too: it is no Markov chain.
    """
    x_0, key = checks.batch("x_0", x_0), checks.keys("key", key, ())
    given, x_0 = x_0.dtype, x_0.astype(precision(x_0.dtype))
    transitions = tau_lib.descend(noise_schedule, tau)
    gaussian.check_eta(eta, transitions)
    upwards = samplers.rounded(jax.tree.map(lambda leaf: jnp.asarray(leaf)[::-1], transitions), x_0.dtype)
    draw = lambda t: jax.random.normal(gaussian.level_key(key, t), x_0.shape, x_0.dtype)

    def body(x_s, transition):
        mean, variance = gaussian.q_sigma_forward(x_s, x_0, transition, gaussian.sigma_squared(eta, transition))
        x_t = mean + jnp.sqrt(variance) * draw(transition.t)
        return x_t, x_t

    lowest, rest = jax.tree.map(lambda leaf: leaf[0], upwards), jax.tree.map(lambda leaf: leaf[1:], upwards)
    first = gaussian.q_marginal(x_0, draw(lowest.t), lowest.level_t)
    _, above = jax.lax.scan(body, first, rest)
    return jnp.concatenate([first[None], above])[::-1].astype(given)
