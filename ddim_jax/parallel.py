"""Sampling in parallel over time: many steps of a trajectory at once, each from a guess of where it begins, until all
guesses hold.

With `x_bar = x / sqrt(ab)` a trajectory is a sum: x_bar_j is x_bar_i plus what the steps between add. Picard's
iteration takes the steps of a window at once, at the points as they are guessed, and sums them up to better guesses
(Shih et al. 2023). After a round the first step of the window is exact, and with it every further one that began at a
point which did not move; the window goes on behind them. There are never more rounds than steps. For an accelerator
that a few images leave idle this is less time for more work: as many network calls as the window has steps, in one.
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
    x: Array  # (B, ...): where the sequential run ends too, within the tolerance
    rounds: Array  # () int32: how often the network was asked, one after the other


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
    """`samplers.integrate` by Picard's iteration, for samplers without memory, such as `ddim` of any eta (the noise of
    a level is the same for all guesses).

    window: steps at once; 0 for all. Memory is that of so many network calls. tolerance: by how much, root mean square
    of an image's x_t, a point may still move when it counts as found; at 0 the result is that of the steps one by one.
    sharding: where the window's points (window, B, ...) live, to divide them over devices; default: as x is. ValueError
    for a sampler that remembers, for a window or a tolerance below 0, for a level without signal, and as in
    `samplers.integrate`, where the model is explained.
    """
    sampler, denoise, transitions, x, keys = samplers.checked(sampler, model, transitions, x, key)
    check_memory(sampler)
    check_signal(transitions, "parallel.integrate")
    steps = len(transitions.t)
    window = min(checks.integer("window", window, 0) or steps, steps)
    checks.real("tolerance", tolerance, 0)
    if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
        raise ValueError(f"sharding must be a jax.sharding.Sharding, got {checks.shown(sharding)}")
    # The window may stand beyond the last step; what it does there is not used.
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[-1:], window, 0)]), transitions)
    return _rounds(sampler, denoise, padded, x, keys, tolerance, window=window, steps=steps, sharding=sharding)


def check_memory(sampler: Sampler) -> None:
    """ValueError for a sampler that remembers its last steps."""
    if jax.tree.leaves(jax.eval_shape(sampler.init, jax.ShapeDtypeStruct((1, 1), np.float32))):
        raise ValueError(f"{type(sampler).__name__} remembers its last steps and cannot take them at once")


class _Window(NamedTuple):
    begin: Array  # () the step that it begins with
    x: Array  # (window + 1, B, ...): where its steps begin, and where the last one ends. The first point is exact
    rounds: Array


@jax.jit(static_argnames=("window", "steps", "sharding"))
def _rounds(sampler, denoise, transitions, x, keys, tolerance, *, window, steps, sharding):
    given, wide = x.dtype, precision(x.dtype)
    transitions, x = samplers.rounded(transitions, wide), x.astype(wide)
    scale = lambda alpha_bar: jnp.sqrt(alpha_bar).reshape(-1, *[1] * x.ndim)
    noise_of = lambda t: None if keys is None else gaussian.noise(keys, t, x.shape[1:], wide)

    def take(x_t: Array, transition: Transition, denoise: Denoise) -> tuple[Array, Array]:
        """(x_s, eps at x_t)."""
        recorded, predictions = samplers.recording(denoise)
        x_s, _ = sampler.step(x_t, (), transition, recorded, noise_of(transition.t))
        return x_s.astype(wide), predictions[0].eps

    def onwards(x_t: Array, eps: Array, ahead: Transitions) -> Array:
        """(window, B, ...): the next points, if eps stayed the same."""

        def body(x_t, transition):
            x_s, _ = take(x_t, transition, lambda x, level: gaussian.from_eps_output(x, eps, level))
            return x_s, x_s

        return jax.lax.scan(body, x_t, ahead)[1]

    def at(begin: Array) -> Transitions:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, begin, window), transitions)

    def round_(state: _Window) -> _Window:
        now = at(state.begin)
        starts = state.x[:-1] if sharding is None else jax.lax.with_sharding_constraint(state.x[:-1], sharding)
        ends, said = jax.vmap(lambda x_t, transition: take(x_t, transition, denoise))(starts, now)
        added = ends / scale(now.alpha_bar_s) - starts / scale(now.alpha_bar_t)
        first = state.x[:1] / scale(now.alpha_bar_t[:1])
        found = (first + jnp.cumsum(added, axis=0)) * scale(now.alpha_bar_s)
        found = found.at[0].set(ends[0])  # exact: it began at an exact point

        moved = jnp.sqrt(jnp.mean(jnp.square(found - state.x[1:]).reshape(*found.shape[:2], -1), axis=-1)).max(axis=1)
        hold = jnp.cumprod((moved <= tolerance).astype(jnp.int32))  # a step is exact if the points before it hold
        done = jnp.minimum(1 + hold[:-1].sum(dtype=jnp.int32), steps - state.begin)
        ahead = onwards(found[-1], said[-1], at(jnp.minimum(state.begin + window, steps)))
        points = jnp.concatenate([state.x[:1], found, ahead])
        return _Window(state.begin + done, jax.lax.dynamic_slice_in_dim(points, done, window + 1), state.rounds + 1)

    zero = jnp.zeros((), jnp.int32)
    guesses = onwards(x, x, at(zero))  # x_T is nearly all eps
    state = _Window(zero, jnp.concatenate([x[None], guesses]), zero)
    state = jax.lax.while_loop(lambda state: state.begin < steps, round_, state)
    return Parallel(state.x[0].astype(given), state.rounds)
