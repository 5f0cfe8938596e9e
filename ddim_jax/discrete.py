"""Appendix A: the family for categorical data. x_t is one-hot, (B, ..., K): each place has one of K classes.

`q(x_t | x_0) = Cat(ab_t x_0 + (1 - ab_t) / K)`: a place keeps its class with probability ab_t, else it is drawn anew.
Here sigma is the probability that x_s is x_t itself, so that, other than for Gaussians, the largest sigma is the least
stochastic process: the discrete DDIM.

A network, `LogProbsFn`, predicts the class of every place of x_0. `from_log_probs` makes a denoiser of it, and
`DiscreteDDIM` runs under `samplers.integrate` as any sampler. Given x_t the network's places are independent, and are
drawn so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_pytree_node_class

from ddim_jax import checks, gaussian, samplers
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import Denoise
from ddim_jax.schedule import Array, Level, precision
from ddim_jax.trajectory import Transition, Transitions

LogProbsFn = Callable[[Array, Array], Array]  # (x_t (B, ..., K), t () or (B,)) -> log f_theta (B, ..., K)


@register_pytree_node_class
class _FromLogProbs(Denoise):
    """args: (log_probs_fn,). static: the dtype that it is given."""

    def __init__(self, log_probs_fn: LogProbsFn, dtype):
        self.args, self.dtype = [checks.function("log_probs_fn", log_probs_fn)], dtype

    def __call__(self, x_t, level):
        given = x_t if self.dtype is None else x_t.astype(self.dtype)
        found = checks.output("log_probs_fn", self.args[0](given, level.t), x_t).astype(precision(x_t.dtype))
        return Categorical(jnp.exp(found), found)

    def tree_flatten(self):
        return self.args, self.dtype

    @classmethod
    def tree_unflatten(cls, dtype, children):
        self = object.__new__(cls)
        self.args, self.dtype = list(children), dtype
        return self


class Categorical(NamedTuple):
    """What a network predicts of x_t."""

    x_0: Array  # (B, ..., K): probabilities f_theta
    log_x_0: Array  # their logarithms


def from_log_probs(log_probs_fn: LogProbsFn, dtype: jnp.dtype | None = None) -> Denoise:
    """The denoiser of a function (x_t, t) -> log f_theta, for `DiscreteDDIM`: its prediction is a `Categorical`. A
    plain function or a pytree; dtype: as of `gaussian.from_eps`.
    """
    return _FromLogProbs(log_probs_fn, dtype)


def q_marginal(x_0: Array, level: Level) -> Array:
    """Probabilities of q(x_t | x_0), `alpha_bar_t x_0 + (1 - alpha_bar_t) / K`."""
    return level.alpha_bar * x_0 + level.one_minus_alpha_bar / x_0.shape[-1]


def sigma_limit(transition: Transition) -> Array:
    """The largest sigma, `(1 - alpha_bar_s) / (1 - alpha_bar_t)`: beyond it a class would be less likely than never.
    (The other bound, alpha_bar_s / alpha_bar_t, is above 1 where s < t.)
    """
    return transition.one_minus_alpha_bar_s / transition.one_minus_alpha_bar_t


def posterior(x_t: Array, x_0: Array, transition: Transition, sigma: Array) -> Array:
    """Probabilities of q_sigma(x_s | x_t, x_0), for `0 <= sigma <= sigma_limit`; with the network's x_0 those of
    p(x_s | x_t).

    `sigma x_t + (ab_s - sigma ab_t) x_0 + ((1 - ab_s) - (1 - ab_t) sigma) / K`. It keeps the marginal for every sigma.
    """
    alpha_bar_s, alpha_bar_t = transition.alpha_bar_s, transition.alpha_bar_t
    anew = transition.one_minus_alpha_bar_s - sigma * transition.one_minus_alpha_bar_t
    return sigma * x_t + (alpha_bar_s - sigma * alpha_bar_t) * x_0 + jnp.maximum(anew, 0) / x_0.shape[-1]


def draw(probabilities: Array, noise: Array) -> Array:
    """One-hot draws, by Gumbel's maximum, of noise ~ N(0, I) of the same shape (..., K)."""
    gumbel = -jnp.log(-jax.scipy.special.log_ndtr(noise))  # ndtr(noise) is uniform
    return _one_hot(jnp.log(probabilities) + gumbel)


def initial(keys: Array, shape: tuple[int, ...]) -> Array:
    """x_T (B, ..., K), every class as likely, of (B,) keys. shape: (..., K). ValueError for fewer than 2 classes."""
    checks.integer("the number of classes, shape[-1],", shape[-1] if len(shape) else 0, 2)
    return _one_hot(samplers.initial_noise(keys, shape))


def _one_hot(scores: Array) -> Array:
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=scores.dtype)


class DiscreteDDIM(NamedTuple):
    """p(x_s | x_t) with sigma a share of its limit: 1 is discrete DDIM, 0 forgets x_t but for the predicted x_0."""

    share: Array | float = 1.0

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, transitions: Transitions) -> None:
        checks.real("share", self.share, 0, 1)
        if not checks.traced(*transitions) and (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
            raise ValueError("transitions must descend, discrete_ddim cannot ascend: a draw cannot be encoded")

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        x_0 = denoise(x_t, transition.level_t).x_0
        return draw(posterior(x_t, x_0, transition, self.share * sigma_limit(transition)), noise), state


def discrete_ddim(share: float = 1.0) -> DiscreteDDIM:
    """The family over sigma. ValueError for a share outside [0, 1]."""
    return DiscreteDDIM(checks.real("share", share, 0, 1))


def cross_entropy(log_probs_fn: LogProbsFn, x_0: Array, t: Array, level: Level, noise: Array) -> Array:
    """`-log f_theta(x_t)[x_0]`, the mean over places, (B,), with x_t ~ q(x_t | x_0): what trains, the bound of
    `classification_bound` without its weight. noise: N(0, I), shaped like x_0.
    """
    x_t = draw(q_marginal(x_0, level), noise)
    return -jnp.mean(jnp.sum(x_0 * log_probs_fn(x_t, t), axis=-1), axis=tuple(range(1, x_0.ndim - 1)))


def kl(x_t: Array, x_0: Array, log_probs: Array, transition: Transition, sigma: Array) -> Array:
    """`KL(q_sigma(x_s | x_t, x_0) || p(x_s | x_t))` in nats, summed over places, (B,)."""
    q = posterior(x_t, x_0, transition, sigma)
    p = posterior(x_t, jnp.exp(log_probs), transition, sigma)
    each = jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1)) - jnp.log(p)), 0)
    return jnp.sum(each, axis=tuple(range(1, x_0.ndim)))


def classification_bound(x_0: Array, log_probs: Array, transition: Transition, sigma: Array) -> Array:
    """`(ab_s - sigma ab_t) KL(x_0 || f_theta)`, (B,), never below `kl`, because KL is convex."""
    weight = transition.alpha_bar_s - sigma * transition.alpha_bar_t
    return -weight * jnp.sum(x_0 * log_probs, axis=tuple(range(1, x_0.ndim)))


def j_sigma(log_probs_fn: LogProbsFn, transitions: Transitions, x_0: Array, keys: Array, share: float = 1.0) -> Array:
    """An upper bound of `-log p(x_0)` in nats, (B,), estimated with one draw of every x_t: Eq. (11) for this family.

    transitions: `descend` to 0. keys: (B,), one for each x_0. share: of the limit of sigma, see `DiscreteDDIM`.
    ValueError for what these cannot be.
    """
    x_0 = checks.batch("x_0", x_0)
    denoise = from_log_probs(log_probs_fn, x_0.dtype)
    sampler, denoise, transitions, x_0, keys = samplers.checked(DiscreteDDIM(share), denoise, transitions, x_0, keys)
    tau_lib.check_to_image(transitions)
    return _bound(denoise, transitions, x_0, keys, sampler.share)


@jax.jit
def _bound(denoise, transitions, x_0, keys, share):
    x_0 = x_0.astype(precision(x_0.dtype))
    transitions = samplers.rounded(transitions, x_0.dtype)
    top = q_marginal(x_0, jax.tree.map(lambda leaf: leaf[0], transitions.level_t))
    prior = jnp.sum(top * jnp.log(top * x_0.shape[-1]), axis=tuple(range(1, x_0.ndim)))

    def body(total, transition):
        noise = gaussian.noise(keys, transition.t, x_0.shape[1:], x_0.dtype)
        x_t = draw(q_marginal(x_0, transition.level_t), noise)
        # To the image q is x_0 itself, and KL what the network pays for it.
        log_probs, sigma = denoise(x_t, transition.level_t).log_x_0, share * sigma_limit(transition)
        nats = -jnp.sum(x_0 * log_probs, axis=tuple(range(1, x_0.ndim)))
        return total + jnp.where(transition.s > 0, kl(x_t, x_0, log_probs, transition, sigma), nats), None

    return jax.lax.scan(body, prior, transitions)[0]
