"""The U-Net of DDPM (Ho et al. 2020, appendix B), numerically equal to the networks with published weights.

The published networks pad only on the right and at the bottom before a stride-2 convolution, use GroupNorm with epsilon
1e-6, and embed time by sinusoids with the frequencies `10000^(-i / (half - 1))`, sin before cos. Each of these is the
default of a field, because networks trained with diffusers have other values. Parameters are float32. `dtype` is the
dtype of the convolutions; normalization, softmax and the output stay in float32. Images are (B, H, W, C), channels
last.

One file because the blocks are used only by this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import checks
from ddim_jax.models.convolution import Conv3x3
from ddim_jax.models.sizes import MOST_BLOCKS, MOST_LEVELS, check_blocks, check_label_dropout, check_resolutions
from ddim_jax.schedule import Array
from ddim_jax.utils import ranges

# The initialization of Ho et al.: uniform with variance 1 / mean(fan_in, fan_out). The last layer of a residual branch
# starts at 0.
_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_ZERO = nn.initializers.zeros

NO_NORM = -1  # the groups of an attention without GroupNorm

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# The zero padding (before, after) of the rows and of the columns in a stride-2 convolution, the downsampling.
DOWNSAMPLE_PADDING = {"end": ((0, 1), (0, 1)), "both": ((1, 1), (1, 1))}


def sinusoid(time: Array, features: int, shift: float = 1.0, cos_first: bool = False) -> Array:
    """The sinusoidal embedding of times (B,), (B, features): sin, then cos, of `time * 10000^(-i / (half - shift))`.

    i = 0..half-1, half = features / 2. The dtype is that of time, at least float32.

    features: even, at least 4.
    shift: below half.
    cos_first: cos, then sin.

    The frequencies are computed in float64 and rounded once. This agrees best with a float64 network: at time 999 one
    unit in their last place changes the sinusoids by 6e-5.
    """
    half = features // 2
    frequencies = np.exp(-np.log(10000.0) / (half - shift) * np.arange(half))
    dtype = jnp.promote_types(time.dtype, jnp.float32)
    angles = time.astype(dtype)[:, None] * frequencies[None].astype(dtype)
    waves = (jnp.cos(angles), jnp.sin(angles)) if cos_first else (jnp.sin(angles), jnp.cos(angles))
    return jnp.concatenate(waves, axis=-1)


def space_to_depth(x: Array, size: int) -> Array:
    """(B, H, W, C) -> (B, H / size, W / size, size^2 C): the pixels of each size x size patch, row by row."""
    batch, height, width, channels = x.shape
    patches = x.reshape(batch, height // size, size, width // size, size, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


def depth_to_space(x: Array, size: int) -> Array:
    """The inverse of `space_to_depth`."""
    batch, height, width, channels = x.shape
    patches = x.reshape(batch, height, width, size, size, channels // size**2).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(batch, height * size, width * size, -1)


def check_inputs(network: nn.Module, x: Array, labels: Array | None) -> None:
    """Raises ValueError unless x (B, H, W, C) and labels are valid inputs of the network."""
    shape = network.image_size, network.image_size, network.image_channels
    if x.shape[1:] != shape:
        expected, got = ("x".join(map(str, sizes)) for sizes in (shape, x.shape[1:]))
        raise ValueError(f"x must be images of {expected}, got {got}")
    if (labels is None) != (network.num_classes == 0):
        required = "(B,)" if network.num_classes else "None"
        raise ValueError(
            f"labels must be {required} for a network with num_classes {network.num_classes}, got "
            f"{checks.shown(labels)}"
        )


def with_label_dropout(network: nn.Module, labels: Array, train: bool) -> tuple[Array, int]:
    """Label dropout for classifier-free guidance (Ho and Salimans 2022).

    labels: (B,). In training each label is replaced by the class num_classes with probability label_dropout.

    Returns (labels, number of classes), where the class num_classes is counted if label_dropout is above 0.
    """
    if train and network.label_dropout:
        dropped = jax.random.bernoulli(network.make_rng("dropout"), network.label_dropout, labels.shape)
        labels = jnp.where(dropped, network.num_classes, labels)
    return labels, network.num_classes + (network.label_dropout > 0)


class GroupNorm(nn.Module):
    """GroupNorm over (H, W, C / groups) with a scale and a bias per channel (Wu and He 2018).

    The statistics are computed in float32 or wider. They are folded into scale and bias first, so that the
    normalization is one multiplication and one addition per value.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1, channels)
        # The mean over positions comes first, because it reads the memory in order.
        group_mean = lambda values: values.mean(1).reshape(x.shape[0], self.groups, -1).mean(-1)
        to_channels = lambda statistic: jnp.repeat(statistic, channels // self.groups, axis=1)[:, None]
        mean = group_mean(h)
        variance = group_mean(jnp.square(h - to_channels(mean)))
        factor = to_channels(jax.lax.rsqrt(variance + self.epsilon)) * scale[None, None]
        shift = bias[None, None] - to_channels(mean) * factor
        return (h * factor + shift).reshape(x.shape).astype(x.dtype)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) with 16 random bits per value.

    Each value is set to 0 with the probability `rate`, rounded down to 16 bits. The other values are divided by 1 -
    rate. flax.linen.Dropout uses 32 random bits per value, which takes twice the time.

    x: (B, H, W, C), C even. In training a "dropout" rng is required.
    """

    rate: float

    @nn.compact
    def __call__(self, x, train):
        threshold = int(self.rate * 2**16)
        if not train or not threshold:
            return x
        bits = jax.random.bits(self.make_rng("dropout"), (*x.shape[:-1], x.shape[-1] // 2), jnp.uint32)
        bits = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(x.shape)
        return jnp.where(bits >= threshold, x * (2**16 / (2**16 - threshold)), 0)


class ResBlock(nn.Module):
    """A residual block: norm, SiLU, 3x3 convolution; plus the time embedding; norm, SiLU, dropout, 3x3 convolution.

    The shortcut is the identity, or a 1x1 convolution if the number of channels changes.

    scale_shift: the embedding is not added, but scales and shifts the result of the second norm.
    resample: "down" or "up": the image is resampled by 2 before the first convolution, and so is the shortcut.
    """

    channels: int
    groups: int
    epsilon: float
    dropout: float
    dtype: Any
    scale_shift: bool = False
    resample: str = "none"

    @nn.compact
    def __call__(self, x, embedding, train):
        h = nn.silu(GroupNorm(self.groups, self.epsilon, name="norm_0")(x))
        if self.resample == "down":
            h, x = (nn.avg_pool(array, (2, 2), (2, 2)) for array in (h, x))
        up = self.resample == "up"
        h = Conv3x3(self.channels, _INIT, self.dtype, upsample=up, name="conv_0")(h)
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2) if up else x
        features = self.channels * (2 if self.scale_shift else 1)
        embedded = nn.Dense(features, kernel_init=_INIT, dtype=self.dtype, name="embedding")(nn.silu(embedding))[
            :, None, None
        ]
        norm = GroupNorm(self.groups, self.epsilon, name="norm_1")
        if self.scale_shift:
            scale, shift = jnp.split(embedded, 2, axis=-1)
            h = nn.silu(norm(h) * (1 + scale) + shift)
        else:
            h = nn.silu(norm(h + embedded))
        h = Dropout(self.dropout)(h, train)
        h = Conv3x3(self.channels, _ZERO, self.dtype, name="conv_1")(h)
        if x.shape[-1] != self.channels:
            shortcut = nn.Dense(self.channels, kernel_init=_INIT, dtype=self.dtype, name="shortcut")
            # As a matrix product over rows, because then the gradient needs no transposition.
            x = shortcut(x.reshape(-1, x.shape[-1])).reshape(h.shape)
        return x + h


class Attention(nn.Module):
    """Self-attention over the H W positions, scaled by 1 / sqrt(channels of a head), with a residual connection.

    groups: of the GroupNorm before it; -1 for none.
    head_channels: 0 for num_heads heads; num_heads: 0 for one.
    """

    groups: int
    epsilon: float
    head_channels: int
    dtype: Any
    num_heads: int = 0

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        heads = channels // self.head_channels if self.head_channels else self.num_heads or 1
        dense = dict(dtype=self.dtype)
        h = x if self.groups == NO_NORM else GroupNorm(self.groups, self.epsilon, name="norm")(x)
        h = h.reshape(-1, channels)
        query, key, value = (
            nn.Dense(channels, kernel_init=_INIT, name=name, **dense)(h).reshape(batch, height * width, heads, -1)
            for name in ("query", "key", "value")
        )
        # Not jax.nn.dot_product_attention, which computes in float32 at most.
        logits = jnp.einsum(
            "bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.promote_types(h.dtype, jnp.float32)
        )
        weights = jax.nn.softmax(logits / (channels // heads) ** 0.5, axis=-1)
        h = jnp.einsum("bhqk,bkhc->bqhc", weights.astype(value.dtype), value).reshape(-1, channels)
        return x + nn.Dense(channels, kernel_init=_ZERO, name="out", **dense)(h).reshape(x.shape)


def multipliers(widths: Sequence[int]) -> tuple[float, ...]:
    """The channel_mult for these numbers of channels at each resolution: ints where the first one divides."""
    return tuple(width / widths[0] if width % widths[0] else width // widths[0] for width in widths)


class UNet(nn.Module):
    """The U-Net: eps, x_0 or v from (x_t, time). The defaults give DDPM's CIFAR-10 network with 35,746,307 parameters.

    image_size: H = W.
    image_channels: C.
    patch_size: above 1, each patch of patch_size x patch_size pixels is one position of the network, with patch_size^2
        times the channels (space-to-depth).
    channels: the channels at the highest resolution, before channel_mult.
    channel_mult: the factor of the channels at each resolution, whose product with channels is an integer. The image is
        downsampled by 2 between two resolutions, len(channel_mult) - 1 times.
    num_res_blocks: residual blocks per resolution.
    attention_resolutions: the resolutions, in positions, at which every block is followed by attention.
    attention_resolutions_down, attention_resolutions_up: further resolutions with attention, in the encoder only and in
        the decoder only.
    middle_attention: whether the middle block has attention.
    middle_groups: of the GroupNorm before the attention of the middle block; 0 for groups, -1 for no GroupNorm.
    head_channels: channels of an attention head; 0 for num_heads heads.
    num_heads: attention heads if head_channels is 0; 0 for a single head.
    groups, norm_epsilon: of GroupNorm.
    scale_shift: the time embedding scales and shifts the result of the second norm of a block (Dhariwal and Nichol
        2021), instead of being added before it.
    resample: "conv": a convolution downsamples and upsamples; "block": a residual block does (Dhariwal and Nichol
        2021).
    downsample_padding: a name in DOWNSAMPLE_PADDING; not used with resample "block".
    frequency_shift, cos_first: see `sinusoid`.
    time_channels: the number of sinusoidal features; the time embedding has four times as many. 0: as
        channels.
    time_scale: the sinusoidal embedding is that of time_scale * time; 1000 / T if improved-diffusion rescales
        timesteps.
    learn_sigma: the output has 2 C channels. The second half is for the variance of `samplers.ddpm_learned` (Nichol
        and Dhariwal 2021, Eq. 15); other samplers do not use it.
    num_classes: 0 for none. Otherwise labels are required.
    label_dropout: in training a label is replaced by the class num_classes, "no class", with this probability, so that
        the network can be used for classifier-free guidance (Ho and Salimans 2022).
    remat: recompute the blocks in the backward pass instead of storing their activations: less memory, a third more
        time.
    """

    image_size: int = ranges.at_least(1, 2048, 32)
    image_channels: int = ranges.at_least(1, 4096, 3)
    patch_size: int = ranges.at_least(1, 64, 1)
    channels: int = ranges.at_least(4, 4096, 128)
    channel_mult: tuple[ranges.Number, ...] = ranges.all_positive(MOST_LEVELS, 64, (1, 2, 2, 2))
    num_res_blocks: int = ranges.at_least(1, MOST_BLOCKS, 2)
    attention_resolutions: tuple[int, ...] = ranges.at_most_so_many(MOST_LEVELS, (16,))
    attention_resolutions_down: tuple[int, ...] = ranges.at_most_so_many(MOST_LEVELS, ())
    attention_resolutions_up: tuple[int, ...] = ranges.at_most_so_many(MOST_LEVELS, ())
    middle_attention: bool = True
    middle_groups: int = ranges.at_least(NO_NORM, 1 << 18, 0)
    head_channels: int = ranges.at_least(0, 1 << 18, 0)
    num_heads: int = ranges.at_least(0, 1 << 18, 0)
    groups: int = ranges.at_least(1, 1 << 18, 32)
    norm_epsilon: float = ranges.above_zero(1e-6)
    scale_shift: bool = False
    resample: str = ranges.one_of({"conv": None, "block": None}, "conv")
    downsample_padding: str = ranges.one_of(DOWNSAMPLE_PADDING, "end")
    frequency_shift: float = 1.0
    cos_first: bool = False
    time_channels: int = ranges.at_least(0, 4096, 0)
    time_scale: float = ranges.above_zero(1.0)
    learn_sigma: bool = False
    dropout: float = ranges.below_one(0.1)
    num_classes: int = ranges.at_least(0, 1_000_000, 0)
    label_dropout: float = ranges.below_one(0.0)
    dtype: Any = ranges.named(DTYPES, "float32")
    remat: bool = False

    @property
    def width(self) -> int:
        """The largest number of channels of a layer."""
        return max(self.widths)

    @property
    def widths(self) -> list[int]:
        """The number of channels at each resolution, from the highest down."""
        return [round(self.channels * mult) for mult in self.channel_mult]

    @property
    def width_in(self) -> int:
        """The number of channels of the first layer."""
        return self.channels

    def check(self) -> None:
        """Raises a ValueError that names the field if the sizes are inconsistent."""
        attention = ("attention_resolutions", "attention_resolutions_down", "attention_resolutions_up")
        check_blocks(self, 2 * self.num_res_blocks + 1)
        resolutions = check_resolutions(self, attention, self.patch_size)
        widths = self.widths
        for width, mult in zip(widths, self.channel_mult, strict=True):
            if abs(width - self.channels * mult) > 1e-6 * width:
                raise ValueError(f"channel_mult must give integers with channels {self.channels}, got {mult}")
        for width in [self.channels, *widths]:
            if width % self.groups:
                raise ValueError(
                    f"groups must divide the {width} channels of a layer (channels {self.channels}, channel_mult "
                    f"{self.channel_mult}), got {self.groups}"
                )
        attended = [
            width
            for resolution, width in zip(resolutions, widths, strict=True)
            if any(resolution in getattr(self, name) for name in attention)
        ]
        if self.middle_groups > 0 and widths[-1] % self.middle_groups:
            raise ValueError(
                f"middle_groups must divide the {widths[-1]} channels of a layer, got {self.middle_groups}"
            )
        for width in attended + widths[-1:] * self.middle_attention:
            if self.head_channels and width % self.head_channels:
                raise ValueError(f"head_channels must divide the {width} channels of a layer, got {self.head_channels}")
            if not self.head_channels and width % (self.num_heads or 1):
                raise ValueError(f"num_heads must divide the {width} channels of a layer, got {self.num_heads}")
        if self.head_channels and self.num_heads:
            raise ValueError(f"num_heads must be 0 if head_channels is given, got {self.num_heads}")
        for name, features in (("channels", self.channels), ("time_channels", self.time_channels or self.channels)):
            if features % 2 or features < 4:
                raise ValueError(f"{name} must be even and at least 4, got {features}")
        if not self.frequency_shift < (self.time_channels or self.channels) // 2:
            raise ValueError(
                f"frequency_shift must be below half of channels {self.channels}, or of time_channels, got "
                f"{self.frequency_shift}"
            )
        check_label_dropout(self)

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        """The network output, (B, H, W, C), or (B, H, W, 2 C) with learn_sigma; at least float32.

        x: (B, H, W, C).
        time: (B,), counts 0..T-1, as in every published network.
        labels: (B,) ints in 0..num_classes - 1, or num_classes for "no class" if label_dropout is above 0.
        train: whether dropout of features and of labels is active. It then needs a "dropout" rng.
        """
        check_inputs(self, x, labels)
        residual = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock  # 3: train
        common = self.groups, self.norm_epsilon, self.dropout, self.dtype, self.scale_shift
        block = lambda width, name: residual(width, *common, name=name)
        attention = lambda name, groups=self.groups: Attention(
            groups, self.norm_epsilon, self.head_channels, self.dtype, self.num_heads, name=name
        )
        attended_down = (*self.attention_resolutions, *self.attention_resolutions_down)
        attended_up = (*self.attention_resolutions, *self.attention_resolutions_up)
        conv = lambda features, name, init=_INIT: Conv3x3(features, init, self.dtype, name=name)
        padding = DOWNSAMPLE_PADDING[self.downsample_padding]
        downsample = lambda features, name: nn.Conv(
            features, (3, 3), 2, padding, kernel_init=_INIT, dtype=self.dtype, name=name
        )
        time_channels = self.time_channels or self.channels
        dense = lambda name: nn.Dense(4 * time_channels, kernel_init=_INIT, dtype=self.dtype, name=name)

        time = time if self.time_scale == 1 else time * self.time_scale
        embedding = sinusoid(time, time_channels, self.frequency_shift, self.cos_first)
        embedding = dense("time_1")(nn.silu(dense("time_0")(embedding)))
        if self.num_classes:
            labels, rows = with_label_dropout(self, labels, train)
            embedding += nn.Embed(rows, 4 * time_channels, dtype=self.dtype, name="class")(labels)

        h = conv(self.channels, "conv_in")(space_to_depth(x, self.patch_size))
        skips = [h]
        widths = self.widths
        for level, width in enumerate(widths):
            for i in range(self.num_res_blocks):
                h = block(width, f"down_{level}_block_{i}")(h, embedding, train)
                if h.shape[1] in attended_down:
                    h = attention(f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < len(widths) - 1:
                name = f"down_{level}_halve"
                if self.resample == "block":
                    h = residual(h.shape[-1], *common, "down", name=name)(h, embedding, train)
                else:
                    h = downsample(h.shape[-1], name)(h)
                skips.append(h)

        h = block(widths[-1], "middle_block_0")(h, embedding, train)
        if self.middle_attention:
            h = attention("middle_attention", self.middle_groups or self.groups)(h)
        h = block(widths[-1], "middle_block_1")(h, embedding, train)

        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                h = block(width, f"up_{level}_block_{i}")(jnp.concatenate([h, skips.pop()], axis=-1), embedding, train)
                if h.shape[1] in attended_up:
                    h = attention(f"up_{level}_attention_{i}")(h)
            if level > 0 and self.resample == "block":
                h = residual(h.shape[-1], *common, "up", name=f"up_{level}_double")(h, embedding, train)
            elif level > 0:
                h = Conv3x3(h.shape[-1], _INIT, self.dtype, upsample=True, name=f"up_{level}_double")(h)

        h = nn.silu(GroupNorm(self.groups, self.norm_epsilon, name="norm_out")(h))
        outputs = 2 if self.learn_sigma else 1
        h = conv(outputs * self.patch_size**2 * self.image_channels, "conv_out", init=_ZERO)(h)
        return depth_to_space(h, self.patch_size).astype(jnp.promote_types(h.dtype, jnp.float32))
