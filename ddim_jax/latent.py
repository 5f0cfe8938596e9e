"""Between latents: what lies on the way from one x_T to another (section 5.3 and D.5).

x_T ~ N(0, I) in d dimensions lies near the sphere of radius sqrt(d), and so must what is between two of them: straight
lines cut through the inside, where no noise is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddim_jax import checks
from ddim_jax.schedule import Array


def slerp(a: Array, b: Array, share: Array) -> Array:
    """`sin((1 - share) theta) / sin(theta) a + sin(share theta) / sin(theta) b`, theta the angle between a and b
    (Shoemake 1985; the paper, D.5).

    a, b: one latent each (...), of at least two values that are not all zero. share: a scalar in [0, 1]: 0 gives a, 1
    gives b. Where a and b point the same way it is the straight line; where they point opposite ways there is no
    shortest way, and it is NaN or of any direction. ValueError for a share outside [0, 1], for latents of two shapes,
    and for one that is zero or not finite.
    """
    checks.real("share", share, 0, 1)
    a, b = _pair(a, b)
    u, v = (x / jnp.sqrt(jnp.sum(x**2)) for x in (a, b))
    theta = 2 * jnp.arctan2(
        jnp.sqrt(jnp.sum((u - v) ** 2)), jnp.sqrt(jnp.sum((u + v) ** 2))
    )  # arccos would lose digits
    same = jnp.sin(theta) < 1e-4  # the quotients tend to 1 - share and share, where float32 loses them
    safe = jnp.where(same, 1.0, theta)
    weight = lambda part: jnp.where(same, part, jnp.sin(part * theta) / jnp.sin(safe))
    return weight(1 - share) * a + weight(share) * b


def line(a: Array, b: Array, count: int) -> Array:
    """`count` latents from a to b, both included, at equal angles. (count, ...), count at least 2; ValueError
    otherwise.
    """
    return jax.vmap(slerp, (None, None, 0))(*_pair(a, b), _shares("count", count))


def grid(corners: Array, rows: int, columns: int) -> Array:
    """Latents between four corners (4, ...): top left, top right, bottom left, bottom right. (rows, columns, ...), each
    at least 2; ValueError otherwise. Every row is a line between points of the left and of the right line.
    """
    corners = checks.batch("corners", corners)
    if len(corners) != 4:
        raise ValueError(f"corners must be 4 latents, got {len(corners)}")
    across, down = _shares("columns", columns), _shares("rows", rows)
    lines = jax.vmap(slerp, (None, None, 0))
    left, right = lines(*_pair(corners[0], corners[2]), down), lines(*_pair(corners[1], corners[3]), down)
    return jax.vmap(lines, (0, 0, None))(left, right, across)


def _pair(a: Array, b: Array) -> tuple[Array, Array]:
    """Two latents of one shape; ValueError otherwise, and where one is zero or not finite."""
    a, b = checks.floating("a", a), checks.floating("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {a.shape} and {b.shape}")
    for name, x in (("a", a), ("b", b)):
        if not checks.traced(x) and not (jnp.isfinite(x).all() and (x != 0).any()):
            raise ValueError(f"{name} must be finite and not all zero")
    return a, b


def _shares(name: str, count: int) -> Array:
    return jnp.linspace(0.0, 1.0, checks.integer(name, count, 2))
