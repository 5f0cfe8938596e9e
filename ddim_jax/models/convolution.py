"""The 3x3 convolution, in the formulation that a backend runs best, and that of a doubled image.

GPUs and TPUs have units for convolutions. On a CPU, XLA's run at the rate of its matrix products, and Winograd's form
needs 2.25 times fewer multiplications: a tile of 2x2 results out of 4x4 inputs is 16 products instead of 36 (Lavin and
Gray 2016, F(2x2, 3x3)). In float32 its error is that of the direct form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddim_jax.schedule import Array

# Below these, making tiles costs more than it saves: measured on two cores, see `benchmarks/README.md`.
LEAST_ROWS = 256  # of the products: for Winograd's B H W / 4, for a doubled image B H W of what it is made of
LEAST_CHANNELS = 128  # in, and out
MOST_PATCHES = 256  # B H W: more of them cost more than they save
_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv3x3(nn.Module):
    """(B, H, W, C) -> (B, H, W, features), zeros around, plus a bias: the parameters of `flax.linen.Conv`. doubled: of
    the image doubled, (B, 2 H, 2 W, features).
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
    """x (B, H, W, C), kernel (3, 3, C, K) -> (B, 2 H, 2 W, K): `convolve` of x with every pixel repeated in two rows
    and two columns.
    """
    batch, height, width, _ = x.shape
    if batch * height * width < LEAST_ROWS:
        return convolve(x.repeat(2, axis=1).repeat(2, axis=2), kernel)
    return folded(x, kernel)


def folded(x: Array, kernel: Array) -> Array:
    """The same without the repeated pixels. Of the three rows that a result sees two are the same, which two by whether
    its own row is even; so with columns. Each of the four kinds of results is a 2x2 convolution of x: 16 products where
    `direct` has 36.
    """
    batch, height, width, _ = x.shape
    # For even and for odd results: the kernel's rows, or columns, with those that see the same pixel added up.
    halves = lambda g: (jnp.stack([g[0], g[1] + g[2]]), jnp.stack([g[0] + g[1], g[2]]))
    of = lambda taps, down, right: jax.lax.conv_general_dilated(
        x, taps, (1, 1), ((1 - down, down), (1 - right, right)), dimension_numbers=_LAYOUT
    )
    rows = [
        [of(taps.swapaxes(0, 1), down, right) for right, taps in enumerate(halves(half.swapaxes(0, 1)))]
        for down, half in enumerate(halves(kernel))
    ]
    out = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
    return out.reshape(batch, 2 * height, 2 * width, -1)


def convolve(x: Array, kernel: Array) -> Array:
    """x (B, H, W, C), kernel (3, 3, C, K) -> (B, H, W, K), zeros around."""
    batch, height, width, channels = x.shape
    fits = height % 2 == 0 and width % 2 == 0 and batch * height * width // 4 >= LEAST_ROWS
    wide = min(channels, kernel.shape[-1]) >= LEAST_CHANNELS and x.dtype.itemsize >= 4
    if wide and fits:
        return jax.lax.platform_dependent(x, kernel, cpu=winograd, default=direct)
    if wide and batch * height * width <= MOST_PATCHES:
        return jax.lax.platform_dependent(x, kernel, cpu=patched, default=direct)
    return direct(x, kernel)


def direct(x: Array, kernel: Array) -> Array:
    """The backend's own."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


def patched(x: Array, kernel: Array) -> Array:
    """The same as one product of the 3x3 patches, (B H W, 9 C), with the kernel: for few of them the faster."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    rows = jnp.concatenate(patches, axis=-1).reshape(-1, 9 * channels)
    return (rows @ kernel.reshape(9 * channels, -1)).reshape(batch, height, width, -1)


@jax.custom_vjp
def winograd(x: Array, kernel: Array) -> Array:
    """The same by F(2x2, 3x3), H and W even: 16 matrix products of tiles (B H W / 4, C) with taps (C, K).

    Its gradients are such products too: of x the same with the kernel turned round, of the kernel tiles of x times
    those of the gradient. The tiles are made again for it: kept, they would be four times x.
    """
    x = jax.lax.optimization_barrier(x)  # else what made x is made again for every tile
    products = [tile @ tap for tile, tap in zip(_tiles(x), _taps(kernel), strict=True)]
    return _assembled(products, x.shape[:3])


def _backward(kept, gradient):
    x, kernel = kept
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    transposed = lambda tile, other: jax.lax.dot_general(tile, other, (((0,), (0,)), ((), ())))
    taps = [transposed(*pair) for pair in zip(_tiles(x), _spread(gradient), strict=True)]
    return winograd(gradient, jnp.swapaxes(kernel[::-1, ::-1], 2, 3)), _kernel_of(taps)


winograd.defvjp(lambda x, kernel: (winograd(x, kernel), (x, kernel)), _backward)


def _tiles(x: Array) -> list[Array]:
    """`B^T d B` of every 4x4 patch d, two apart: 16 arrays (B H W / 4, C)."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    turned = lambda d: (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])
    patches = [[padded[:, i : i + height : 2, j : j + width : 2] for i in range(4)] for j in range(4)]
    rows = zip(*map(turned, patches), strict=True)
    return [tile.reshape(-1, channels) for row in rows for tile in turned(row)]


def _taps(kernel: Array) -> list[Array]:
    """`G g G^T` of the kernel g: 16 arrays (C, K)."""
    turned = lambda g: (g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2])
    return [tap for row in turned(kernel) for tap in turned(row)]


def _assembled(products: Sequence[Array], shape: tuple[int, int, int]) -> Array:
    """`A^T m A` of every tile, put side by side: (B, H, W, K)."""
    batch, height, width = shape
    tiles = [product.reshape(batch, height // 2, width // 2, -1) for product in products]
    turned = lambda m: (m[0] + m[1] + m[2], m[1] - m[2] - m[3])
    rows = zip(*(turned(tiles[j::4]) for j in range(4)), strict=True)
    out = jnp.stack([jnp.stack(turned(row), axis=3) for row in rows], axis=2)
    return out.reshape(batch, height, width, -1)


def _spread(gradient: Array) -> list[Array]:
    """The transpose of `_assembled`: 16 arrays (B H W / 4, K)."""
    turned = lambda y: (y[0], y[0] + y[1], y[0] - y[1], -y[1])
    corners = [turned([gradient[:, i::2, j::2] for i in range(2)]) for j in range(2)]
    return [tile.reshape(-1, gradient.shape[-1]) for row in zip(*corners, strict=True) for tile in turned(row)]


def _kernel_of(taps: Sequence[Array]) -> Array:
    """The transpose of `_taps`: (3, 3, C, K)."""
    turned = lambda u: (u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3])
    rows = [turned(taps[i : i + 4]) for i in range(0, 16, 4)]
    columns = [turned(column) for column in zip(*rows, strict=True)]  # [j][i]: of kernel[i, j]
    return jnp.stack([jnp.stack(row) for row in zip(*columns, strict=True)])
