"""The U-Nets of score-based models, DDPM++ and NCSN++ (Song et al. 2021), as EDM trains them (Karras et al. 2022).

They differ from the U-Net of DDPM: the sums of a residual block are multiplied by sqrt(1/2); a residual block resamples
the image, with a 1x1 convolution in its shortcut; attention has one head, and the decoder has it only in the last block
of a resolution; the labels are added to the sinusoids of the time. NCSN++ also has random Fourier features of the time,
a wider resampling filter, and a second path in the encoder. Parameters are float32. `dtype` is the dtype of the
convolutions; normalization, softmax and the output stay in float32. Images are (B, H, W, C), channels last.

One file because the blocks are used only by this network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.models.convolution import Conv3x3
from ddim_jax.models.sizes import MOST_BLOCKS, MOST_LEVELS, check_blocks, check_label_dropout, check_resolutions
from ddim_jax.models.unet import (
    DTYPES,
    Attention,
    Dropout,
    GroupNorm,
    check_inputs,
    sinusoid,
    with_label_dropout,
)
from ddim_jax.schedule import Array
from ddim_jax.utils import ranges

# The published initialization: uniform with variance 1 / mean(fan_in, fan_out). The last layer of a branch is 1e-5
# times that.
_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
_SMALL = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")

EPSILON = 1e-6  # of GroupNorm
FOURIER_SCALE = 16.0  # the standard deviation of the frequencies of Fourier features
SKIP_SCALE = 0.5**0.5

EMBEDDINGS = {"positional": None, "fourier": None}
ENCODERS = {"standard": None, "residual": None, "skip": None}
DECODERS = {"standard": None, "skip": None}


def groups_of(channels: int) -> int:
    """The groups of a GroupNorm: 32, or fewer so that each has at least 4 channels."""
    return min(32, channels // 4)


def downsample(x: Array, weights: Sequence[float], padding: int | None = None) -> Array:
    """x filtered with the weights, scaled to sum 1, in both directions; then every second row and column.

    x: (B, H, W, C). weights: an even number, symmetric. padding: the zeros before and after each row and column;
    default: as many as give (B, H / 2, W / 2, C).
    """
    size, weights = len(weights), np.asarray(weights) / np.sum(weights)
    padding = size // 2 - 1 if padding is None else padding
    for axis in (1, 2):
        x = jnp.pad(x, [(padding, padding) if i == axis else (0, 0) for i in range(4)])
        stop = x.shape[axis] - size + 1
        x = sum(float(weight) * jax.lax.slice_in_dim(x, k, k + stop, 2, axis=axis) for k, weight in enumerate(weights))
    return x


def upsample(x: Array, weights: Sequence[float]) -> Array:
    """The transpose of `downsample`, times 4: (B, H, W, C) -> (B, 2 H, 2 W, C). (1, 1) repeats rows and columns."""
    size, weights = len(weights), 2 * np.asarray(weights) / np.sum(weights)
    padding = size // 2 - 1
    for axis in (1, 2):
        length, far = x.shape[axis], size // 2
        padded = jnp.pad(x, [(far, far) if i == axis else (0, 0) for i in range(4)])
        # Row 2 i + parity of the result is the sum of weights[k] x[i - m] over k = parity + padding + 2 m.
        rows = []
        for parity in (0, 1):
            offsets = [(k, (k - parity - padding) // 2) for k in range(size) if (k - parity - padding) % 2 == 0]
            terms = [
                float(weights[k]) * jax.lax.slice_in_dim(padded, far - m, far - m + length, axis=axis)
                for k, m in offsets
            ]
            rows.append(sum(terms))
        shape = [2 * size if i == axis else size for i, size in enumerate(x.shape)]
        x = jnp.stack(rows, axis=axis + 1).reshape(shape)
    return x


class FourierFeatures(nn.Module):
    """(sin, cos) of `2 pi f time` for random frequencies f, (B,) -> (B, features). The frequencies are not trained."""

    features: int

    @nn.compact
    def __call__(self, time):
        normal = nn.initializers.normal(FOURIER_SCALE)
        frequencies = jax.lax.stop_gradient(self.param("frequencies", normal, (self.features // 2,)))
        angles = time.astype(jnp.promote_types(time.dtype, jnp.float32))[:, None] * (2 * np.pi * frequencies)[None]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Block(nn.Module):
    """A residual block: norm, SiLU, resampling, 3x3 convolution; plus the embedding; norm, SiLU, 3x3 convolution.

    resample: "down" or "up": the image is resampled by 2, in the shortcut too. The shortcut is the identity, or a 1x1
    convolution if the image is resampled or the number of channels changes. The sum of both is multiplied by
    SKIP_SCALE; attention, if any, follows with another such sum.
    """

    channels: int
    filter: tuple[int, ...]
    dropout: float
    dtype: Any
    attention: bool = False
    resample: str = "none"

    @nn.compact
    def __call__(self, x, embedding, train):
        change = {
            "none": lambda h: h,
            "down": lambda h: downsample(h, self.filter),
            "up": lambda h: upsample(h, self.filter),
        }[self.resample]
        h = nn.silu(GroupNorm(groups_of(x.shape[-1]), EPSILON, name="norm_0")(x))
        h = Conv3x3(self.channels, _INIT, self.dtype, name="conv_0")(change(h))
        dense = lambda name: nn.Dense(self.channels, kernel_init=_INIT, dtype=self.dtype, name=name)
        h += dense("embedding")(embedding)[:, None, None]
        h = nn.silu(GroupNorm(groups_of(self.channels), EPSILON, name="norm_1")(h))
        h = Conv3x3(self.channels, _SMALL, self.dtype, name="conv_1")(Dropout(self.dropout)(h, train))
        if self.resample != "none" or x.shape[-1] != self.channels:
            x = change(x)
            x = dense("shortcut")(x.reshape(-1, x.shape[-1])).reshape(h.shape)
        h = (x + h) * SKIP_SCALE
        if self.attention:
            h = Attention(groups_of(self.channels), EPSILON, 0, self.dtype, 1, name="attention")(h) * SKIP_SCALE
        return h


class Downsample(nn.Module):
    """A 3x3 convolution, the `downsample` of its result and a bias. The convolution also gives values outside of the
    image, of which the filter needs some at its border.
    """

    features: int
    filter: tuple[int, ...]
    dtype: Any

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", _INIT, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        padding = [(len(self.filter) // 2,) * 2] * 2
        h = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return downsample(h, self.filter, 0) + bias[None, None, None]


class SongUNet(nn.Module):
    """DDPM++ or NCSN++: the output from (x_t, time). The defaults give EDM's DDPM++ for CIFAR-10, without classes.

    image_size: H = W.
    image_channels: C.
    channels: the channels of the first layer.
    channel_mult: the factor of the channels at each resolution. The image is downsampled by 2 between two resolutions.
    num_res_blocks: residual blocks per resolution.
    attention_resolutions: the resolutions at which every block of the encoder and the last block of the decoder have
        attention. The first middle block always has it.
    embedding: "positional": the sinusoids of `unet.sinusoid`; "fourier": random Fourier features.
    time_mult: the features of the time, as a multiple of channels.
    embedding_mult: the features of the time embedding, as a multiple of channels.
    encoder: "standard"; "residual" (NCSN++): at each lower resolution a downsampled convolution of the input of the
        previous one is added; "skip": a 1x1 convolution of the downsampled image is added.
    decoder: "standard"; "skip": the output is the sum of an output at each resolution, upsampled.
    resample_filter: the weights of the filter of down- and upsampling: (1, 1) in DDPM++, (1, 3, 3, 1) in NCSN++.
    num_classes: 0 for none. Otherwise labels are required.
    label_dropout: in training a label is replaced by the class num_classes, "no class", with this probability, so that
        the network can be used for classifier-free guidance (Ho and Salimans 2022).
    remat: recompute the blocks in the backward pass instead of storing their activations: less memory, a third more
        time.
    """

    image_size: int = ranges.at_least(1, 2048, 32)
    image_channels: int = ranges.at_least(1, 4096, 3)
    channels: int = ranges.at_least(4, 4096, 128)
    channel_mult: tuple[int, ...] = ranges.all_positive(MOST_LEVELS, 64, (2, 2, 2))
    num_res_blocks: int = ranges.at_least(1, MOST_BLOCKS, 4)
    attention_resolutions: tuple[int, ...] = ranges.at_most_so_many(MOST_LEVELS, (16,))
    embedding: str = ranges.one_of(EMBEDDINGS, "positional")
    time_mult: int = ranges.at_least(1, 64, 1)
    embedding_mult: int = ranges.at_least(1, 64, 4)
    encoder: str = ranges.one_of(ENCODERS, "standard")
    decoder: str = ranges.one_of(DECODERS, "standard")
    resample_filter: tuple[int, ...] = ranges.all_positive(8, 1024, (1, 1))
    dropout: float = ranges.below_one(0.1)
    num_classes: int = ranges.at_least(0, 1_000_000, 0)
    label_dropout: float = ranges.below_one(0.0)
    dtype: Any = ranges.named(DTYPES, "float32")
    remat: bool = False

    @property
    def width(self) -> int:
        """The largest number of channels of a layer."""
        return self.channels * max(self.channel_mult)

    @property
    def width_in(self) -> int:
        """The number of channels of the first layer."""
        return self.channels

    def check(self) -> None:
        """Raises a ValueError that names the field if the sizes are inconsistent."""
        check_blocks(self, 2 * self.num_res_blocks + 2)
        check_resolutions(self, ("attention_resolutions",))
        if self.channels % 4:
            raise ValueError(f"channels must be a multiple of 4, got {self.channels}")
        widths = [self.channels] + [self.channels * mult for mult in self.channel_mult]
        for width in {*widths, *(a + b for a in widths for b in widths)}:  # of layers, and with a skip connection
            if width % groups_of(width):
                raise ValueError(
                    f"channels {self.channels} and channel_mult {self.channel_mult} give a layer with {width} "
                    f"channels, which {groups_of(width)} groups do not divide"
                )
        if len(self.resample_filter) % 2 or self.resample_filter != self.resample_filter[::-1]:
            raise ValueError(
                f"resample_filter must be symmetric with an even number of weights, got {self.resample_filter}"
            )
        check_label_dropout(self)

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        """The network output, (B, H, W, C), at least float32.

        x: (B, H, W, C).
        time: (B,): ln(sigma) / 4 for a network with the prediction "edm".
        labels: (B,) ints in 0..num_classes - 1, or num_classes for "no class" if label_dropout is above 0.
        train: whether dropout of features and of labels is active. It then needs a "dropout" rng.
        """
        check_inputs(self, x, labels)
        embedding = self._embedding(time, labels, train)
        kind = nn.remat(Block, static_argnums=(3,)) if self.remat else Block  # 3: train
        block = lambda channels, name, attention=False, resample="none": (
            lambda h: kind(channels, self.resample_filter, self.dropout, self.dtype, attention, resample, name=name)(
                h, embedding, train
            )
        )
        conv = lambda features, name, init=_INIT: Conv3x3(features, init, self.dtype, name=name)

        h = conv(self.channels, "conv_in")(x)
        skips, aux, last = [h], x, len(self.channel_mult) - 1
        for level, mult in enumerate(self.channel_mult):
            channels = self.channels * mult
            for i in range(self.num_res_blocks):
                h = block(channels, f"down_{level}_block_{i}", h.shape[1] in self.attention_resolutions)(h)
                skips.append(h)
            if level < last:
                h = block(channels, f"down_{level}_halve", resample="down")(h)
                if self.encoder == "skip":
                    aux = downsample(aux, self.resample_filter)
                    added = nn.Dense(channels, kernel_init=_INIT, dtype=self.dtype, name=f"down_{level}_aux")
                    h += added(aux.reshape(-1, aux.shape[-1])).reshape(h.shape)
                if self.encoder == "residual":
                    added = Downsample(channels, self.resample_filter, self.dtype, name=f"down_{level}_aux")
                    h = aux = (h + added(aux)) * SKIP_SCALE
                skips.append(h)

        h = block(h.shape[-1], "middle_block_0", attention=True)(h)
        h = block(h.shape[-1], "middle_block_1")(h)

        output = None
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            channels = self.channels * mult
            for i in range(self.num_res_blocks + 1):
                attention = i == self.num_res_blocks and h.shape[1] in self.attention_resolutions
                h = block(channels, f"up_{level}_block_{i}", attention)(jnp.concatenate([h, skips.pop()], axis=-1))
            if self.decoder == "skip" or level == 0:
                suffix = f"_{level}" if level else ""
                added = nn.silu(GroupNorm(groups_of(channels), EPSILON, name=f"norm_out{suffix}")(h))
                added = conv(self.image_channels, f"conv_out{suffix}", _SMALL)(added)
                output = added if output is None else added + upsample(output, self.resample_filter)
            if level > 0:
                h = block(channels, f"up_{level}_double", resample="up")(h)
        return output.astype(jnp.promote_types(output.dtype, jnp.float32))

    def _embedding(self, time: Array, labels: Array | None, train: bool) -> Array:
        """The embedding of time and labels, (B, embedding_mult channels)."""
        features = self.time_mult * self.channels
        dense = lambda width, name: nn.Dense(width, kernel_init=_INIT, dtype=self.dtype, name=name)
        embedding = (
            FourierFeatures(features, name="fourier")(time)
            if self.embedding == "fourier"
            else (sinusoid(time, features))
        )
        if self.num_classes:
            labels, _ = with_label_dropout(self, labels, train)
            one_hot = jax.nn.one_hot(labels, self.num_classes, dtype=embedding.dtype)  # zeros for "no class"
            embedding += dense(features, "class")(one_hot * self.num_classes**0.5)
        embedding = nn.silu(dense(self.embedding_mult * self.channels, "time_0")(embedding))
        return nn.silu(dense(self.embedding_mult * self.channels, "time_1")(embedding))
