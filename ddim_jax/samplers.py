"""The samplers of the paper, DDIM and DDPM, and the loop that runs a sampler over the transitions of a tau.

A sampler defines one step from the timestep t to the timestep s. `integrate` scans the step over the transitions. Every
pytree with the methods of `Sampler` runs in the same loop. The shortest way to write one is a NamedTuple.

One file because the protocol is read together with the loop that calls it.
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
    """One step x_t -> x_s of a generative process. A pytree whose leaves are the hyper-parameters of the sampler.

    The leaves are traced, so a new value does not trigger recompilation. A sampler defines `stochastic`, `check`,
    `init` and `step`. `order`, `calls_per_step`, `min_steps` and `needs_variance` are optional attributes: `integrate`
    does not read them. They are read-only and not leaves.

    The timestep t and its shape, () or (B,), are documented in `gaussian.Denoise`.
    """

    @property
    def stochastic(self) -> bool:
        """Whether `step` uses noise. Known on the host, before tracing."""

    @property
    def order(self) -> int:
        """Optional: the order of the method as an ODE solver. 1 for DDIM and for a stochastic sampler."""

    @property
    def calls_per_step(self) -> int:
        """Optional: the number of network calls per step. The first steps may have another number."""

    @property
    def min_steps(self) -> int:
        """Optional: the smallest S, the number of transitions, that `check` accepts."""

    @property
    def needs_variance(self) -> bool:
        """Optional: whether the model must predict a variance, see `gaussian.Prediction`."""

    def check(self, transitions: Transitions) -> None:
        """Raises ValueError if the hyper-parameters do not fit the transitions. Runs on the host, before tracing."""

    def init(self, x: Array) -> Any:
        """The state before the first step, a pytree. x: (B, ...).

        The initial state of a multistep method makes its first step a step of order 1.
        """

    def step(
        self, x_t: Array, state: Any, transition: Transition, denoise: Denoise, noise: Array | None
    ) -> tuple[Array, Any]:
        """One step. Returns (x_s, state). It is pure and draws no random numbers.

        x_t: (B, ...).
        state: the output of `init` or of the previous step.
        transition: the step t -> s; its leaves are scalars.
        denoise: (x, level) -> `Prediction`; the prediction at x_t is `denoise(x_t, transition.level_t)`.
        noise: N(0, I), (B, ...), or None if the sampler is not stochastic.
        """


class SamplingProcess(NamedTuple):
    """A sampler and its tau.

    `transitions` are the steps of sampling. Encoding uses the same timesteps in ascending order.
    """

    sampler: Sampler
    tau: np.ndarray  # (S+1,), ascending, from `end` to T
    transitions: Transitions  # the output of `trajectory.descend`, leaves (S,)
    schedule: Schedule
    end: float = 0  # the timestep at which sampling ends and encoding starts
    stride: int = 0  # see `trajectory.descend`


class DDIM(NamedTuple):
    """Eq. (12) with the sigma of Eq. (16).

    eta: 0 is DDIM, 1 is DDPM, see `gaussian.max_eta` for its range.
    """

    eta: Array | float = 0.0

    order = 1
    calls_per_step = 1
    min_steps = 1

    @property
    def stochastic(self) -> bool:
        return checks.traced(self.eta) or bool(self.eta != 0)

    def check(self, transitions: Transitions) -> None:
        gaussian.check_eta(self.eta, transitions)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        x_0, eps = denoise(x_t, transition.level_t)  # (9)
        variance = gaussian.direction_variance(transition, gaussian.sigma_squared(self.eta, transition))
        x_s = jnp.sqrt(transition.alpha_bar_s) * x_0 + gaussian.root(variance) * eps  # (12)
        return x_s if noise is None else x_s + gaussian.sigma(self.eta, transition) * noise, state  # (16)


class DDPMHat(NamedTuple):
    """The sigma-hat of section 5: the mean of eta = 1 with noise of the variance `1 - alpha_bar_t / alpha_bar_s`.

    With s = t - 1 this is DDPM with the variance beta_t (Ho et al. 2020, section 3.2). The last step (s = 0) adds no
    noise.
    """

    order = 1
    calls_per_step = 1
    min_steps = 1

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, transitions: Transitions) -> None:
        _check_descends("ddpm_hat", transitions)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        mean, _ = DDIM(eta=1.0).step(x_t, state, transition, denoise, noise=None)
        variance = jnp.where(transition.s > 0, transition.beta, 0)
        return mean + jnp.sqrt(variance) * noise, state


def _check_descends(name: str, transitions: Transitions) -> None:
    if not checks.traced(*transitions) and (np.asarray(transitions.s) > np.asarray(transitions.t)).any():
        raise ValueError(f"transitions must descend for {name}, because encoding is deterministic")


class DDPMLearned(NamedTuple):
    """The mean of eta = 1 with the variance that the network predicts (Nichol and Dhariwal 2021, Eq. 15).

    `log variance = f log beta + (1 - f) log posterior_variance`, f = `Prediction.variance_fraction`. The last step (s =
    0) adds no noise.
    """

    order = 1
    calls_per_step = 1
    min_steps = 1
    needs_variance = True

    @property
    def stochastic(self) -> bool:
        return True

    def check(self, transitions: Transitions) -> None:
        _check_descends("ddpm_learned", transitions)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        recorded, predictions = recording(denoise)
        mean, _ = DDIM(eta=1.0).step(x_t, state, transition, recorded, noise=None)
        fraction = predictions[0].variance_fraction
        if fraction is None:
            raise ValueError("model must predict a variance for ddpm_learned, got a denoiser without variance_fraction")
        log = lambda variance: jnp.log(jnp.where(transition.s > 0, variance, 1))  # for s = 0 both are unused
        deviation = jnp.exp((fraction * log(transition.beta) + (1 - fraction) * log(transition.posterior_variance)) / 2)
        return mean + jnp.where(transition.s > 0, deviation, 0) * noise, state


def ddim(eta: float = 0.0) -> DDIM:
    """The family of samplers of Eq. (12) and (16): eta = 0 is deterministic DDIM, eta = 1 is DDPM.

    eta: finite, at least 0, and at most `max_eta` of the transitions. Raises ValueError otherwise: here if eta is below
        0, and in `integrate` if it exceeds `max_eta`. `integrate` can be differentiated with respect to a traced eta,
        and mapped over it.
    """
    return DDIM(checks.real("eta", eta, 0))


def ddpm() -> DDIM:
    """DDPM with the posterior variance, `ddim(eta=1)`."""
    return DDIM(eta=1.0)


def ddpm_hat() -> DDPMHat:
    """DDPM with the larger variance, the row sigma-hat of the paper's tables."""
    return DDPMHat()


def ddpm_learned() -> DDPMLearned:
    """DDPM with the variance that the network predicts: the sampler of improved-diffusion and ADM."""
    return DDPMLearned()


class Trajectory(NamedTuple):
    """All x_t and all predicted x_0 of S steps."""

    x: Array  # (S+1, B, ...): from x_T to the last x_s
    x_0: Array  # (S, B, ...): the predicted x_0 of each step, Eq. (9)


def integrate(sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None = None) -> Array:
    """Runs a sampler over all transitions and returns the last x_s.

    It is x_0 for the transitions of `trajectory.descend`, and x_T for those of `trajectory.ascend`.

    sampler: see `Sampler`.
    model: a function (x_t, t) -> eps of the shape of x_t, or a `gaussian.Denoise`, which documents t. A plain function
        is compiled once, with the arrays that it holds as constants. Pass parameters that change as
        `jax.tree_util.Partial(function, parameters)`: then new values do not trigger recompilation. In a plain function
        only an array that was replaced is noticed, see `checks.function`.
    transitions: leaves (S,).
    x: (B, ...), floating point. The function gets x_t in the dtype of x. All other computations are in float32 or
        wider.
    key: one key, from which image i of the batch gets `fold_in(key, i)`, or (B,) keys, see `image_keys`. Not needed if
        the sampler is deterministic.

    The noise of an image depends on its key and on the timestep only: it is bitwise the same in every batch. The images
    are the same up to rounding. Memory does not grow with S. Only a new S, or new shapes, trigger recompilation. Raises
    ValueError for an invalid argument, and if a stochastic sampler gets no key.
    """
    return run(sampler, model, transitions, x, key)[0]


def run(
    sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None = None
) -> tuple[Array, Any]:
    """Like `integrate`, but returns (x, state): the last x_s and the last state of the sampler."""
    return _run(sampler, model, transitions, x, key, keep=False)[0]


def trajectory(
    sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None = None
) -> tuple[Array, Trajectory]:
    """Like `integrate`, but returns (x, `Trajectory`): the last x_s, and all x_t and predicted x_0.

    Memory grows with S.
    """
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
    """Encodes images into latents: integrates Eq. (13) from x_0 to x_T over the timesteps of tau in ascending order.

    model: see `integrate`.
    tau: (S+1,), see `trajectory.check`.
    x_0: (B, ...), floating point.
    evaluate_at: the timestep passed to the network in the step t -> s, s > t. "current" is t, the timestep of x
        (explicit Euler). "next" is s, as in diffusers' inverse scheduler. In both cases x_0 and eps are computed from
        the output with the alpha_bar of t.
    end, stride: see `trajectory.ascend`.

    Returns x_T (B, ...). Encoding is deterministic and calls the network once per step; it is not the forward process
    (4). `integrate(ddim(0.), ...)` over `trajectory.descend` of the same tau decodes; the reconstruction error
    decreases like 1/S. Raises ValueError as `integrate`.
    """
    transitions = tau_lib.ascend(noise_schedule, tau, end, stride)
    times = checks.lookup({"current": transitions.t, "next": transitions.s}, evaluate_at, "evaluate_at")
    return integrate(ddim(0.0), model, transitions._replace(t=times), checks.batch("x_0", x_0))


def image_keys(key: Array, index: Array) -> Array:
    """One key per image: `fold_in(key, i)` for every i in index. Image i then depends only on (key, i).

    key: one key.
    index: (B,) ints. Raises ValueError otherwise.
    """
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"index must be integers (B,), got shape {index.shape} and dtype {index.dtype}")
    return jax.vmap(jax.random.fold_in, (None, 0))(checks.keys("key", key, ()), index)


def initial_noise(keys: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """x_T ~ N(0, I), (B, *shape). keys: (B,).

    The noise is drawn with the key of t = 0. No sampling step starts at t = 0, so no step draws the same noise.
    """
    return gaussian.noise(checks.keys("keys", keys, (None,)), 0, shape, dtype)


def _run(sampler, model, transitions, x, key, keep):
    return scan_steps(*checked(sampler, model, transitions, x, key), keep=keep)


def checked(
    sampler: Sampler, model: Model, transitions: Transitions, x: Array, key: Array | None
) -> tuple[Sampler, Denoise, Transitions, Array, Array | None]:
    """Validates the arguments of a loop over the steps of a sampler, and converts them.

    Returns (sampler, denoise, transitions, x, key): model becomes a `Denoise`, transitions and x become arrays, key
    becomes (B,) keys or None. Raises a ValueError that names the invalid argument.
    """
    check_sampler(sampler)
    transitions = tau_lib.check_transitions(transitions)
    sampler.check(transitions)
    x = checks.batch("x", x)
    if key is None and sampler.stochastic:
        raise ValueError(f"key must be given: the stochastic sampler {sampler} needs a key")
    if key is not None:
        key = checks.keys("key", key, (), x.shape[:1])
        key = key if key.ndim else image_keys(key, jnp.arange(x.shape[0]))
    denoise = gaussian.as_denoise(model, x.dtype)
    denoise.check(transitions.alpha_bar_t)
    return sampler, denoise, transitions, x, key


def check_sampler(sampler: Sampler) -> None:
    """Raises ValueError unless the sampler is a pytree with the methods check, init and step."""
    if isinstance(sampler, type) or not all(hasattr(sampler, name) for name in ("check", "init", "step")):
        raise ValueError(f"sampler must have the methods of samplers.Sampler, got {checks.shown(sampler)}")
    if jax.tree_util.all_leaves([sampler]):
        raise ValueError(f"sampler must be a pytree, such as a NamedTuple, got {checks.shown(sampler)}")


def rounded(transitions: Transitions, dtype: jnp.dtype) -> Transitions:
    """Casts transitions to a dtype. Integer timesteps are not cast."""
    return jax.tree.map(
        lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype), transitions
    )


def recording(denoise: Denoise) -> tuple[Denoise, list[Prediction]]:
    """Returns (denoise, predictions): a denoiser that appends each of its predictions to the list.

    In one step of a sampler predictions[0] is the prediction at x_t.
    """
    predictions = []

    def recorded(x, level):
        predictions.append(denoise(x, level))
        return predictions[-1]

    return recorded, predictions


@jax.jit(static_argnames="keep")
def scan_steps(
    sampler: Sampler, denoise: Denoise, transitions: Transitions, x: Array, keys: Array | None, *, keep: bool
) -> tuple[tuple[Array, Any], Any]:
    """The compiled loop over the steps, a `lax.scan`: ((the last x_s, the last state of the sampler), outputs).

    The arguments are the results of `checked`. keep: whether outputs are (x_s, predicted x_0) of all steps, else None.
    """
    dtype = precision(x.dtype)
    transitions = rounded(transitions, dtype)

    def body(carry, transition):
        x_t, state = carry
        recorded, predictions = recording(denoise)
        noise = None if keys is None else gaussian.noise(keys, transition.t, x.shape[1:], dtype)
        x_s, state = sampler.step(x_t, state, transition, recorded, noise)
        outputs = (x_s.astype(x.dtype), predictions[0].x_0.astype(x.dtype)) if keep else None
        return (x_s.astype(dtype), state), outputs

    start = x.astype(dtype)
    (last, state), outputs = jax.lax.scan(body, (start, sampler.init(start)), transitions)
    return (last.astype(x.dtype), state), outputs
