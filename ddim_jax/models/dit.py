"""DiT, the diffusion transformer with adaLN-Zero (Peebles and Xie 2023), on pixels.

Every patch of the image is a token. The network is numerically equal to the published code: fixed sinusoids for the
position of a patch, LayerNorm with epsilon 1e-6, GELU with the tanh approximation, and 256 sinusoids for the time with
the frequencies `10000^(-i / 128)`, cos before sin. Parameters are float32. `dtype` is the dtype of the matrix products;
normalization, softmax and the output stay in float32. Images are (B, H, W, C), channels last.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddim_jax import checks
from ddim_jax.models.sizes import check_label_dropout
from ddim_jax.models.unet import (
    DTYPES,
    Dropout,
    check_inputs,
    depth_to_space,
    sinusoid,
    space_to_depth,
    with_label_dropout,
)
from ddim_jax.schedule import Array
from ddim_jax.utils import ranges

# The published initialization. The modulation layers start at 0: every block is the identity, and the output is 0.
_INIT = nn.initializers.xavier_uniform()
_EMBEDDING = nn.initializers.normal(0.02)
_ZERO = nn.initializers.zeros

TIME_FEATURES = 256
EPSILON = 1e-6  # of LayerNorm


def positions(side: int, features: int, dtype: Any = jnp.float32) -> Array:
    """The position embedding of the patches, row by row, (1, side^2, features): sinusoids of the column, then of the
    row.

    side: the number of patches per row and per column.
    features: a multiple of 4.
    """
    waves = sinusoid(jnp.arange(side, dtype=dtype), features // 2, shift=0.0)
    shape = (side, side, features // 2)
    both = jnp.concatenate([jnp.broadcast_to(waves[None], shape), jnp.broadcast_to(waves[:, None], shape)], axis=-1)
    return both.reshape(1, side**2, features)


def modulated_norm(x: Array, shift: Array, scale: Array) -> Array:
    """adaLN: LayerNorm without parameters (Ba et al. 2016), times 1 + scale, plus shift. Computed in float32 or wider.

    x: (B, N, D).
    shift, scale: (B, D).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    h, shift, scale = x.astype(dtype), shift[:, None].astype(dtype), scale[:, None].astype(dtype)
    h -= h.mean(-1, keepdims=True)
    h *= jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + EPSILON)
    return (h * (1 + scale) + shift).astype(x.dtype)


def attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(query key / sqrt(C)) value for each head.

    query, key, value: (B, N, heads, C). Returns the same shape.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    # Not jax.nn.dot_product_attention, which computes in float32 at most.
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=dtype)
    weights = jax.nn.softmax(logits / query.shape[-1] ** 0.5, axis=-1)
    return jnp.einsum("bhqk,bkhc->bqhc", weights.astype(value.dtype), value)


class Block(nn.Module):
    """A DiT block: self-attention, then an MLP, each with a modulated norm before it and a gated residual connection.

    condition (B, D) gives shift, scale and gate of both. Dropout is applied to the output of both, before the gate.
    """

    num_heads: int
    mlp_features: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, condition, train):
        batch, tokens, features = x.shape
        dense = lambda width, name, init=_INIT: nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name)
        modulation = jnp.split(dense(6 * features, "modulation", _ZERO)(condition), 6, axis=-1)
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = modulation

        h = dense(3 * features, "qkv")(modulated_norm(x, shift_0, scale_0))
        query, key, value = jnp.moveaxis(h.reshape(batch, tokens, 3, self.num_heads, -1), 2, 0)
        h = dense(features, "out")(attention(query, key, value).reshape(x.shape))
        x += gate_0[:, None] * Dropout(self.dropout)(h, train)

        h = nn.gelu(dense(self.mlp_features, "mlp_0")(modulated_norm(x, shift_1, scale_1)))
        h = dense(features, "mlp_1")(h)
        return x + gate_1[:, None] * Dropout(self.dropout)(h, train)


class DiT(nn.Module):
    """The diffusion transformer: eps, x_0 or v from (x_t, time). The defaults give DiT-S/2 for images of CIFAR-10.

    image_size: H = W.
    image_channels: C.
    patch_size: each patch of patch_size x patch_size pixels is one token.
    depth: the number of blocks.
    hidden_size: features of a token.
    num_heads: attention heads, with hidden_size / num_heads features each.
    mlp_ratio: features of the hidden layer of the MLP, as a multiple of hidden_size, rounded down.
    num_classes: 0 for none. Otherwise labels are required.
    label_dropout: in training a label is replaced by the class num_classes, "no class", with this probability, so that
        the network can be used for classifier-free guidance (Ho and Salimans 2022).
    remat: recompute the blocks in the backward pass instead of storing their activations: less memory, a third more
        time.
    """

    image_size: int = ranges.at_least(1, 2048, 32)
    image_channels: int = ranges.at_least(1, 4096, 3)
    patch_size: int = ranges.at_least(1, 64, 2)
    depth: int = ranges.at_least(1, 128, 12)
    hidden_size: int = ranges.at_least(4, 1 << 16, 384)
    num_heads: int = ranges.at_least(1, 1 << 10, 6)
    mlp_ratio: float = ranges.at_least(0, 64, 4.0)
    dropout: float = ranges.below_one(0.0)
    num_classes: int = ranges.at_least(0, 1_000_000, 0)
    label_dropout: float = ranges.below_one(0.0)
    dtype: Any = ranges.named(DTYPES, "float32")
    remat: bool = False

    @property
    def width(self) -> int:
        """The number of features of a token."""
        return self.hidden_size

    @property
    def width_in(self) -> int:
        """The number of features of the first layer's output."""
        return self.hidden_size

    def check(self) -> None:
        """Raises a ValueError that names the field if the sizes are inconsistent."""
        for name in ("image_size", "image_channels", "patch_size", "depth", "hidden_size", "num_heads"):
            checks.integer(name, getattr(self, name), 1)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size must divide image_size {self.image_size}, got {self.patch_size}")
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of 4 (for the sin and cos of the row and of the column), got "
                f"{self.hidden_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads}")
        if not 1 <= self.mlp_ratio * self.hidden_size < float("inf"):
            raise ValueError(
                f"mlp_ratio must give at least 1 feature, got {self.mlp_ratio} times hidden_size {self.hidden_size}"
            )
        check_label_dropout(self)

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        """The network output, (B, H, W, C), at least float32.

        x: (B, H, W, C).
        time: (B,), counts 0..T-1, as in every published network.
        labels: (B,) ints in 0..num_classes - 1, or num_classes for "no class" if label_dropout is above 0.
        train: whether dropout of features and of labels is active. It then needs a "dropout" rng.
        """
        check_inputs(self, x, labels)
        dense = lambda width, name, init: nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name)
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block  # 3: train

        embedding = sinusoid(time, TIME_FEATURES, shift=0.0, cos_first=True)
        embedding = nn.silu(dense(self.hidden_size, "time_0", _EMBEDDING)(embedding))
        embedding = dense(self.hidden_size, "time_1", _EMBEDDING)(embedding)
        if self.num_classes:
            labels, rows = with_label_dropout(self, labels, train)
            classes = nn.Embed(rows, self.hidden_size, dtype=self.dtype, embedding_init=_EMBEDDING, name="class")
            embedding += classes(labels)
        condition = nn.silu(embedding)

        patches = space_to_depth(x, self.patch_size)
        batch, side, _, features = patches.shape
        h = dense(self.hidden_size, "patch_in", _INIT)(patches.reshape(batch, side**2, features))
        output_dtype = jnp.promote_types(h.dtype, jnp.float32)
        h += positions(side, self.hidden_size, output_dtype).astype(h.dtype)
        for i in range(self.depth):
            mlp_features = int(self.mlp_ratio * self.hidden_size)
            h = block(self.num_heads, mlp_features, self.dropout, self.dtype, name=f"block_{i}")(h, condition, train)
        shift, scale = jnp.split(dense(2 * self.hidden_size, "modulation_out", _ZERO)(condition), 2, axis=-1)
        h = dense(features, "patch_out", _ZERO)(modulated_norm(h, shift, scale))
        return depth_to_space(h.reshape(patches.shape), self.patch_size).astype(output_dtype)
