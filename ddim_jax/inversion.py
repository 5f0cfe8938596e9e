"""Exact DDIM inversion: every encoding step is the solution of an implicit equation, by a fixed-point iteration.

Decoding takes x_s to x_t, t < s, with the eps at x_s. The encoding of the paper, `samplers.invert`, uses the eps at x_t
instead, because x_s is unknown (explicit Euler); its reconstruction error decreases like 1/S. Here x_s is the fixed
point of `x_s = sqrt(ab_s) (x_t / sqrt(ab_t) + (sigma_bar_s - sigma_bar_t) eps(x_s, s))` (implicit Euler). The residual
of this equation is returned.
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

MEMORY = 5  # m of Anderson acceleration: the number of differences of iterates


class Inverted(NamedTuple):
    """The result of `invert`."""

    x_T: Array  # (B, ...)
    residual: Array  # (B,): root mean square of the equation's residual, the largest over all steps


def invert(
    model: Model, noise_schedule: Schedule, tau: np.ndarray, x_0: Array, refine: int = 10, end: int = 0, stride: int = 0
) -> Inverted:
    """Encodes images into latents by exact DDIM inversion.

    DDIM over the same tau decodes x_T to x_0, up to an error that is small if the residual is small.

    model: see `samplers.integrate`.
    tau: (S+1,), see `trajectory.check`.
    x_0: (B, ...), floating point.
    refine: iterations per step, at least 1. Each calls the network once. Each step needs one more call, for the
        explicit step that the iteration starts from.
    end, stride: see `trajectory.ascend`.

    Some steps have no fixed point near the explicit step. This is frequent in the first step, because decoding loses
    information there. Then the iterate with the smallest residual is returned. Raises ValueError for a refine below 1,
    for a schedule with alpha_bar[T] = 0, and as `samplers.integrate`.
    """
    transitions, x_0 = tau_lib.ascend(noise_schedule, tau, end, stride), checks.batch("x_0", x_0)
    x_T, residual = samplers.run(Implicit(checks.integer("refine", refine, 1)), model, transitions, x_0)
    return Inverted(x_T, residual)


@register_static
@dataclasses.dataclass(frozen=True)
class Implicit:
    """The implicit encoding step, a sampler for ascending transitions. Its state is the largest residual so far, (B,).

    refine: iterations per step, at least 1.
    """

    refine: int

    stochastic = False
    order = 1
    min_steps = 1

    @property
    def calls_per_step(self) -> int:
        return self.refine + 1

    def check(self, transitions: Transitions) -> None:
        checks.integer("refine", self.refine, 1)
        if not checks.traced(*transitions):
            if (np.asarray(transitions.s) < np.asarray(transitions.t)).any():
                raise ValueError("transitions must ascend for exact DDIM inversion")
        tau_lib.check_signal(transitions, "exact DDIM inversion")

    def init(self, x: Array) -> Array:
        return jnp.zeros(x.shape[0], x.dtype)

    def step(self, x_t, state, transition, denoise, noise):
        begin, end = sigma_bars(transition)
        explicit = advanced(x_t, transition, (end - begin) * denoise(x_t, transition.level_t).eps)
        equation = lambda x: advanced(x_t, transition, (end - begin) * denoise(x, transition.level_s).eps)
        x_s, residual = fixed_point(equation, explicit, self.refine)
        return x_s, jnp.maximum(state, residual)


class _Iterate(NamedTuple):
    """A point of the iteration, or a difference of two points."""

    x: Array  # (B, ...)
    residual: Array  # (B, ...): f(x) - x


def fixed_point(f: Callable[[Array], Array], x: Array, iterations: int) -> tuple[Array, Array]:
    """Solves f(x) = x by Anderson acceleration (Walker and Ni 2011), independently for every image.

    f: a function (B, ...) -> (B, ...), whose image i depends on image i of its argument only.
    x: (B, ...), the start.
    iterations: calls of f, at least 1. Raises ValueError otherwise.

    Returns (x, residual): the iterate with the smallest residual, and the root mean square of its f(x) - x, (B,). Each
    iteration extrapolates from the best iterate so far. The other iterates contribute to the differences.
    """
    x, iterations = checks.batch("x", x), checks.integer("iterations", iterations, 1)
    flat = lambda a: a.reshape(*a.shape[: a.ndim - x.ndim + 1], -1)  # (..., B, d)
    rms = lambda a: jnp.sqrt(jnp.mean(flat(a) ** 2, axis=-1))  # (B,)
    choose = lambda condition, a, b: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), a, b)

    def iterate(carry, _):
        x, last, differences, best, smallest = carry
        current = _Iterate(x, f(x) - x)
        better = rms(current.residual) < smallest
        best = _Iterate(choose(better, current.x, best.x), choose(better, current.residual, best.residual))
        smallest = jnp.minimum(smallest, rms(current.residual))
        differences = jax.tree.map(
            lambda stored, a, b: jnp.concatenate([(a - b)[None], stored[:-1]]), differences, current, last
        )
        weights = _weights(flat(differences.residual), flat(best.residual))
        combined = jnp.einsum("mb,mb...->b...", weights, differences.x + differences.residual)
        return (best.x + best.residual - combined, current, differences, best, smallest), None

    start = _Iterate(x, jnp.zeros_like(x))
    first = _Iterate(x, f(x) - x)
    differences = jax.tree.map(lambda leaf: jnp.zeros((MEMORY, *leaf.shape), leaf.dtype), start)
    carry = (x + first.residual, first, differences, first, rms(first.residual))
    (_, _, _, best, smallest), _ = jax.lax.scan(iterate, carry, length=iterations - 1)
    return best.x, smallest


def _weights(differences: Array, residual: Array) -> Array:
    """The w (m, B) that minimize `|residual - sum_m w_m differences_m|`. Differences that are still zero get weight 0.

    differences: (m, B, d).
    residual: (B, d).
    """
    products = jnp.einsum("mbd,nbd->bmn", differences, differences)
    scale = jnp.trace(products, axis1=1, axis2=2)[:, None, None]
    ridge = jnp.finfo(products.dtype).eps * 10 * scale + jnp.finfo(products.dtype).tiny
    right = jnp.einsum("mbd,bd->bm", differences, residual)
    return jnp.linalg.solve(products + ridge * jnp.eye(len(differences))[None], right[..., None])[..., 0].T
