"""Pixels to the range of the network and back. The same code for NumPy and JAX arrays."""


def to_unit(images):
    """uint8 0..255 -> float32 [-1, 1]: `x / 127.5 - 1`."""
    return images.astype("float32") / 127.5 - 1


def to_uint8(x):
    """[-1, 1] -> uint8 by rounding; what lies outside is clipped. The inverse of `to_unit` on all 256 values."""
    return ((x + 1) * 127.5 + 0.5).clip(0, 255).astype("uint8")
