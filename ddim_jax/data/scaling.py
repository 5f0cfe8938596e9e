"""Pixels to the range of the network and back. The same code for NumPy and JAX arrays."""

import numpy as np


def to_unit(images):
    """uint8 0..255 -> float32 [-1, 1]: `x / 127.5 - 1`."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8 by rounding; what lies outside is clipped. The inverse of `to_unit` on all 256 values."""
    return ((x + 1) * 127.5 + 0.5).clip(0, 255).astype("uint8")


def to_one_hot(classes, images):
    """uint8 (..., 1) -> float32 (..., classes): the nearest of so many grey levels, evenly spaced in 0..255."""
    level = (images * np.float32((classes - 1) / 255)).round()
    return (level == np.arange(classes, dtype=np.float32).reshape((1,) * (images.ndim - 1) + (-1,))).astype("float32")


def from_one_hot(x):
    """(..., classes) -> uint8 (..., 1). The inverse of `to_one_hot` on grey levels that are there."""
    level = x.argmax(-1)[..., None]
    return (level * np.float32(255 / (x.shape[-1] - 1))).round().astype("uint8")
