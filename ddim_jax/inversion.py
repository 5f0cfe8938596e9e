"""Encoding that decodes to the image: each step of Eq. (13) upwards solved as the equation that it is.

Decoding takes x_s to x_t, t < s, with the eps at x_s. The paper's encoding, `samplers.invert`, takes the eps at x_t
instead, because x_s is not known yet; its error falls like 1/S. Here x_s is the fixed point of
`x_s = sqrt(ab_s) (x_t / sqrt(ab_t) + (sigma_bar_s - sigma_bar_t) eps(x_s, s))`, found to a residual that is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static

from ddim_jax import checks, samplers
from ddim_jax import trajectory as tau_lib
from ddim_jax.gaussian import Model
from ddim_jax.multistep import advanced, sigma_bars
from ddim_jax.schedule import Array, Schedule
from ddim_jax.trajectory import Transitions

MEMORY = 5  # differences of iterates that are mixed


class Inverted(NamedTuple):
    x_T: Array  # (B, ...)
    residual: Array  # (B,): root of the mean square by which x_s misses its equation, the largest of all steps


def invert(
    model: Model, noise_schedule: Schedule, tau: np.ndarray, x_0: Array, refine: int = 10, end: int = 0, stride: int = 0
) -> Inverted:
    """Encodes images into latents whose DDIM decoding over the same tau is the image again, as far as the residual is
    small.

    refine: iterations in each step, one network call each, beside the explicit one that they begin with. Where a step
    has no fixed point nearby, as the first often has not (what decoding removes altogether cannot be encoded), the
    iterate with the smallest residual is kept. end, stride: as of `trajectory.ascend`. ValueError for a refine
    below 1, for a schedule that ends at alpha_bar = 0, and as in `samplers.integrate`, where the model is explained.
    """
    transitions, x_0 = tau_lib.ascend(noise_schedule, tau, end, stride), checks.batch("x_0", x_0)
    x_T, residual = samplers.run(Implicit(checks.integer("refine", refine, 1)), model, transitions, x_0)
    return Inverted(x_T, residual)


@register_static
@dataclasses.dataclass(frozen=True)
class Implicit:
    """The steps of encoding; its state is the largest residual so far, (B,)."""

    refine: int

    stochastic = False

    def check(self, transitions: Transitions) -> None:
        checks.integer("refine", self.refine, 1)
        if not checks.traced(*transitions):
            if (np.asarray(transitions.s) < np.asarray(transitions.t)).any():
                raise ValueError("transitions must ascend: an implicit step encodes")
        tau_lib.check_signal(transitions, "an implicit step")

    def init(self, x: Array) -> Array:
        return jnp.zeros(x.shape[0], x.dtype)

    def step(self, x_t, state, transition, denoise, noise):
        begin, end = sigma_bars(transition)
        explicit = advanced(x_t, transition, (end - begin) * denoise(x_t, transition.level_t).eps)
        equation = lambda x: advanced(x_t, transition, (end - begin) * denoise(x, transition.level_s).eps)
        x_s, residual = fixed_point(equation, explicit, self.refine)
        return x_s, jnp.maximum(state, residual)


class _Iterate(NamedTuple):
    x: Array  # (B, ...)
    error: Array  # (B, ...): f(x) - x


def fixed_point(f: Callable[[Array], Array], x: Array, iterations: int) -> tuple[Array, Array]:
    """x with f(x) = x by Anderson's mixing (Walker and Ni 2011), for each image (B, ...) on its own, and the root mean
    square of f(x) - x, (B,). iterations: at least 1; ValueError otherwise.

    It goes on from the best iterate so far; what the worse ones told is not lost.
    """
    x, iterations = checks.batch("x", x), checks.integer("iterations", iterations, 1)
    flat = lambda a: a.reshape(*a.shape[: a.ndim - x.ndim + 1], -1)  # (..., B, d)
    size = lambda a: jnp.sqrt(jnp.mean(flat(a) ** 2, axis=-1))  # (B,)
    choose = lambda where, a, b: jnp.where(where.reshape(-1, *[1] * (x.ndim - 1)), a, b)

    def iterate(carry, _):
        now, last, moves, best, known = carry
        now = _Iterate(now, f(now) - now)
        better = size(now.error) < known
        best = _Iterate(choose(better, now.x, best.x), choose(better, now.error, best.error))
        known = jnp.minimum(known, size(now.error))
        moves = jax.tree.map(lambda many, a, b: jnp.concatenate([(a - b)[None], many[:-1]]), moves, now, last)
        mixed = jnp.einsum("mb,mb...->b...", _weights(flat(moves.error), flat(best.error)), moves.x + moves.error)
        return (best.x + best.error - mixed, now, moves, best, known), None

    start = _Iterate(x, jnp.zeros_like(x))
    first = _Iterate(x, f(x) - x)
    none = jax.tree.map(lambda leaf: jnp.zeros((MEMORY, *leaf.shape), leaf.dtype), start)
    carry = (x + first.error, first, none, first, size(first.error))
    (_, _, _, best, known), _ = jax.lax.scan(iterate, carry, length=iterations - 1)
    return best.x, known


def _weights(moves: Array, error: Array) -> Array:
    """w (m, B) for which `error - sum_m w_m moves_m` is smallest, moves (m, B, d); moves of nothing get 0."""
    products = jnp.einsum("mbd,nbd->bmn", moves, moves)
    scale = jnp.trace(products, axis1=1, axis2=2)[:, None, None]
    small = jnp.finfo(products.dtype).eps * 10 * scale + jnp.finfo(products.dtype).tiny
    right = jnp.einsum("mbd,bd->bm", moves, error)
    return jnp.linalg.solve(products + small * jnp.eye(len(moves))[None], right[..., None])[..., 0].T
