"""Classifier-free guidance and inpainting, as combinators: functions from a denoiser to a denoiser, for any sampler.

The combinators that bound the predicted x_0, `clip_x0` and `threshold_x0`, are in `gaussian`.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddim_jax import checks
from ddim_jax.gaussian import Denoise, Model, Prediction, as_denoise, with_x0
from ddim_jax.schedule import Array


def guided(model: Model, unguided: Model, scale: Array | float) -> Denoise:
    """Classifier-free guidance (Ho and Salimans 2022): `eps = eps_uncond + scale (eps_cond - eps_uncond)`.

    The same formula holds for the predicted x_0. A predicted variance is that of the conditional denoiser.

    model: the conditional denoiser.
    unguided: the unconditional denoiser, or a weaker network (autoguidance, Karras et al. 2024).
    scale: finite, a scalar or an array that broadcasts against x_t. 1 is the conditional denoiser, 0 is the
        unconditional denoiser, above 1 extrapolates. Ho and Salimans call `scale - 1` w. Raises ValueError otherwise.

    Each call of the result calls both networks.
    """
    models = as_denoise(model), as_denoise(unguided, name="unguided")
    return Denoise(_guided, *models, checks.reals("scale", scale))


def _guided(model, unguided, scale, x_t, level):
    checks.broadcasts("scale", scale, x_t.shape)
    uncond, cond = unguided(x_t, level), model(x_t, level)
    extrapolated = [a + scale * (b - a) for a, b in zip(uncond, cond, strict=True)]
    return Prediction(*extrapolated, cond.variance_fraction)


def inpainted(model: Model, known: Array, mask: Array) -> Denoise:
    """Inpainting: a denoiser with known pixels of x_0. The network predicts the other pixels.

    known: (B, ...), floating point, the known x_0. It must be finite where mask is True; other values are not used.
    mask: True (or 1) for a known pixel, False (or 0) for the others; broadcasts against known.

    At known pixels the predicted x_0 is replaced by known, and eps is recomputed, see `gaussian.with_x0`. So these
    pixels follow q_sigma(x_s | x_t, x_0) of Eq. (7): every x_t has the marginal (4), and the last step returns known.
    The other pixels are sampled by a network that sees all pixels of x_t. They are more consistent with the known
    pixels if the sampler adds more noise: eta = 1 rather than eta = 0. Raises ValueError for an invalid known or mask.
    """
    known, mask = checks.batch("known", known), _as_mask(mask)
    checks.broadcasts("mask", mask, known.shape)
    if not checks.traced(known, mask) and not jnp.isfinite(jnp.where(mask, known, 0)).all():
        raise ValueError("known must be finite where mask is True")
    return with_x0(model, Partial(_replace_known, known, mask))


def _as_mask(mask):
    if not isinstance(mask, Array):
        mask = np.asarray(mask)
    if mask.dtype != bool:
        checks.reals("mask", mask, 0, 1)
        if not checks.traced(mask) and not ((mask == 0) | (mask == 1)).all():
            raise ValueError("mask must contain only True and False, or 0 and 1")
    return jnp.asarray(mask, bool)


def _replace_known(known, mask, x_0):
    checks.broadcasts("known", known, x_0.shape)
    return jnp.where(mask, known.astype(x_0.dtype), x_0)
