"""The network in whose features FID is measured: Inception-v3 of the TensorFlow graph of 2015-12-05.

It differs from the Inception-v3 of torchvision: average pooling leaves the padding out of the mean, the last block
takes a maximum instead, there are 1008 classes, and images are resized as TensorFlow 1 does. The modules have the
names under which the PyTorch port of the weights, `pt_inception-2015-12-05-6726825d.pth`, is published.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.checkpoints import tensors
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
    """Bilinear resize of (B, H, W, C) to (B, size, size, C) as TensorFlow 1 does: output pixel i is input pixel
    `i H / size`, so the image is not centred. FID depends on it.
    """
    by_rows = jnp.einsum("oh,bhwc->bowc", _interpolation(images.shape[1], size), images, precision="highest")
    return jnp.einsum("ow,bhwc->bhoc", _interpolation(images.shape[2], size), by_rows, precision="highest")


def _interpolation(length: int, size: int) -> np.ndarray:
    """(size, length) float32: the two weights of each output pixel. The position is rounded to float32 as there."""
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = np.floor(position).astype(int)
    share = position - low
    matrix = np.zeros((size, length), np.float32)
    np.add.at(matrix, (np.arange(size), np.minimum(low, length - 1)), 1 - share)
    np.add.at(matrix, (np.arange(size), np.minimum(low + 1, length - 1)), share)
    return matrix


class Conv(nn.Module):
    """Convolution, the normalisation that training left behind, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    pad: bool = False  # to keep the size

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
    """Of 3x3, at every pixel, without the padding."""
    return nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)), count_include_pad=False)


def _chain(prefix: str, *links: tuple[int, int, int]) -> list[list[tuple]]:
    """A branch of convolutions (channels, height, width) that are called prefix_1, prefix_2, ..."""
    return [[(f"{prefix}_{i}", *link)] for i, link in enumerate(links, 1)]


class Mixed(nn.Module):
    """Branches of convolutions and one of pooling, side by side.

    branches: each a chain of stages, a stage being one convolution (name, channels, height, width), or the last
    two side by side. pool: channels of the 1x1 after pooling; None to halve the size, by the last stages and the
    pooling, which then has no convolution.
    """

    branches: tuple
    pool: int | None
    max_pool: bool = False

    @nn.compact
    def __call__(self, x):
        halve = self.pool is None

        def conv(link, h, stride=1):
            name, features, *kernel = link
            return Conv(features, tuple(kernel), stride, pad=stride == 1, name=name)(h)

        parts = []
        for *stages, last in self.branches:
            h = x
            for (link,) in stages:
                h = conv(link, h)
            parts += [conv(link, h, 2 if halve else 1) for link in last]
        if halve:
            parts.append(_max_pool(x))
        else:
            pooled = _max_pool(x, stride=1, pad=True) if self.max_pool else _average_pool(x)
            parts.append(Conv(self.pool, (1, 1), name="branch_pool")(pooled))
        return jnp.concatenate(parts, axis=-1)


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
    recall, and 1008 logits without the bias, as the Inception Score is computed.
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
    """Features and logits of uint8 images (B, H, W, C) of any size; C is 3, or 1 for grey ones."""
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
    """FID's network with the published weights, which are in a file of the user's or, without one, fetched once into
    the cache. CheckpointError if they cannot be had.
    """
    if path and not pathlib.Path(path).is_file():
        raise CheckpointError(f"there is no file {path}: the weights of FID's Inception network, {WEIGHTS}, are wanted")
    found = pathlib.Path(path) if path else download.fetch(URL, SHA256, "the weights of FID's Inception network")
    return feature_network("inception-2015-12-05", apply, load(found), f"bilinear of TensorFlow 1 to {SIZE}x{SIZE}")


def load(path: pathlib.Path) -> Any:
    """The parameters in a file of the published weights: the known .pth, opened without running code in it, or the
    same tensors as .safetensors. CheckpointError if it is damaged or of another network.
    """
    if path.suffix == ".safetensors":
        found, _ = tensors.open_safetensors(path)
    else:
        found = tensors.from_torch(str(path), tensors.load_torch(path))
    unused = lambda name: name == "fc.bias" or name.endswith(".num_batches_tracked")
    shapes = {name: shape for name, shape in found.shapes.items() if not unused(name)}
    like = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    layout = Layout(_name)
    return tensors.read(found._replace(shapes=shapes, layout=layout), on_one_device(like), "FID's Inception network")
