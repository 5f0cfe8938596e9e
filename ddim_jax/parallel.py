"""Parallel-in-time sampling (ParaDiGMS, Shih et al. 2023): Picard iteration over a window of steps.

With `x_bar = x / sqrt(ab)` a trajectory is a sum: x_bar_j is x_bar_i plus the increments of the steps between them. A
Picard iteration computes the increments of all steps of a window in one batch, at the current estimates of their points
x_t. The sums of the increments are the next estimates. After an iteration the first step of the window is exact. A
further step has converged if no point before it changed by more than the tolerance. The window then advances to the
first step that has not converged. There are at most as many iterations as steps.

The method reduces the time on an accelerator that a small batch does not use fully. It needs more computation in total:
each iteration calls the network with a batch of window times B.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import checks, gaussian, samplers
from ddim_jax.gaussian import Denoise, Model
from ddim_jax.samplers import Sampler
from ddim_jax.schedule import Array, precision
from ddim_jax.trajectory import Transition, Transitions, check_signal


class Parallel(NamedTuple):
    """The result of `integrate`."""

    x: Array  # (B, ...): the last x_s, that of `samplers.integrate` within the tolerance
    rounds: Array  # () int32: Picard iterations; for `ddim` the number of sequential network calls


def integrate(
    sampler: Sampler,
    model: Model,
    transitions: Transitions,
    x: Array,
    key: Array | None = None,
    *,
    window: int = 0,
    tolerance: float = 1e-3,
    sharding: jax.sharding.Sharding | None = None,
) -> Parallel:
    """`samplers.integrate` by Picard iteration, for samplers without state, such as `ddim` of any eta.

    The noise of a timestep is the same in all iterations. model, transitions, x and key: see `samplers.integrate`.

    sampler: its `init` must return a pytree without leaves. Multistep methods have a state.
    window: steps per iteration; 0 for all steps. The memory is that of a network call with a batch of window times B.
    tolerance: a point x_t has converged if the root mean square of its change in an iteration is at most this. At 0
        the result is that of the sequential steps.
    sharding: the sharding of the points (window, B, ...), to distribute the window over devices; default: that of x.

    Raises ValueError for a sampler with a state, for a window or a tolerance below 0, for alpha_bar = 0, and as
    `samplers.integrate`.
    """
    sampler, denoise, transitions, x, keys = samplers.checked(sampler, model, transitions, x, key)
    check_memory(sampler)
    check_signal(transitions, "parallel.integrate")
    steps = len(transitions.t)
    window = min(checks.integer("window", window, 0) or steps, steps)
    checks.real("tolerance", tolerance, 0)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise ValueError(f"sharding must be a jax.sharding.Sharding, got {checks.shown(sharding)}")
    # The window may extend beyond the last step. The results there are not used.
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], window, 0)]), transitions)
    return _iterate(sampler, denoise, padded, x, keys, tolerance, window=window, steps=steps, sharding=sharding)


def check_memory(sampler: Sampler) -> None:
    """Raises ValueError for a sampler with a state, such as a multistep method."""
    if jax.tree.leaves(jax.eval_shape(sampler.init, jax.ShapeDtypeStruct((1, 1), np.float32))):
        raise ValueError(
            "sampler must have no state (it must not be a multistep method) for parallel-in-time sampling, "
            f"got {type(sampler).__name__}"
        )


class _Window(NamedTuple):
    """The state of the iteration: the steps begin, ..., begin + window - 1."""

    begin: Array  # () the index of the first step
    x: Array  # (window + 1, B, ...): x_t of every step, and x_s of the last step. The first point is exact
    rounds: Array


@jax.jit(static_argnames=("window", "steps", "sharding"))
def _iterate(sampler, denoise, transitions, x, keys, tolerance, *, window, steps, sharding):
    x_dtype, dtype = x.dtype, precision(x.dtype)
    transitions, x = samplers.rounded(transitions, dtype), x.astype(dtype)
    scale = lambda alpha_bar: jnp.sqrt(alpha_bar).reshape(-1, *[1] * x.ndim)
    noise_of = lambda t: None if keys is None else gaussian.noise(keys, t, x.shape[1:], dtype)

    def step(x_t: Array, transition: Transition, denoise: Denoise) -> tuple[Array, Array]:
        """(x_s, eps at x_t)."""
        recorded, predictions = samplers.recording(denoise)
        x_s, _ = sampler.step(x_t, (), transition, recorded, noise_of(transition.t))
        return x_s.astype(dtype), predictions[0].eps

    def extrapolate(x_t: Array, eps: Array, next_transitions: Transitions) -> Array:
        """The next points, (window, B, ...), with a constant eps."""

        def body(x_t, transition):
            x_s, _ = step(x_t, transition, lambda x, level: gaussian.from_eps_output(x, eps, level))
            return x_s, x_s

        return jax.lax.scan(body, x_t, next_transitions)[1]

    def transitions_at(begin: Array) -> Transitions:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, begin, window), transitions)

    def iterate(state: _Window) -> _Window:
        current = transitions_at(state.begin)
        x_t = state.x[:-1] if sharding is None else jax.lax.with_sharding_constraint(state.x[:-1], sharding)
        x_s, eps = jax.vmap(lambda x_t, transition: step(x_t, transition, denoise))(x_t, current)
        increments = x_s / scale(current.alpha_bar_s) - x_t / scale(current.alpha_bar_t)
        first = state.x[:1] / scale(current.alpha_bar_t[:1])
        points = (first + jnp.cumsum(increments, axis=0)) * scale(current.alpha_bar_s)
        points = points.at[0].set(x_s[0])  # exact, because the first point is exact

        change = jnp.square(points - state.x[1:]).reshape(*points.shape[:2], -1)
        change = jnp.sqrt(jnp.mean(change, axis=-1)).max(axis=1)
        # A step has converged if all points before it have.
        converged = jnp.cumprod((change <= tolerance).astype(jnp.int32))
        done = jnp.minimum(1 + converged[:-1].sum(dtype=jnp.int32), steps - state.begin)
        next_points = extrapolate(points[-1], eps[-1], transitions_at(jnp.minimum(state.begin + window, steps)))
        points = jnp.concatenate([state.x[:1], points, next_points])
        return _Window(state.begin + done, jax.lax.dynamic_slice_in_dim(points, done, window + 1), state.rounds + 1)

    zero = jnp.zeros((), jnp.int32)
    estimates = extrapolate(x, x, transitions_at(zero))  # x_T is nearly pure noise: eps is about x_T
    state = _Window(zero, jnp.concatenate([x[None], estimates]), zero)
    state = jax.lax.while_loop(lambda state: state.begin < steps, iterate, state)
    return Parallel(state.x[0].astype(x_dtype), state.rounds)
