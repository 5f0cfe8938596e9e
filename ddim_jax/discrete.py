"""The processes for categorical data (Appendix A). x_t is one-hot, (B, ..., K): every position has one of K classes.

`q(x_t | x_0) = Cat(ab_t x_0 + (1 - ab_t) / K)`: a position keeps its class with probability ab_t, else a class is drawn
from the uniform distribution. Here sigma is the weight of x_t in the distribution of x_s. So the largest sigma gives
the least stochastic process, the discrete DDIM; this is the opposite of the Gaussian case.

A network, `LogProbsFn`, predicts the class of every position of x_0. `from_log_probs` converts it to a denoiser, and
`DiscreteDDIM` is a sampler for `samplers.integrate`. Given x_t, the positions are predicted and sampled independently.
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

# (x_t (B, ..., K), t) -> log f_theta (B, ..., K); t: see `gaussian.Denoise`
LogProbsFn = Callable[[Array, Array], Array]


@register_pytree_node_class
class _FromLogProbs(Denoise):
    """args: (log_probs_fn,). Static: the dtype in which log_probs_fn gets x_t."""

    def __init__(self, log_probs_fn: LogProbsFn, dtype):
        self.args, self.dtype = [checks.function("log_probs_fn", log_probs_fn)], dtype

    def __call__(self, x_t, level):
        x = x_t if self.dtype is None else x_t.astype(self.dtype)
        log_probs = checks.output("log_probs_fn", self.args[0](x, level.t), x_t).astype(precision(x_t.dtype))
        return Categorical(jnp.exp(log_probs), log_probs)

    def tree_flatten(self):
        return self.args, self.dtype

    @classmethod
    def tree_unflatten(cls, dtype, children):
        self = object.__new__(cls)
        self.args, self.dtype = list(children), dtype
        return self


class Categorical(NamedTuple):
    """The network's prediction at x_t."""

    x_0: Array  # (B, ..., K): the probabilities f_theta(x_t)
    log_x_0: Array  # (B, ..., K): their logarithms


def from_log_probs(log_probs_fn: LogProbsFn, dtype: jnp.dtype | None = None) -> Denoise:
    """The denoiser of a function (x_t, t) -> log f_theta, for `DiscreteDDIM`. Its prediction is a `Categorical`.

    log_probs_fn: a plain function or a pytree, see `checks.function`.
    dtype: see `gaussian.from_eps`.
    """
    return _FromLogProbs(log_probs_fn, dtype)


def q_marginal(x_0: Array, level: Level) -> Array:
    """The probabilities of q(x_t | x_0), `alpha_bar_t x_0 + (1 - alpha_bar_t) / K`. (B, ..., K)"""
    return level.alpha_bar * x_0 + level.one_minus_alpha_bar / x_0.shape[-1]


def sigma_limit(transition: Transition) -> Array:
    """The largest sigma, `(1 - alpha_bar_s) / (1 - alpha_bar_t)`: for a larger sigma a probability would be negative.

    The other bound, alpha_bar_s / alpha_bar_t, is above 1 if s < t.
    """
    return transition.one_minus_alpha_bar_s / transition.one_minus_alpha_bar_t


def posterior(x_t: Array, x_0: Array, transition: Transition, sigma: Array) -> Array:
    """The probabilities of q_sigma(x_s | x_t, x_0), (B, ..., K).

    `sigma x_t + (ab_s - sigma ab_t) x_0 + ((1 - ab_s) - (1 - ab_t) sigma) / K`. The marginal is the same for every
    sigma.

    x_0: one-hot, or the probabilities f_theta(x_t): then the result is p(x_s | x_t).
    sigma: in [0, `sigma_limit`].
    """
    alpha_bar_s, alpha_bar_t = transition.alpha_bar_s, transition.alpha_bar_t
    uniform = transition.one_minus_alpha_bar_s - sigma * transition.one_minus_alpha_bar_t
    return sigma * x_t + (alpha_bar_s - sigma * alpha_bar_t) * x_0 + jnp.maximum(uniform, 0) / x_0.shape[-1]


def draw(probabilities: Array, noise: Array) -> Array:
    """One-hot samples of a categorical distribution, by the Gumbel-max trick. (..., K)

    noise: N(0, I) of the shape of probabilities.
    """
    gumbel = -jnp.log(-jax.scipy.special.log_ndtr(noise))  # ndtr(noise) is uniform in (0, 1)
    return _one_hot(jnp.log(probabilities) + gumbel)


def initial(keys: Array, shape: tuple[int, ...]) -> Array:
    """x_T (B, ..., K), one-hot, uniformly distributed over the classes.

    keys: (B,).
    shape: (..., K). Raises ValueError if K is below 2.
    """
    checks.integer("the number of classes, shape[-1],", shape[-1] if len(shape) else 0, 2)
    return _one_hot(samplers.initial_noise(keys, shape))


def _one_hot(scores: Array) -> Array:
    return jax.nn.one_hot(jnp.argmax(scores, axis=-1), scores.shape[-1], dtype=scores.dtype)


class DiscreteDDIM(NamedTuple):
    """The sampler p(x_s | x_t) with sigma = fraction * `sigma_limit`.

    fraction: in [0, 1]. 1 is the discrete DDIM. With 0, x_s depends on x_t only through the predicted x_0.
    """

    fraction: Array | float = 1.0

    order = 1
    calls_per_step = 1
    min_steps = 1

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, transitions: Transitions) -> None:
        checks.real("fraction", self.fraction, 0, 1)
        if not checks.traced(*transitions) and (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
            raise ValueError(
                "transitions must descend: discrete_ddim cannot ascend, because a stochastic sampler cannot encode"
            )

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        x_0 = denoise(x_t, transition.level_t).x_0
        return draw(posterior(x_t, x_0, transition, self.fraction * sigma_limit(transition)), noise), state


def discrete_ddim(fraction: float = 1.0) -> DiscreteDDIM:
    """The family of samplers over sigma, see `DiscreteDDIM`. Raises ValueError for a fraction outside [0, 1]."""
    return DiscreteDDIM(checks.real("fraction", fraction, 0, 1))


def cross_entropy(log_probs_fn: LogProbsFn, x_0: Array, t: Array, level: Level, noise: Array) -> Array:
    """The training loss: `-log f_theta(x_t)[x_0]` with x_t ~ q(x_t | x_0), averaged over the positions, (B,).

    It is `classification_bound` without the weight.

    x_0: one-hot, (B, ..., K).
    t: (B,), and level: its noise level.
    noise: N(0, I) of the shape of x_0.
    """
    x_t = draw(q_marginal(x_0, level), noise)
    return -jnp.mean(jnp.sum(x_0 * log_probs_fn(x_t, t), axis=-1), axis=tuple(range(1, x_0.ndim - 1)))


def kl(x_t: Array, x_0: Array, log_probs: Array, transition: Transition, sigma: Array) -> Array:
    """`KL(q_sigma(x_s | x_t, x_0) || p(x_s | x_t))` in nats, summed over the positions, (B,).

    x_t, x_0: one-hot, (B, ..., K).
    log_probs: log f_theta(x_t), (B, ..., K).
    """
    q = posterior(x_t, x_0, transition, sigma)
    p = posterior(x_t, jnp.exp(log_probs), transition, sigma)
    terms = jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1)) - jnp.log(p)), 0)
    return jnp.sum(terms, axis=tuple(range(1, x_0.ndim)))


def classification_bound(x_0: Array, log_probs: Array, transition: Transition, sigma: Array) -> Array:
    """`(ab_s - sigma ab_t) KL(x_0 || f_theta)`, (B,). An upper bound of `kl`, because KL is convex."""
    weight = transition.alpha_bar_s - sigma * transition.alpha_bar_t
    return -weight * jnp.sum(x_0 * log_probs, axis=tuple(range(1, x_0.ndim)))


def j_sigma(
    log_probs_fn: LogProbsFn, transitions: Transitions, x_0: Array, keys: Array, fraction: float = 1.0
) -> Array:
    """An upper bound of `-log p(x_0)` in nats, (B,): Eq. (11) for categorical data.

    It is a Monte Carlo estimate with one x_t per timestep.

    transitions: the output of `trajectory.descend`, down to 0.
    x_0: one-hot, (B, ..., K).
    keys: (B,), one per image.
    fraction: see `DiscreteDDIM`.

    Raises ValueError for an invalid argument.
    """
    x_0 = checks.batch("x_0", x_0)
    denoise = from_log_probs(log_probs_fn, x_0.dtype)
    sampler, denoise, transitions, x_0, keys = samplers.checked(DiscreteDDIM(fraction), denoise, transitions, x_0, keys)
    tau_lib.check_descends_to_0(transitions)
    return _bound(denoise, transitions, x_0, keys, sampler.fraction)


@jax.jit
def _bound(denoise, transitions, x_0, keys, fraction):
    x_0 = x_0.astype(precision(x_0.dtype))
    transitions = samplers.rounded(transitions, x_0.dtype)
    q_T = q_marginal(x_0, jax.tree.map(lambda leaf: leaf[0], transitions.level_t))
    prior = jnp.sum(q_T * jnp.log(q_T * x_0.shape[-1]), axis=tuple(range(1, x_0.ndim)))

    def body(total, transition):
        noise = gaussian.noise(keys, transition.t, x_0.shape[1:], x_0.dtype)
        x_t = draw(q_marginal(x_0, transition.level_t), noise)
        # For the last step (s = 0) q is x_0, and the KL divergence is -log f_theta(x_t)[x_0].
        log_probs, sigma = denoise(x_t, transition.level_t).log_x_0, fraction * sigma_limit(transition)
        nats = -jnp.sum(x_0 * log_probs, axis=tuple(range(1, x_0.ndim)))
        return total + jnp.where(transition.s > 0, kl(x_t, x_0, log_probs, transition, sigma), nats), None

    return jax.lax.scan(body, prior, transitions)[0]
