"""The generative processes of the paper and the one loop that runs them.

A sampler knows a single step from level t to level s. `integrate` scans it over the transitions of a tau.
Anything with the three methods of `Sampler` and registered as a pytree runs under the same loop; a NamedTuple
is the short way to write one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddim_jax import gaussian
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import EpsFn
from ddim_jax.schedule import Array, Level, Schedule
from ddim_jax.trajectory import Transition, Transitions


class Sampler(Protocol):
    """A pytree whose leaves are its hyper-parameters: they are traced, so a new value compiles nothing."""

    @property
    def stochastic(self) -> bool:
        """Whether `step` reads noise. Known on the host, before tracing."""

    def check(self, transitions: Transitions) -> None:
        """Raises ValueError where the hyper-parameters do not fit the transitions. On the host, before tracing."""

    def init(self, x: Array) -> Any:
        """The state before the first step, a pytree. A multistep method makes its first step first order by it."""

    def step(
        self, x_t: Array, state: Any, transition: Transition, eps_fn: EpsFn, noise: Array | None
    ) -> tuple[Array, Any]:
        """(x_s, state) from x_t (B, ...). Pure; draws nothing: noise ~ N(0, I) is an argument, None if not
        stochastic.
        """


class DDIM(NamedTuple):
    """Eq. (12) with the sigma of Eq. (16)."""

    eta: Array | float = 0.0

    @property
    def stochastic(self) -> bool:
        return _traced(self.eta) or bool(self.eta != 0)

    def check(self, transitions: Transitions) -> None:
        if _traced(self.eta, *transitions):
            return
        if not self.eta >= 0:
            raise ValueError(f"eta must be at least 0, got {self.eta}")
        ascending = np.asarray(transitions.s) > np.asarray(transitions.t)
        if self.eta > 0 and ascending.any():
            raise ValueError(f"eta must be 0 where a step ascends (encoding is deterministic), got {self.eta}")
        limit = max_eta(transitions)
        if self.eta > limit:
            raise ValueError(
                f"eta must be in [0, {limit:.6g}] for this tau: beyond, sigma^2 of Eq. (16) exceeds "
                f"1 - alpha_bar_s; got {self.eta}"
            )

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, eps_fn, noise):
        eps = eps_fn(x_t, transition.t)
        x_0 = gaussian.predict_x0(x_t, eps, transition.level_t)  # (9)
        sigma2 = gaussian.sigma_squared(self.eta, transition)  # (16)
        x_s = jnp.sqrt(transition.alpha_bar_s) * x_0 + jnp.sqrt(transition.one_minus_alpha_bar_s - sigma2) * eps  # (12)
        return x_s if noise is None else x_s + jnp.sqrt(sigma2) * noise, state


class DDPMHat(NamedTuple):
    """The sigma-hat of section 5: the mean keeps sigma(eta = 1), the noise is larger,
    `sqrt(1 - alpha_bar_t / alpha_bar_s)`.

    With s = t - 1 this is DDPM with the variance beta_t (Ho et al. 2020, section 3.2). No noise in the last step.
    """

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, transitions: Transitions) -> None:
        if not _traced(*transitions) and (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
            raise ValueError("ddpm_hat cannot ascend: encoding is deterministic")

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, eps_fn, noise):
        mean, _ = DDIM(eta=1.0).step(x_t, state, transition, eps_fn, noise=None)
        variance = jnp.where(transition.s > 0, transition.beta, 0)
        return mean + jnp.sqrt(variance) * noise, state


def ddim(eta: float = 0.0) -> DDIM:
    """The family of Eq. (12) and (16): eta = 0 is deterministic DDIM, eta = 1 is DDPM. ValueError if eta < 0."""
    if not _traced(eta) and not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    return DDIM(eta)


def ddpm() -> DDIM:
    """DDPM with the posterior variance: `ddim(eta=1)`."""
    return DDIM(eta=1.0)


def ddpm_hat() -> DDPMHat:
    """DDPM with the larger variance, the row sigma-hat of the paper's tables."""
    return DDPMHat()


def max_eta(transitions: Transitions) -> float:
    """The largest eta with `sigma(eta)^2 <= 1 - alpha_bar_s` in every step: at least 1, infinite for a single step."""
    bound, unit = np.asarray(transitions.one_minus_alpha_bar_s), np.asarray(transitions.posterior_variance)
    ratio = np.divide(bound, unit, out=np.full(bound.shape, np.inf), where=unit > 0)
    return float(np.sqrt(ratio.min()))


class Trajectory(NamedTuple):
    """All that a run went through, for S steps."""

    x: Array  # (S+1, B, ...): x_T first, the final image last
    x_0: Array  # (S, B, ...): the x_0 predicted in each step, Eq. (9)


def integrate(sampler: Sampler, eps_fn: EpsFn, transitions: Transitions, x: Array, key: Array | None = None) -> Array:
    """Runs a sampler over all transitions and returns the last x: x_0 for `descend`, x_T for `ascend`.

    sampler: see `Sampler`. eps_fn: (x_t, t) -> eps; to change parameters without compiling again, a
    `jax.tree_util.Partial` that holds them; a plain function is compiled once per function. transitions: leaves
    (S,). x: (B, ...). key: one key, from which image i of the batch gets `fold_in(key, i)`, or (B,) keys, see
    `image_keys`. The noise of an image depends on its own key and on the level alone. Without a key nothing is
    drawn: ValueError if the sampler is stochastic. Memory does not grow with S, and a new S is the only thing
    that compiles again.
    """
    return run(sampler, eps_fn, transitions, x, key)[0]


def run(
    sampler: Sampler, eps_fn: EpsFn, transitions: Transitions, x: Array, key: Array | None = None
) -> tuple[Array, Any]:
    """`integrate` that also returns the sampler's last state: what it has to tell of the run."""
    return _run(sampler, eps_fn, transitions, x, key)[0]


def trajectory(
    sampler: Sampler,
    eps_fn: EpsFn,
    transitions: Transitions,
    x: Array,
    key: Array | None = None,
    predict: Callable[[Array, Array, Level], Array] = gaussian.predict_x0,
) -> tuple[Array, Trajectory]:
    """`integrate` that also returns every x_t and every predicted x_0. The same run; memory grows with S.

    predict: (x_t, what the network says of it, level) -> x_0: Eq. (9), where it says eps.
    """
    (last, _), (states, x_0) = _run(sampler, eps_fn, transitions, x, key, predict)
    return last, Trajectory(jnp.concatenate([jnp.asarray(x)[None], states]), x_0)


def invert(
    eps_fn: EpsFn,
    noise_schedule: Schedule,
    tau: np.ndarray,
    x_0: Array,
    evaluate_at: str = "current",
    end: int = 0,
) -> Array:
    """Encodes images into latents: Eq. (13) integrated from 0 to tau[S], the steps of tau upwards. Returns x_T
    (B, ...).

    Deterministic, one network call a step; not the noising process (4). `integrate(ddim(0.), ...)` over `descend`
    of the same tau decodes, with an error that falls like 1/S. evaluate_at: the level that the network is told in
    the step t -> s, s > t: "current", t, the level that x is at (explicit Euler), or "next", s, as in other
    implementations. end: the level of x_0 that tau begins with.
    """
    transitions = tau_lib.ascend(noise_schedule, tau, end)
    told = {"current": transitions.t, "next": transitions.s}
    if evaluate_at not in told:
        raise ValueError(f"evaluate_at must be one of {', '.join(told)}, got {evaluate_at!r}")
    return integrate(ddim(0.0), eps_fn, transitions._replace(t=told[evaluate_at]), x_0)


def image_keys(key: Array, index: Array) -> Array:
    """One key per image: `fold_in(key, i)` for i in index (B,). Image i then depends on (seed, i) and nothing else."""
    return jax.vmap(jax.random.fold_in, (None, 0))(_typed(key), jnp.asarray(index))


def initial_noise(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """x_T ~ N(0, I), (B, *shape), from (B,) keys. It is the noise of level 0, a level that no step leaves."""
    return gaussian.noise(keys, 0, shape, dtype)


def _run(sampler, eps_fn, transitions, x, key, predict=None):
    eps_fn, x, keys = checked(sampler, eps_fn, transitions, x, key)
    return _scan(sampler, eps_fn, transitions, x, keys, predict=predict)


def checked(
    sampler: Sampler, eps_fn: EpsFn, transitions: Transitions, x: Array, key: Array | None
) -> tuple[Partial, Array, Array | None]:
    """What a loop over a sampler's steps begins with: eps_fn as a pytree, x as an array, and (B,) keys, or None.
    ValueError, see `integrate`.
    """
    sampler.check(transitions)
    x = jnp.asarray(x)
    if key is None and sampler.stochastic:
        raise ValueError(f"{sampler} is stochastic and needs a key")
    if key is not None:
        key = _typed(key)
        key = key if key.ndim else image_keys(key, jnp.arange(x.shape[0]))
        if key.shape != x.shape[:1]:
            raise ValueError(f"key must be one key or one for each of the {x.shape[0]} images, got shape {key.shape}")
    if jax.tree_util.all_leaves([eps_fn]):  # a plain function is no pytree yet
        eps_fn = Partial(eps_fn)
    return eps_fn, x, key


def rounded(transitions: Transitions, dtype: jnp.dtype) -> Transitions:
    """The transitions in the precision of x; levels that are ints stay so."""
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype), transitions
    )


@jax.jit(static_argnames="predict")
def _scan(sampler, eps_fn, transitions, x, keys, *, predict):
    transitions = rounded(transitions, x.dtype)

    def body(carry, transition):
        x_t, state = carry
        said = []  # what the network said in this step; the first word is about x_t

        def heard(x, t):
            said.append(eps_fn(x, t))
            return said[-1]

        noise = None if keys is None else gaussian.noise(keys, transition.t, x.shape[1:], x.dtype)
        x_s, state = sampler.step(x_t, state, transition, heard, noise)
        kept = None if predict is None else (x_s, predict(x_t, said[0], transition.level_t))
        return (x_s.astype(x.dtype), state), kept

    return jax.lax.scan(body, (x, sampler.init(x)), transitions)


def _typed(key):
    """A typed key, also from the raw (2,) uint32 of `jax.random.PRNGKey`."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _traced(*values) -> bool:
    return any(isinstance(value, jax.core.Tracer) for value in values)
