"""The generative processes of the paper and the one loop that runs them.

A sampler knows a single step from level t to level s. `integrate` scans it over the transitions of a tau.
Anything with the three methods of `Sampler` and registered as a pytree runs under the same loop; a NamedTuple
is the short way to write one.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import checks, gaussian
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import Denoise, Model, Prediction
from ddim_jax.gaussian import max_eta as max_eta
from ddim_jax.schedule import Array, Schedule, precision
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
        self, x_t: Array, state: Any, transition: Transition, denoise: Denoise, noise: Array | None
    ) -> tuple[Array, Any]:
        """(x_s, state) from x_t (B, ...), with the network's prediction `denoise(x_t, transition.level_t)`. Pure; draws
        nothing: noise ~ N(0, I) is an argument, None if not stochastic.
        """


class SamplingProcess(NamedTuple):
    """A sampler over the steps of a tau: it draws, and over the same levels in ascending order it encodes."""

    sampler: Sampler
    tau: np.ndarray  # (S+1,), ascending, from `end` to T
    transitions: Transitions  # leaves (S,)
    schedule: Schedule
    end: float = 0  # the level where sampling ends and encoding starts
    stride: int = 0  # see `trajectory.descend`


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

    def step(self, x_t, state, transition, denoise, noise):
        x_0, eps = denoise(x_t, transition.level_t)  # (9)
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

    def step(self, x_t, state, transition, denoise, noise):
        mean, _ = DDIM(eta=1.0).step(x_t, state, transition, denoise, noise=None)
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


def integrate(sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None = None) -> Array:
    """Runs a sampler over all transitions and returns the last x: x_0 for `descend`, x_T for `ascend`.

    sampler: see `Sampler`. model: a function (x_t, t) -> eps of the shape of x_t, or a `gaussian.Denoise`. A plain
    function is compiled once, with the arrays that it holds as constants: parameters that change belong into a
    `jax.tree_util.Partial(function, parameters)`, which also compiles nothing again; in a plain function only an array
    that was replaced is noticed, see `checks.function`. transitions: leaves (S,). x: (B, ...), of floating point: a
    function is given its dtype, and what is around the network is computed in float32 at least. key: one key, from
    which image i of the batch gets `fold_in(key, i)`, or (B,) keys, see `image_keys`. The noise of an image depends on
    its own key and on the level
    alone, and is the same bits in every batch; images are the same to rounding. Without a key nothing is drawn:
    ValueError if the sampler is stochastic, and for every other argument that cannot be. Memory does not grow with S,
    and a new S is the only thing that compiles again.
    """
    return run(sampler, model, transitions, x, key)[0]


def run(
    sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None = None
) -> tuple[Array, Any]:
    """`integrate` that also returns the sampler's last state: what it has to tell of the run."""
    return _run(sampler, model, transitions, x, key, keep=False)[0]


def trajectory(
    sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None = None
) -> tuple[Array, Trajectory]:
    """`integrate` that also returns every x_t and every predicted x_0. The same run; memory grows with S."""
    (last, _), (states, x_0) = _run(sampler, model, transitions, x, key, keep=True)
    return last, Trajectory(jnp.concatenate([jnp.asarray(x, last.dtype)[None], states]), x_0)


def invert(
    model: Model,
    noise_schedule: Schedule,
    tau: np.ndarray,
    x_0: Array,
    evaluate_at: str = "current",
    end: int = 0,
    stride: int = 0,
) -> Array:
    """Encodes images into latents: Eq. (13) integrated from 0 to tau[S], the steps of tau upwards. Returns x_T
    (B, ...).

    Deterministic, one network call a step; not the noising process (4). `integrate(ddim(0.), ...)` over `descend`
    of the same tau decodes, with an error that falls like 1/S. evaluate_at: the timestep passed to the network in
    the step t -> s, s > t: "current", t, the level that x is at (explicit Euler), or "next", s, as in diffusers'
    inverse scheduler; x_0 and eps follow from the output at the level t that x is at. end, stride: as
    of `trajectory.ascend`. model, and what is raised: as in `integrate`.
    """
    transitions = tau_lib.ascend(noise_schedule, tau, end, stride)
    times = checks.lookup({"current": transitions.t, "next": transitions.s}, evaluate_at, "evaluate_at")
    return integrate(ddim(0.0), model, transitions._replace(t=times), checks.batch("x_0", x_0))


def image_keys(key: Array, index: Array) -> Array:
    """One key per image: `fold_in(key, i)` for i in index (B,). Image i then depends on (seed, i) and nothing else."""
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index must be integers (B,), got shape {index.shape} and dtype {index.dtype}")
    return jax.vmap(jax.random.fold_in, (None, 0))(checks.keys("key", key, ()), index)


def initial_noise(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """x_T ~ N(0, I), (B, *shape), from (B,) keys. It is the noise of level 0, a level that no step leaves."""
    return gaussian.noise(checks.keys("keys", keys, (None,)), 0, shape, dtype)


def _run(sampler, model, transitions, x, key, keep):
    return _scan(*checked(sampler, model, transitions, x, key), keep=keep)


def checked(
    sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None
) -> tuple[Sampler, Denoise, Transitions, Array, Array | None]:
    """The arguments of a loop over a sampler's steps, as it takes them: the model a `Denoise`, transitions and x
    arrays, key (B,) keys or None. ValueError, naming the argument, for what they cannot be.
    """
    check_sampler(sampler)
    transitions = tau_lib.check_transitions(transitions)
    sampler.check(transitions)
    x = checks.batch("x", x)
    if key is None and sampler.stochastic:
        raise ValueError(f"key must be given: {sampler} is stochastic and needs a key")
    if key is not None:
        key = checks.keys("key", key, (), x.shape[:1])
        key = key if key.ndim else image_keys(key, jnp.arange(x.shape[0]))
    denoise = gaussian.as_denoise(model, x.dtype)
    denoise.check(transitions.alpha_bar_t)
    return sampler, denoise, transitions, x, key


def check_sampler(sampler: Sampler) -> None:
    if isinstance(sampler, type) or not all(hasattr(sampler, name) for name in ("check", "init", "step")):
        raise ValueError(f"sampler must have the methods of samplers.Sampler, got {checks.shown(sampler)}")
    if jax.tree_util.all_leaves([sampler]):
        raise ValueError(f"sampler must be a pytree, such as a NamedTuple, got {checks.shown(sampler)}")


def rounded(transitions: Transitions, dtype: jnp.dtype) -> Transitions:
    """The transitions in a precision; levels that are ints stay so."""
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype), transitions
    )


def recording(denoise: Denoise) -> tuple[Denoise, list[Prediction]]:
    """The denoiser as a step of a sampler calls it, and its predictions so far in the step; the first is at x_t."""
    predictions = []

    def recorded(x, level):
        predictions.append(denoise(x, level))
        return predictions[-1]

    return recorded, predictions


@jax.jit(static_argnames="keep")
def _scan(sampler, denoise, transitions, x, keys, *, keep):
    wide = precision(x.dtype)
    transitions = rounded(transitions, wide)

    def body(carry, transition):
        x_t, state = carry
        recorded, predictions = recording(denoise)
        noise = None if keys is None else gaussian.noise(keys, transition.t, x.shape[1:], wide)
        x_s, state = sampler.step(x_t, state, transition, recorded, noise)
        kept = (x_s.astype(x.dtype), predictions[0].x_0.astype(x.dtype)) if keep else None
        return (x_s.astype(wide), state), kept

    start = x.astype(wide)
    (last, state), kept = jax.lax.scan(body, (start, sampler.init(start)), transitions)
    return (last.astype(x.dtype), state), kept
