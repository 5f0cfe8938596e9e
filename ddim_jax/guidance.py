"""Guidance and inpainting, as combinators around a denoiser: the same under every sampler.

Bounds of the predicted x_0, `clip_x0` and `threshold_x0`, are in `gaussian`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddim_jax import checks
from ddim_jax.gaussian import Denoise, Model, as_denoise, with_x0
from ddim_jax.schedule import Array


def guided(model: Model, unguided: Model, scale: Array | float) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): `eps = eps_none + scale (eps_class - eps_none)`, and so for x_0.

    model: conditioned on the class. unguided: not conditioned, or a weaker network (Karras et al. 2024). scale: 1 is
    the model alone, 0 is unguided alone, above 1 goes beyond; Ho and Salimans call `scale - 1` w. Two network calls for
    one. ValueError for a scale that is not finite.
    """
    models = as_denoise(model), as_denoise(unguided, name="unguided")
    return Denoise(_guided, *models, checks.reals("scale", scale))


def _guided(model, unguided, scale, x_t, level):
    checks.broadcasts("scale", scale, x_t.shape)
    extrapolate = lambda without, with_class: without + scale * (with_class - without)
    return jax.tree.map(extrapolate, unguided(x_t, level), model(x_t, level))


def inpainted(model: Model, known: Array, mask: Array) -> Denoise:
    """A denoiser that knows pixels of x_0, and leaves the others to the network.

    Where x_0 is known it replaces the predicted one, so that these pixels follow q_sigma(x_s | x_t, x_0) of Eq. (7)
    itself: each of their x_t has the law (4), and the last step ends at the pixels. The other pixels are drawn by a
    network that sees both, and agree with them better the more noise the sampler draws: eta = 1 rather than 0. known:
    (B, ...) of floating point, x_0 where mask is True, finite there. mask: bool, or 0 and 1; broadcasts against known.
    ValueError otherwise.
    """
    known, mask = checks.batch("known", known), _as_mask(mask)
    checks.broadcasts("mask", mask, known.shape)
    if not checks.traced(known, mask) and not jnp.isfinite(jnp.where(mask, known, 0)).all():
        raise ValueError("known must be finite where mask is True")
    return with_x0(model, Partial(_known, known, mask))


def _as_mask(mask):
    if not isinstance(mask, Array):
        mask = np.asarray(mask)
    if mask.dtype != bool:
        checks.reals("mask", mask, 0, 1)
        if not checks.traced(mask) and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask must hold nothing but True and False, or 0 and 1")
    return jnp.asarray(mask, bool)


def _known(known, mask, x_0):
    checks.broadcasts("known", known, x_0.shape)
    return jnp.where(mask, known.astype(x_0.dtype), x_0)
