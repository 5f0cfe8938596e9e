"""3x3 convolutions in the fastest form for each backend, also of an upsampled image.

GPUs and TPUs have units for convolutions, so the convolution of XLA is used there. On a CPU the convolution of XLA runs
at the rate of its matrix product, and the Winograd form needs 2.25 times fewer multiplications: a tile of 2x2 outputs
from 4x4 inputs needs 16 multiplications instead of 36 (Lavin and Gray 2016, F(2x2, 3x3)). In float32 its error is that
of the direct form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddim_jax.schedule import Array

# Outside these limits computing the tiles or patches costs more time than it saves: measured on two cores, see
# `benchmarks/README.md`.
MIN_ROWS = 256  # rows of the matrix products: B H W / 4 for Winograd, B H W of x for the convolution of an upsampled x
MIN_CHANNELS = 128  # input channels and output channels
MAX_PATCHES = 256  # B H W, for im2col
_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv3x3(nn.Module):
    """A 3x3 convolution with zero padding and a bias, (B, H, W, C) -> (B, H, W, features).

    The parameters are those of `flax.linen.Conv`. upsample: x is upsampled first, by nearest neighbor; the output is
    (B, 2 H, 2 W, features).
    """

    features: int
    kernel_init: Callable[..., Array]
    dtype: Any
    upsample: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return (convolve_upsampled if self.upsample else convolve)(x, kernel) + bias[None, None, None]


def convolve_upsampled(x: Array, kernel: Array) -> Array:
    """`convolve` of x upsampled by nearest neighbor: every pixel is repeated in two rows and two columns.

    x: (B, H, W, C). kernel: (3, 3, C, K). Returns (B, 2 H, 2 W, K).
    """
    batch, height, width, _ = x.shape
    if batch * height * width < MIN_ROWS:
        return convolve(x.repeat(2, axis=1).repeat(2, axis=2), kernel)
    return folded(x, kernel)


def folded(x: Array, kernel: Array) -> Array:
    """`convolve_upsampled` without the upsampled image.

    An output pixel depends on three rows of the upsampled image, and two of them are equal. Which two depends on
    whether the row of the output is even or odd. The same holds for columns. So each of the four parities is a 2x2
    convolution of x, with 16 multiplications instead of the 36 of `direct`.
    """
    batch, height, width, _ = x.shape
    # For even and for odd outputs: the rows (or columns) of the kernel that multiply the same pixel are added.
    fold = lambda g: (jnp.stack([g[0], g[1] + g[2]]), jnp.stack([g[0] + g[1], g[2]]))
    conv_2x2 = lambda taps, odd_row, odd_column: jax.lax.conv_general_dilated(
        x, taps, (1, 1), ((1 - odd_row, odd_row), (1 - odd_column, odd_column)), dimension_numbers=_LAYOUT
    )
    rows = [
        [conv_2x2(taps.swapaxes(0, 1), odd_row, odd_column) for odd_column, taps in enumerate(fold(g.swapaxes(0, 1)))]
        for odd_row, g in enumerate(fold(kernel))
    ]
    out = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
    return out.reshape(batch, 2 * height, 2 * width, -1)


def convolve(x: Array, kernel: Array) -> Array:
    """A 3x3 convolution with zero padding, in the fastest form.

    x: (B, H, W, C). kernel: (3, 3, C, K). Returns (B, H, W, K).
    """
    batch, height, width, channels = x.shape
    fits = height % 2 == 0 and width % 2 == 0 and batch * height * width // 4 >= MIN_ROWS
    wide = min(channels, kernel.shape[-1]) >= MIN_CHANNELS and x.dtype.itemsize >= 4
    if wide and fits:
        return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=direct)
    if wide and batch * height * width <= MAX_PATCHES:
        return jax.lax.platform_dependent(x, kernel, cpu=patched, default=direct)
    return direct(x, kernel)


def direct(x: Array, kernel: Array) -> Array:
    """`convolve` by the convolution of XLA."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def patched(x: Array, kernel: Array) -> Array:
    """`convolve` by im2col: one matrix product of the 3x3 patches, (B H W, 9 C), with the kernel.

    It is faster than `direct` for few patches.
    """
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = jnp.concatenate(patches, axis=-1).reshape(-1, 9 * channels)
    return (rows @ kernel.reshape(9 * channels, -1)).reshape(batch, height, width, -1)


@jax.custom_vjp
def winograd(x: Array, kernel: Array) -> Array:
    """`convolve` by F(2x2, 3x3), H and W even: 16 matrix products of tiles (B H W / 4, C) with taps (C, K).

    Its gradients are matrix products of the same kind. That of x is the same function with the kernel rotated by 180
    degrees. That of the kernel is the product of the tiles of x and those of the output's gradient. The tiles are
    recomputed for the gradient: storing them would need four times the memory of x.
    """
    x = jax.lax.optimization_barrier(x)  # otherwise XLA recomputes x for every tile
    products = [tile @ tap for tile, tap in zip(_tiles(x), _taps(kernel), strict=True)]
    return _assembled(products, x.shape[:3])


def _backward(residuals, gradient):
    x, kernel = residuals
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    transposed_product = lambda tile, other: jax.lax.dot_general(tile, other, (((0,), (0,)), ((), ())))
    taps = [transposed_product(*pair) for pair in zip(_tiles(x), _assembled_transpose(gradient), strict=True)]
    return winograd(gradient, jnp.swapaxes(kernel[::-1, ::-1], 2, 3)), _taps_transpose(taps)


winograd.defvjp(lambda x, kernel: (winograd(x, kernel), (x, kernel)), _backward)


def _tiles(x: Array) -> list[Array]:
    """`B^T d B` of every 4x4 patch d with stride 2: 16 arrays (B H W / 4, C)."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    transform = lambda d: (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])
    patches = [[padded[:, i : i + height : 2, j : j + width : 2] for i in range(4)] for j in range(4)]
    rows = zip(*map(transform, patches), strict=True)
    return [tile.reshape(-1, channels) for row in rows for tile in transform(row)]


def _taps(kernel: Array) -> list[Array]:
    """`G g G^T` of the kernel g: 16 arrays (C, K)."""
    transform = lambda g: (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2])
    return [tap for row in transform(kernel) for tap in transform(row)]


def _assembled(products: Sequence[Array], shape: tuple[int, int, int]) -> Array:
    """`A^T m A` of every tile, assembled to an image: (B, H, W, K)."""
    batch, height, width = shape
    tiles = [product.reshape(batch, height // 2, width // 2, -1) for product in products]
    transform = lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3])
    rows = zip(*(transform(tiles[j::4]) for j in range(4)), strict=True)
    out = jnp.stack([jnp.stack(transform(row), axis=3) for row in rows], axis=2)
    return out.reshape(batch, height, width, -1)


def _assembled_transpose(gradient: Array) -> list[Array]:
    """The transpose of the linear map `_assembled`: 16 arrays (B H W / 4, K)."""
    transform = lambda y: (y[0], y[0] + y[1], y[0] - y[1], -y[1])
    corners = [transform([gradient[:, i::2, j::2] for i in range(2)]) for j in range(2)]
    return [tile.reshape(-1, gradient.shape[-1]) for row in zip(*corners, strict=True) for tile in transform(row)]


def _taps_transpose(taps: Sequence[Array]) -> Array:
    """The transpose of the linear map `_taps`: (3, 3, C, K)."""
    transform = lambda u: (u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3])
    rows = [transform(taps[i : i + 4]) for i in range(0, 16, 4)]
    columns = [transform(column) for column in zip(*rows, strict=True)]  # columns[j][i] is the gradient of kernel[i, j]
    return jnp.stack([jnp.stack(row) for row in zip(*columns, strict=True)])
