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

from ddim_jax import checks, gaussian
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import EpsFn
from ddim_jax.gaussian import max_eta as max_eta
from ddim_jax.schedule import Array, Level, Schedule, precision
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
        return checks.traced(self.eta) or bool(self.eta != 0)

    def check(self, transitions: Transitions) -> None:
        gaussian.check_eta(self.eta, transitions)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, eps_fn, noise):
        eps = eps_fn(x_t, transition.t)
        x_0 = gaussian.predict_x0(x_t, eps, transition.level_t)  # (9)
        kept = gaussian.direction_variance(transition, gaussian.sigma_squared(self.eta, transition))
        x_s = jnp.sqrt(transition.alpha_bar_s) * x_0 + gaussian.root(kept) * eps  # (12)
        return x_s if noise is None else x_s + gaussian.sigma(self.eta, transition) * noise, state  # (16)


class DDPMHat(NamedTuple):
    """The sigma-hat of section 5: the mean keeps sigma(eta = 1), the noise is larger,
    `sqrt(1 - alpha_bar_t / alpha_bar_s)`.

    With s = t - 1 this is DDPM with the variance beta_t (Ho et al. 2020, section 3.2). No noise in the last step.
    """

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, transitions: Transitions) -> None:
        if not checks.traced(*transitions) and (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
            raise ValueError("transitions must descend, ddpm_hat cannot ascend: encoding is deterministic")

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, eps_fn, noise):
        mean, _ = DDIM(eta=1.0).step(x_t, state, transition, eps_fn, noise=None)
        variance = jnp.where(transition.s > 0, transition.beta, 0)
        return mean + jnp.sqrt(variance) * noise, state


def ddim(eta: float = 0.0) -> DDIM:
    """The family of Eq. (12) and (16): eta = 0 is deterministic DDIM, eta = 1 is DDPM. ValueError unless eta is a
    finite number of at least 0, and, once it is run, of at most `max_eta`. A run can be differentiated and mapped over
    a traced eta.
    """
    return DDIM(checks.real("eta", eta, 0))


def ddpm() -> DDIM:
    """DDPM with the posterior variance: `ddim(eta=1)`."""
    return DDIM(eta=1.0)


def ddpm_hat() -> DDPMHat:
    """DDPM with the larger variance, the row sigma-hat of the paper's tables."""
    return DDPMHat()


class Trajectory(NamedTuple):
    """All that a run went through, for S steps."""

    x: Array  # (S+1, B, ...): x_T first, the final image last
    x_0: Array  # (S, B, ...): the x_0 predicted in each step, Eq. (9)


def integrate(sampler: Sampler, eps_fn: EpsFn, transitions: Transitions, x: Array, key: Array | None = None) -> Array:
    """Runs a sampler over all transitions and returns the last x: x_0 for `descend`, x_T for `ascend`.

    sampler: see `Sampler`. eps_fn: (x_t, t) -> eps, of the shape of x_t. A plain function is compiled once, with the
    arrays that it holds as constants: parameters that change belong into a `jax.tree_util.Partial(function,
    parameters)`, which also compiles nothing again; in a plain function only an array that was replaced is noticed, see
    `checks.function`. transitions: leaves (S,). x: (B, ...), of floating point: the network is given its dtype, and
    what is around the network is computed in float32 at least. key: one key, from which image i of the batch gets
    `fold_in(key, i)`, or (B,) keys, see `image_keys`. The noise of an image depends on its own key and on the level
    alone, and is the same bits in every batch; images are the same to rounding. Without a key nothing is drawn:
    ValueError if the sampler is stochastic, and for every other argument that cannot be. Memory does not grow with S,
    and a new S is the only thing that compiles again.
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
    """`integrate` that also returns every x_t and every predicted x_0. The same run; memory grows with S. As there, a
    plain eps_fn is compiled with the arrays that it holds: parameters that change belong into a
    `jax.tree_util.Partial`.

    predict: (x_t, output of the network, level) -> x_0: Eq. (9), where the output is eps.
    """
    if not callable(predict):
        raise ValueError(f"predict must be a function (x_t, eps, level) -> x_0, got {checks.shown(predict)}")
    (last, _), (states, x_0) = _run(sampler, eps_fn, transitions, x, key, predict)
    return last, Trajectory(jnp.concatenate([jnp.asarray(x, last.dtype)[None], states]), x_0)


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
    of the same tau decodes, with an error that falls like 1/S. evaluate_at: the timestep passed to the network in
    the step t -> s, s > t: "current", t, the level that x is at (explicit Euler), or "next", s, as in other
    implementations. end: the level of x_0 that tau begins with. As in `integrate`, a plain eps_fn is compiled with the
    arrays that it holds: parameters that change belong into a `jax.tree_util.Partial`.
    """
    transitions = tau_lib.ascend(noise_schedule, tau, end)
    times = checks.lookup({"current": transitions.t, "next": transitions.s}, evaluate_at, "evaluate_at")
    return integrate(ddim(0.0), eps_fn, transitions._replace(t=times), checks.batch("x_0", x_0))


def image_keys(key: Array, index: Array) -> Array:
    """One key per image: `fold_in(key, i)` for i in index (B,). Image i then depends on (seed, i) and nothing else."""
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index must be integers (B,), got shape {index.shape} and dtype {index.dtype}")
    return jax.vmap(jax.random.fold_in, (None, 0))(checks.keys("key", key, ()), index)


def initial_noise(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """x_T ~ N(0, I), (B, *shape), from (B,) keys. It is the noise of level 0, a level that no step leaves."""
    return gaussian.noise(checks.keys("keys", keys, (None,)), 0, shape, dtype)


def _run(sampler, eps_fn, transitions, x, key, predict=None):
    return _scan(*checked(sampler, eps_fn, transitions, x, key), predict=predict)


def checked(
    sampler: Sampler, eps_fn: EpsFn, transitions: Transitions, x: Array, key: Array | None
) -> tuple[Sampler, EpsFn, Transitions, Array, Array | None]:
    """The arguments of a loop over a sampler's steps, as it takes them: eps_fn a pytree, transitions and x arrays, key
    (B,) keys or None. ValueError, naming the argument, for what they cannot be.
    """
    _check_sampler(sampler)
    transitions = tau_lib.check_transitions(transitions)
    sampler.check(transitions)
    x = checks.batch("x", x)
    if key is None and sampler.stochastic:
        raise ValueError(f"key must be given: {sampler} is stochastic and needs a key")
    if key is not None:
        key = checks.keys("key", key, (), x.shape[:1])
        key = key if key.ndim else image_keys(key, jnp.arange(x.shape[0]))
    return sampler, gaussian.as_eps_fn(eps_fn), transitions, x, key


def _check_sampler(sampler: Sampler) -> None:
    if isinstance(sampler, type) or not all(hasattr(sampler, name) for name in ("check", "init", "step")):
        raise ValueError(f"sampler must have the methods of samplers.Sampler, got {checks.shown(sampler)}")
    if jax.tree_util.all_leaves([sampler]):
        raise ValueError(f"sampler must be a pytree, such as a NamedTuple, got {checks.shown(sampler)}")


def rounded(transitions: Transitions, dtype: jnp.dtype) -> Transitions:
    """The transitions in a precision; levels that are ints stay so."""
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype), transitions
    )


def recording(eps_fn: EpsFn, dtype: jnp.dtype) -> tuple[EpsFn, list[Array]]:
    """eps_fn as a step of a sampler calls it, for a network that is given x in this dtype; and its outputs so far in
    the step, of which the first is at x_t.
    """
    outputs = []

    def recorded(x, t):
        outputs.append(eps_fn(x.astype(dtype), t))
        return outputs[-1]

    return recorded, outputs


@jax.jit(static_argnames="predict")
def _scan(sampler, eps_fn, transitions, x, keys, *, predict):
    wide = precision(x.dtype)
    transitions = rounded(transitions, wide)

    def body(carry, transition):
        x_t, state = carry
        recorded, outputs = recording(eps_fn, x.dtype)
        noise = None if keys is None else gaussian.noise(keys, transition.t, x.shape[1:], wide)
        x_s, state = sampler.step(x_t, state, transition, recorded, noise)
        kept = None if predict is None else (x_s, predict(x_t, outputs[0], transition.level_t))
        return (x_s.astype(wide), state), jax.tree.map(lambda leaf: leaf.astype(x.dtype), kept)

    start = x.astype(wide)
    (last, state), kept = jax.lax.scan(body, (start, sampler.init(start)), transitions)
    return (last.astype(x.dtype), state), kept
