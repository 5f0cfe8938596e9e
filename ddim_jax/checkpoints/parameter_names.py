"""Parameter names of `ddim_jax.models.unet.UNet` in PyTorch checkpoints: one table that is used in both directions.

{level} numbers the resolutions from the full one, 0, downwards; {depth} numbers them from the lowest upwards. {i}
counts from 0, {j} from 1. The official DDIM code and the PyTorch port of Ho's models use the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

NETWORK = [
    # ddim_jax                  diffusers.UNet2DModel                     official
    ("time_0", "time_embedding.linear_1", "temb.dense.0"),
    ("time_1", "time_embedding.linear_2", "temb.dense.1"),
    ("class", "class_embedding", None),
    ("conv_in", "conv_in", "conv_in"),
    ("down_{level}_block_{i}", "down_blocks.{level}.resnets.{i}", "down.{level}.block.{i}"),
    ("down_{level}_attention_{i}", "down_blocks.{level}.attentions.{i}", "down.{level}.attn.{i}"),
    # Without ".conv" if the image is resampled by a residual block, which has several modules.
    ("down_{level}_halve", "down_blocks.{level}.downsamplers.0.conv", "down.{level}.downsample.conv"),
    ("middle_block_{i}", "mid_block.resnets.{i}", "mid.block_{j}"),
    ("middle_attention", "mid_block.attentions.0", "mid.attn_1"),
    ("up_{level}_block_{i}", "up_blocks.{depth}.resnets.{i}", "up.{level}.block.{i}"),
    ("up_{level}_attention_{i}", "up_blocks.{depth}.attentions.{i}", "up.{level}.attn.{i}"),
    ("up_{level}_double", "up_blocks.{depth}.upsamplers.0.conv", "up.{level}.upsample.conv"),
    ("norm_out", "conv_norm_out", "norm_out"),
    ("conv_out", "conv_out", "conv_out"),
]
BLOCK = [
    ("norm_0", "norm1", "norm1"),
    ("conv_0", "conv1", "conv1"),
    ("embedding", "time_emb_proj", "temb_proj"),
    ("norm_1", "norm2", "norm2"),
    ("conv_1", "conv2", "conv2"),
    ("shortcut", "conv_shortcut", "nin_shortcut"),
]
ATTENTION = [
    # ddim_jax, diffusers, diffusers before 0.15, official
    ("norm", "group_norm", "group_norm", "norm"),
    ("query", "to_q", "query", "q"),
    ("key", "to_k", "key", "k"),
    ("value", "to_v", "value", "v"),
    ("out", "to_out.0", "proj_attn", "proj_out"),
]
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


Path = tuple[str, ...]


class Layout(NamedTuple):
    """The names and shapes of a network's tensors in a PyTorch checkpoint. Convolutions are (out, in, H, W)."""

    name: Callable[[Path, int], str]  # (path of a ddim_jax parameter, number of resolutions) -> name of the tensor
    convolutions: frozenset[str] = frozenset()  # modules with kernels (out, in, 1, 1), which are matrices in ddim_jax


_NUMBER = r"(?P<\1>\\d+)"
_PATTERNS = {re.compile(re.sub(r"\{(\w+)\}", _NUMBER, row[0])): row[0] for row in NETWORK}


def _layout(column: int, attention_column: int, convolutions: tuple[str, ...]) -> Layout:
    network = {row[0]: row[column] for row in NETWORK}
    inner = {row[0]: row[column] for row in BLOCK} | {row[0]: row[attention_column] for row in ATTENTION}
    return Layout(partial(_torch_name, network, inner), frozenset(convolutions))


def _torch_name(network: Mapping[str, str | None], inner: Mapping[str, str], path: Path, num_levels: int) -> str:
    """The name of a parameter's tensor: for diffusers and num_levels 4, ("up_0_block_1", "conv_0", "kernel") gives
    "up_blocks.3.resnets.1.conv1.weight". KeyError if the layout does not have the module.
    """
    top, *modules, leaf = path
    match, row = next((match, row) for pattern, row in _PATTERNS.items() if (match := pattern.fullmatch(top)))
    numbers = {name: int(value) for name, value in match.groupdict().items()}
    numbers["depth"], numbers["j"] = num_levels - 1 - numbers.get("level", 0), numbers.get("i", 0) + 1
    if network[row] is None:
        raise KeyError(row)
    module = network[row].format(**numbers)
    if modules and row.endswith(("_halve", "_double")):
        module = module.removesuffix(".conv")
    return ".".join([module, *(inner[name] for name in modules), LEAVES[leaf]])


DIFFUSERS = _layout(1, 1, ("shortcut",))
DIFFUSERS_OLD = _layout(1, 2, ("shortcut",))
OFFICIAL = _layout(2, 3, ("shortcut", "query", "key", "value", "out"))


def from_torch_layout(path: Path, tensor: np.ndarray, ndim: int) -> np.ndarray:
    """Converts a tensor of a PyTorch checkpoint to a ddim_jax parameter with `ndim` axes.

    Convolutions (out, in, H, W) become (H, W, in, out). Matrices (out, in), and 1x1 convolutions if ndim is 2, become
    (in, out). Other tensors are unchanged.
    """
    if path[-1] != "kernel":
        return tensor
    return tensor.transpose(2, 3, 1, 0) if ndim == 4 else tensor.reshape(tensor.shape[:2]).T


def to_torch_layout(path: Path, array: np.ndarray, layout: Layout) -> np.ndarray:
    """Converts a ddim_jax parameter to a tensor of a PyTorch checkpoint. The inverse of `from_torch_layout`."""
    if path[-1] != "kernel":
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T[:, :, None, None] if path[-2] in layout.convolutions else array.T
