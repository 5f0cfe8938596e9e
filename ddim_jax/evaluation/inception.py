"""The feature network of FID: Inception-v3 from the TensorFlow graph of 2015-12-05.

It differs from the Inception-v3 of torchvision: average pooling excludes the padding from the mean, the last block uses
max pooling instead, there are 1008 classes, and images are resized as in TensorFlow 1. The modules have the same names
as in the published PyTorch port of the weights, `pt_inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.checkpoints import tensors, torch_file
from ddim_jax.checkpoints.parameter_names import Layout
from ddim_jax.evaluation.feature_network import FeatureNetwork, Output, feature_network, on_one_device
from ddim_jax.schedule import Array
from ddim_jax.utils import download
from ddim_jax.utils.errors import CheckpointError

SIZE = 299
FEATURES = 2048
CLASSES = 1008
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


def resize(images: Array, size: int = SIZE) -> Array:
    """Bilinear resize of (B, H, W, C) to (B, size, size, C) as in TensorFlow 1: output pixel i is at the input position
    `i H / size`, so the image is not centred. FID depends on this detail.
    """
    rows = jnp.einsum("oh,bhwc->bowc", _interpolation(images.shape[1], size), images, precision="highest")
    return jnp.einsum("ow,bhwc->bhoc", _interpolation(images.shape[2], size), rows, precision="highest")


def _interpolation(length: int, size: int) -> np.ndarray:
    """The interpolation matrix (size, length), float32, with two weights per output pixel. Positions are rounded to
    float32, as in TensorFlow 1.
    """
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = np.floor(position).astype(int)
    fraction = position - low
    matrix = np.zeros((size, length), np.float32)
    np.add.at(matrix, (np.arange(size), np.minimum(low, length - 1)), 1 - fraction)
    np.add.at(matrix, (np.arange(size), np.minimum(low + 1, length - 1)), fraction)
    return matrix


class Conv(nn.Module):
    """Convolution, batch normalization with fixed statistics, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    pad: bool = False  # True keeps the height and width

    @nn.compact
    def __call__(self, x):
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], self.features))
        scale, bias, mean, variance = (
            self.param(name, init, (self.features,))
            for name, init in [("scale", ones), ("bias", zeros), ("mean", zeros), ("variance", ones)]
        )
        h = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [((size - 1) // 2,) * 2 for size in self.kernel] if self.pad else "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        factor = scale * jax.lax.rsqrt(variance + 1e-3)
        along_channels = lambda vector: vector.reshape(1, 1, 1, -1)
        return nn.relu(h * along_channels(factor) + along_channels(bias - mean * factor))


def _max_pool(x: Array, stride: int = 2, pad: bool = False) -> Array:
    return nn.max_pool(x, (3, 3), (stride, stride), ((1, 1), (1, 1)) if pad else "VALID")


def _average_pool(x: Array) -> Array:
    """Average pooling, 3x3 with stride 1, without the padding in the mean."""
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)


def _chain(prefix: str, *convolutions: tuple[int, int, int]) -> list[list[tuple]]:
    """A branch of convolutions (channels, height, width) with the names prefix_1, prefix_2, ..."""
    return [[(f"{prefix}_{i}", *convolution)] for i, convolution in enumerate(convolutions, 1)]


class Mixed(nn.Module):
    """Concatenates parallel branches: branches of convolutions, and one branch of pooling.

    branches: each a sequence of stages. A stage is a list of one convolution (name, channels, height, width); the last
    stage may have two parallel ones. pool: the channels of the 1x1 convolution after the pooling. None downsamples by a
    factor of 2: the last stages and the pooling have stride 2, and no convolution follows the pooling.
    """

    branches: tuple
    pool: int | None
    max_pool: bool = False

    @nn.compact
    def __call__(self, x):
        downsample = self.pool is None

        def conv(convolution, h, stride=1):
            name, features, *kernel = convolution
            return Conv(features, tuple(kernel), stride, pad=stride == 1, name=name)(h)

        outputs = []
        for *stages, last in self.branches:
            h = x
            for (convolution,) in stages:
                h = conv(convolution, h)
            outputs += [conv(convolution, h, 2 if downsample else 1) for convolution in last]
        if downsample:
            outputs.append(_max_pool(x))
        else:
            pooled = _max_pool(x, stride=1, pad=True) if self.max_pool else _average_pool(x)
            outputs.append(Conv(self.pool, (1, 1), name="branch_pool")(pooled))
        return jnp.concatenate(outputs, axis=-1)


def _mixed_35(name: str, pool: int) -> Mixed:
    return Mixed(
        (
            [[("branch1x1", 64, 1, 1)]],
            _chain("branch5x5", (48, 1, 1), (64, 5, 5)),
            _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ),
        pool,
        name=name,
    )


def _mixed_17(name: str, width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(
        (
            [[("branch1x1", 192, 1, 1)]],
            _chain("branch7x7", (width, 1, 1), (width, *row), (192, *column)),
            _chain("branch7x7dbl", (width, 1, 1), (width, *column), (width, *row), (width, *column), (192, *row)),
        ),
        192,
        name=name,
    )


def _mixed_8(name: str, max_pool: bool) -> Mixed:
    split = lambda prefix: [(f"{prefix}a", 384, 1, 3), (f"{prefix}b", 384, 3, 1)]
    return Mixed(
        (
            [[("branch1x1", 320, 1, 1)]],
            [[("branch3x3_1", 384, 1, 1)], split("branch3x3_2")],
            [*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), split("branch3x3dbl_3")],
        ),
        192,
        max_pool,
        name=name,
    )


class Inception(nn.Module):
    """(B, 299, 299, 3) in [-1, 1] -> Output: 2048 features of the last pooling layer, for FID, KID, precision and
    recall, and 1008 logits without the bias, for the Inception Score.
    """

    @nn.compact
    def __call__(self, x: Array) -> Output:
        x = Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = _max_pool(Conv(64, (3, 3), pad=True, name="Conv2d_2b_3x3")(x))
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _max_pool(Conv(192, (3, 3), name="Conv2d_4a_3x3")(x))
        for name, pool in [("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)]:
            x = _mixed_35(name, pool)(x)
        double = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
        x = Mixed(([[("branch3x3", 384, 3, 3)]], double), None, name="Mixed_6a")(x)
        for name, width in [("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)]:
            x = _mixed_17(name, width)(x)
        x = Mixed(
            (
                _chain("branch3x3", (192, 1, 1), (320, 3, 3)),
                _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
            ),
            None,
            name="Mixed_7a",
        )(x)
        x = _mixed_8("Mixed_7b", max_pool=False)(x)
        features = _mixed_8("Mixed_7c", max_pool=True)(x).mean((1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision="highest", name="fc")(features)
        return Output(features, logits)


def apply(params: Any, images: Array) -> Output:
    """Features and logits of uint8 images (B, H, W, C) of any size, with C = 3, or C = 1 for grey images."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8 (B, H, W, 1 or 3), got {images.dtype} {images.shape}")
    images = jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32)
    return Inception().apply({"params": params}, (resize(images) - 128) / 128)


_LEAVES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "variance": "bn.running_var",
}


def _name(path: tuple[str, ...], num_levels: int) -> str:
    return "fc.weight" if path[0] == "fc" else ".".join([*path[:-1], _LEAVES[path[-1]]])


def open_network(path: str = "") -> FeatureNetwork:
    """The Inception network of FID with the published weights. path: the file of the weights; "" for a download that is
    stored in the cache. CheckpointError if they cannot be read or downloaded.
    """
    if path and not pathlib.Path(path).is_file():
        raise CheckpointError(f"file {path} does not exist: expected {WEIGHTS}, the weights of FID's Inception network")
    file = pathlib.Path(path) if path else download.fetch(URL, SHA256, "the weights of FID's Inception network")
    return feature_network("inception-2015-12-05", apply, load(file), f"bilinear of TensorFlow 1 to {SIZE}x{SIZE}")


def load(path: pathlib.Path) -> Any:
    """Reads the parameters from a file of the published weights: the published .pth, which is opened without executing
    code in it, or the same tensors as .safetensors. CheckpointError if it is damaged or of another network.
    """
    if path.suffix == ".safetensors":
        state, _ = tensors.open_safetensors(path)
    else:
        state = tensors.from_torch(str(path), torch_file.load(path))
    is_unused = lambda name: name == "fc.bias" or name.endswith(".num_batches_tracked")
    shapes = {name: shape for name, shape in state.shapes.items() if not is_unused(name)}
    like = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    layout = Layout(_name)
    return tensors.read(state._replace(shapes=shapes, layout=layout), on_one_device(like), "FID's Inception network")
