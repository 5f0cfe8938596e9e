"""Conversions between uint8 pixels and the range of the network, for NumPy and JAX arrays."""

import numpy as np


def to_unit(images):
    """uint8 0..255 -> float32 [-1, 1]: `x / 127.5 - 1`."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8 0..255, rounded; values outside the range are clipped. It inverts `to_unit` exactly."""
    return ((x + 1) * 127.5 + 0.5).clip(0, 255).astype("uint8")


def to_one_hot(classes, images):
    """uint8 (..., 1) -> float32 (..., classes): the one-hot vector of the nearest grey level. The `classes` grey levels
    are evenly spaced in 0..255.
    """
    level = (images * np.float32((classes - 1) / 255)).round()
    return (level == np.arange(classes, dtype=np.float32).reshape((1,) * (images.ndim - 1) + (-1,))).astype("float32")


def from_one_hot(x):
    """(..., classes) -> uint8 (..., 1): the grey level of the largest entry. It inverts `to_one_hot` on its levels."""
    level = x.argmax(-1)[..., None]
    return (level * np.float32(255 / (x.shape[-1] - 1))).round().astype("uint8")
