"""Interpolation between latents x_T (section 5.3 and D.5).

x_T ~ N(0, I) in d dimensions is close to the sphere of radius sqrt(d), so an interpolated latent must be close to it
too. Linear interpolation gives latents with a smaller norm, which are not typical of N(0, I).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddim_jax import checks
from ddim_jax.schedule import Array


def slerp(a: Array, b: Array, fraction: Array) -> Array:
    """Spherical linear interpolation between two latents (Shoemake 1985; the paper, D.5).

    `sin((1 - fraction) theta) / sin(theta) a + sin(fraction theta) / sin(theta) b`, theta the angle between a and b.

    a, b: one latent each (...), the same shape, at least two values, finite and not all zero.
    fraction: a scalar in [0, 1]: 0 gives a, 1 gives b.

    If a and b have the same direction, the interpolation is linear. If they have opposite directions, theta = pi, the
    result is NaN or has an arbitrary direction. Raises ValueError for an invalid argument.
    """
    checks.real("fraction", fraction, 0, 1)
    a, b = _pair(a, b)
    u, v = (x / jnp.sqrt(jnp.sum(x**2)) for x in (a, b))
    # arccos would lose digits at small angles
    theta = 2 * jnp.arctan2(jnp.sqrt(jnp.sum((u - v) ** 2)), jnp.sqrt(jnp.sum((u + v) ** 2)))
    parallel = jnp.sin(theta) < 1e-4  # the quotients of sines tend to the fractions, and lose digits in float32
    safe = jnp.where(parallel, 1.0, theta)
    weight = lambda part: jnp.where(parallel, part, jnp.sin(part * theta) / jnp.sin(safe))
    return weight(1 - fraction) * a + weight(fraction) * b


def line(a: Array, b: Array, count: int) -> Array:
    """`count` latents from a to b, both included, at equal angles. (count, ...)

    a, b: see `slerp`.
    count: at least 2. Raises ValueError otherwise.
    """
    return jax.vmap(slerp, (None, None, 0))(*_pair(a, b), _fractions("count", count))


def grid(corners: Array, rows: int, columns: int) -> Array:
    """Latents between four corners, (rows, columns, ...). Every row is a `line` between the left and the right column.

    corners: (4, ...): top left, top right, bottom left, bottom right.
    rows, columns: at least 2. Raises ValueError otherwise.
    """
    corners = checks.batch("corners", corners)
    if len(corners) != 4:
        raise ValueError(f"corners must be 4 latents, got {len(corners)}")
    across, down = _fractions("columns", columns), _fractions("rows", rows)
    lines = jax.vmap(slerp, (None, None, 0))
    left, right = lines(*_pair(corners[0], corners[2]), down), lines(*_pair(corners[1], corners[3]), down)
    return jax.vmap(lines, (0, 0, None))(left, right, across)


def _pair(a: Array, b: Array) -> tuple[Array, Array]:
    """Validates two latents. Raises ValueError unless they have the same shape and are finite and not all zero."""
    a, b = checks.floating("a", a), checks.floating("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {a.shape} and {b.shape}")
    for name, x in (("a", a), ("b", b)):
        if not checks.traced(x) and not (jnp.isfinite(x).all() and (x != 0).any()):
            raise ValueError(f"{name} must be finite and not all zero")
    return a, b


def _fractions(name: str, count: int) -> Array:
    return jnp.linspace(0.0, 1.0, checks.integer(name, count, 2))
