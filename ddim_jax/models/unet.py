"""The U-Net of DDPM (Ho et al. 2020, appendix B), numerically the one whose weights are published.

What makes it that one: padding on the right and bottom only before a stride-2 convolution, GroupNorm with
epsilon 1e-6, sinusoids with frequencies `10000^(-i / (half - 1))` and sin before cos. These are the defaults of
fields, because networks trained with diffusers were published with the other choice of each. Parameters are
float32; `dtype` is what convolutions compute in, while normalisation, softmax and the output stay in float32.
Images are (B, H, W, C), channels last.

One file because the blocks are of no use without the network that they are numbered by.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.models.convolution import Conv3x3
from ddim_jax.schedule import Array
from ddim_jax.utils import ranges

# Ho's initialisation: uniform with variance 1 / mean(fan_in, fan_out); what closes a residual branch starts at 0.
_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_ZERO = nn.initializers.zeros

# The largest sizes, far beyond all that are known: a file may ask for any, and is refused before anything of that size
# is made.
MOST_LEVELS = 12  # resolutions
MOST_BLOCKS = 128  # residual blocks, in all

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# Rows and columns of zeros (before, after) each axis of the image, where a stride-2 convolution halves it.
DOWNSAMPLE_PADDING = {"end": ((0, 1), (0, 1)), "both": ((1, 1), (1, 1))}


def sinusoid(time: Array, features: int, shift: float = 1.0, cos_first: bool = False) -> Array:
    """Embeds times (B,) as (B, features), at least float32: sin, then cos, of `time * 10000^(-i / (half - shift))`,
    i = 0..half-1.

    features: even, at least 4. shift: below half. cos_first: cos, then sin. The frequencies are rounded from
    float64, which a float64 network agrees with best: at time 999 one unit in their last place moves the sinusoids
    by 6e-5.
    """
    half = features // 2
    frequencies = np.exp(-np.log(10000.0) / (half - shift) * np.arange(half))
    dtype = jnp.promote_types(time.dtype, jnp.float32)
    angles = time.astype(dtype)[:, None] * frequencies[None].astype(dtype)
    waves = (jnp.cos(angles), jnp.sin(angles)) if cos_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


def space_to_depth(x: Array, size: int) -> Array:
    """(B, H, W, C) -> (B, H / size, W / size, size^2 C): the pixels of each size x size square, row by row."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // size, size, width // size, size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


def depth_to_space(x: Array, size: int) -> Array:
    """The inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height, width, size, size, channels // size**2).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, height * size, width * size, -1)


def check_inputs(network: nn.Module, x: Array, labels: Array | None) -> None:
    """ValueError unless x (B, H, W, C) and labels are what a network with these sizes and classes takes."""
    shape = network.image_size, network.image_size, network.image_channels
    if x.shape[1:] != shape:
        expected, got = ("x".join(map(str, sizes)) for sizes in (shape, x.shape[1:]))
        raise ValueError(f"the network takes images {expected}, got {got}")
    if (labels is None) != (network.num_classes == 0):
        raise ValueError(f"a network with num_classes {network.num_classes} got labels {labels}")


def with_label_dropout(network: nn.Module, labels: Array, train: bool) -> tuple[Array, int]:
    """The labels (B,), each replaced by the class num_classes with probability label_dropout if train (Ho and Salimans
    2022), and the number of classes with that one, where there is one.
    """
    if train and network.label_dropout:
        dropped = jax.random.bernoulli(network.make_rng("dropout"), network.label_dropout, labels.shape)
        labels = jnp.where(dropped, network.num_classes, labels)
    return labels, network.num_classes + (network.label_dropout > 0)


class GroupNorm(nn.Module):
    """GroupNorm over (H, W, C / groups) with float32 statistics and a scale and bias per channel (Wu and He 2018).

    The statistics are folded into scale and bias first, so that normalising is one multiplication and one addition
    per value.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1, channels)
        # Over positions first, channel by channel: the order in which they lie in memory.
        over_group = lambda values: values.mean(1).reshape(x.shape[0], self.groups, -1).mean(-1)
        of_channels = lambda statistic: jnp.repeat(statistic, channels // self.groups, axis=1)[:, None]
        mean = over_group(wide)
        variance = over_group(jnp.square(wide - of_channels(mean)))
        factor = of_channels(jax.lax.rsqrt(variance + self.epsilon)) * scale[None, None]
        shift = bias[None, None] - of_channels(mean) * factor
        return (wide * factor + shift).reshape(x.shape).astype(x.dtype)


class Dropout(nn.Module):
    """Sets each value to 0 with a probability of `rate`, rounded down to 16 bits, and divides the rest by that of
    staying (Srivastava et al. 2014). flax.linen.Dropout draws 32 bits for a value, twice the time.

    x: (B, H, W, C), C even. Needs a "dropout" rng, if train.
    """

    rate: float

    @nn.compact
    def __call__(self, x, train):
        dropped = int(self.rate * 2**16)
        if not train or not dropped:
            return x
        words = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], x.shape[-1] // 2), jnp.uint32)
        drawn = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape)
        return jnp.where(drawn >= dropped, x * (2**16 / (2**16 - dropped)), 0)


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3; plus the time embedding; norm, SiLU, dropout, 3x3; plus the input, by a 1x1 where channels
    change.
    """

    channels: int
    groups: int
    epsilon: float
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, embedding, train):
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm_0")(x))
        h = Conv3x3(self.channels, _INIT, self.dtype, name="conv_0")(h)
        h += nn.Dense(self.channels, kernel_init=_INIT, dtype=self.dtype, name="embedding")(nn.silu(embedding))[
            :, None, None
        ]
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm_1")(h))
        h = Dropout(self.dropout)(h, train)
        h = Conv3x3(self.channels, _ZERO, self.dtype, name="conv_1")(h)
        if x.shape[-1] != self.channels:
            shortcut = nn.Dense(self.channels, kernel_init=_INIT, dtype=self.dtype, name="shortcut")
            x = shortcut(x.reshape(-1, x.shape[-1])).reshape(h.shape)  # as rows: the gradient needs no transposition
        return x + h


class Attention(nn.Module):
    """Self-attention over the H W positions, scaled by 1 / sqrt(channels of a head), with a residual connection."""

    groups: int
    epsilon: float
    head_channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        heads = channels // (self.head_channels or channels)
        dense = dict(dtype=self.dtype)
        h = GroupNorm(self.groups, self.epsilon, name="norm")(x).reshape(-1, channels)
        query, key, value = (
            nn.Dense(channels, kernel_init=_INIT, name=name, **dense)(h).reshape(batch, height * width, heads, -1)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum(
            "bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.promote_types(h.dtype, jnp.float32)
        )
        weights = jax.nn.softmax(logits / (channels // heads) ** 0.5, axis=-1)  # jax.nn's attention: float32 at most
        h = jnp.einsum("bhqk,bkhc->bqhc", weights.astype(value.dtype), value).reshape(-1, channels)
        return x + nn.Dense(channels, kernel_init=_ZERO, name="out", **dense)(h).reshape(x.shape)


class UNet(nn.Module):
    """eps, x_0 or v from (x_t, time); with the defaults the 35,746,307 parameters of DDPM's CIFAR-10 network.

    image_size: H = W. patch_size: above 1, each square of so many pixels is one position of the network, with
    patch_size^2 times the channels (space-to-depth). Height and width in positions, H / patch_size, are halved
    len(channel_mult) - 1 times. attention_resolutions: sizes, in positions, at which every block is followed by
    attention. middle_attention: whether the middle has one. head_channels: channels of an attention
    head, 0 for a single head. downsample_padding: a name in DOWNSAMPLE_PADDING. frequency_shift, cos_first: see
    `sinusoid`. num_classes: 0 for none, else `labels` are required. label_dropout: above 0 there is one more class,
    num_classes, which says nothing of the image; in training a label is replaced by it with this probability, so
    that the network can guide itself (Ho and Salimans 2022). remat: compute the blocks again for the gradient instead
    of keeping what they computed: less memory, a third more time.
    """

    image_size: int = ranges.at_least(1, 2048, 32)
    image_channels: int = ranges.at_least(1, 4096, 3)
    patch_size: int = ranges.at_least(1, 64, 1)
    channels: int = ranges.at_least(4, 4096, 128)
    channel_mult: tuple[int, ...] = ranges.all_positive(MOST_LEVELS, 64, (1, 2, 2, 2))
    num_res_blocks: int = ranges.at_least(1, MOST_BLOCKS, 2)
    attention_resolutions: tuple[int, ...] = ranges.at_most_so_many(MOST_LEVELS, (16,))
    middle_attention: bool = True
    head_channels: int = ranges.at_least(0, 1 << 18, 0)
    groups: int = ranges.at_least(1, 1 << 18, 32)
    norm_epsilon: float = ranges.above_zero(1e-6)
    downsample_padding: str = ranges.one_of(DOWNSAMPLE_PADDING, "end")
    frequency_shift: float = 1.0
    cos_first: bool = False
    dropout: float = ranges.below_one(0.1)
    num_classes: int = ranges.at_least(0, 1_000_000, 0)
    label_dropout: float = ranges.below_one(0.0)
    dtype: Any = ranges.named(DTYPES, "float32")
    remat: bool = False

    @property
    def width(self) -> int:
        """The most channels of a layer."""
        return self.channels * max(self.channel_mult)

    @property
    def width_in(self) -> int:
        """The channels of the first layer."""
        return self.channels

    def check(self) -> None:
        """ValueError, naming the field, if the sizes do not fit together."""
        blocks = len(self.channel_mult) * (2 * self.num_res_blocks + 1)
        if blocks > MOST_BLOCKS:
            raise ValueError(
                f"num_res_blocks {self.num_res_blocks} and channel_mult {self.channel_mult} make {blocks} residual "
                f"blocks, at most {MOST_BLOCKS} are built"
            )
        halvings = len(self.channel_mult) - 1
        least = self.patch_size * 2**halvings
        if self.image_size % least or self.image_size < least:
            patches = f" in patches of {self.patch_size}" if self.patch_size > 1 else ""
            raise ValueError(
                f"image_size {self.image_size}{patches} cannot be halved {halvings} times, as channel_mult "
                f"{self.channel_mult} asks; it must be a multiple of {least}"
            )
        sizes = [self.image_size // self.patch_size >> level for level in range(halvings + 1)]
        for size in self.attention_resolutions:
            if size not in sizes:
                raise ValueError(f"attention_resolutions names {size}, but the network's sizes are {sizes}")
        widths = [self.channels * mult for mult in self.channel_mult]
        for width in [self.channels, *widths]:
            if width % self.groups:
                raise ValueError(
                    f"groups {self.groups} does not divide the {width} channels that channels {self.channels} and "
                    f"channel_mult {self.channel_mult} give"
                )
        attended = [width for size, width in zip(sizes, widths, strict=True) if size in self.attention_resolutions]
        for width in attended + widths[-1:] * self.middle_attention:
            if self.head_channels and width % self.head_channels:
                raise ValueError(f"head_channels {self.head_channels} does not divide {width} channels")
        if self.channels % 2 or self.channels < 4:
            raise ValueError(f"channels must be even and at least 4, got {self.channels}")
        if not self.frequency_shift < self.channels // 2:
            raise ValueError(
                f"frequency_shift must be below half of channels {self.channels}, got {self.frequency_shift}"
            )
        if self.label_dropout and not self.num_classes:
            raise ValueError(f"label_dropout needs num_classes above 0, got {self.label_dropout}")

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        """x: (B, H, W, C). time: (B,), 0-based as in every published network. labels: (B,) ints in
        0..num_classes - 1, or num_classes for none where label_dropout is above 0. Returns (B, H, W, C), at least
        float32. train: whether dropout acts, of features and of labels, which then needs a "dropout" rng.
        """
        check_inputs(self, x, labels)
        residual = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock  # 3: train
        block = lambda mult, name: residual(
            self.channels * mult, self.groups, self.norm_epsilon, self.dropout, self.dtype, name=name
        )
        attention = lambda name: Attention(self.groups, self.norm_epsilon, self.head_channels, self.dtype, name=name)
        conv = lambda features, name, init=_INIT: Conv3x3(features, init, self.dtype, name=name)
        padding = DOWNSAMPLE_PADDING[self.downsample_padding]
        downsample = lambda features, name: nn.Conv(
            features, (3, 3), 2, padding, kernel_init=_INIT, dtype=self.dtype, name=name
        )
        dense = lambda name: nn.Dense(4 * self.channels, kernel_init=_INIT, dtype=self.dtype, name=name)

        embedding = sinusoid(time, self.channels, self.frequency_shift, self.cos_first)
        embedding = dense("time_1")(nn.silu(dense("time_0")(embedding)))
        if self.num_classes:
            labels, rows = with_label_dropout(self, labels, train)
            embedding += nn.Embed(rows, 4 * self.channels, dtype=self.dtype, name="class")(labels)

        h = conv(self.channels, "conv_in")(space_to_depth(x, self.patch_size))
        skips = [h]
        last = len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                h = block(mult, f"down_{level}_block_{i}")(h, embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < last:
                h = downsample(h.shape[-1], f"down_{level}_halve")(h)
                skips.append(h)

        h = block(self.channel_mult[-1], "middle_block_0")(h, embedding, train)
        if self.middle_attention:
            h = attention("middle_attention")(h)
        h = block(self.channel_mult[-1], "middle_block_1")(h, embedding, train)

        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = block(mult, f"up_{level}_block_{i}")(jnp.concatenate([h, skips.pop()], axis=-1), embedding, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(f"up_{level}_attention_{i}")(h)
            if level > 0:
                h = Conv3x3(h.shape[-1], _INIT, self.dtype, upsample=True, name=f"up_{level}_double")(h)

        h = nn.silu(GroupNorm(self.groups, self.norm_epsilon, name="norm_out")(h))
        h = conv(self.patch_size**2 * self.image_channels, "conv_out", init=_ZERO)(h)
        return depth_to_space(h, self.patch_size).astype(jnp.promote_types(h.dtype, jnp.float32))
