"""Between latents: what lies on the way from one x_T to another (section 5.3 and D.5).

x_T ~ N(0, I) in d dimensions lies near the sphere of radius sqrt(d), and so must what is between two of them: straight
lines cut through the inside, where no noise is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ddim_jax.schedule import Array


def slerp(a: Array, b: Array, share: Array) -> Array:
    """`sin((1 - share) theta) / sin(theta) a + sin(share theta) / sin(theta) b`, theta the angle between a and b
    (Shoemake 1985; the paper, D.5).

    a, b: one latent each (...), of at least two values that are not all zero. share: a scalar in [0, 1]: 0 gives a, 1
    gives b. Where a and b point the same way it is the straight line; where they point opposite ways there is no
    shortest way, and it is NaN or of any direction.
    """
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
    return jax.vmap(slerp, (None, None, 0))(a, b, _shares(count))


def grid(corners: Array, rows: int, columns: int) -> Array:
    """Latents between four corners (4, ...): top left, top right, bottom left, bottom right. (rows, columns, ...), each
    at least 2; ValueError otherwise. Every row is a line between points of the left and of the right line.
    """
    if len(corners) != 4:
        raise ValueError(f"corners must be 4 latents, got {len(corners)}")
    left, right = line(corners[0], corners[2], rows), line(corners[1], corners[3], rows)
    return jax.vmap(line, (0, 0, None))(left, right, columns)


def _shares(count: int) -> Array:
    if count < 2:
        raise ValueError(f"a line has at least 2 points, got {count}")
    return jnp.linspace(0.0, 1.0, count)
