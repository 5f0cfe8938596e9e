"""How published checkpoints call the modules of `ddim_jax.models.unet.UNet`: one table, read both ways.

{level} counts resolutions from the full one, 0, downwards; {depth} counts them from the lowest upwards. {i} counts
from 0, {j} from 1. The official DDIM code and the PyTorch port of Ho's models share their names.
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
    """One way to name the tensors of a network, and to lay them out. Convolutions are (out, in, H, W) in all."""

    name: Callable[[Path, int], str]  # (path of our parameter, number of resolutions) -> their name
    convolutions: frozenset[str] = frozenset()  # modules that we compute as matrices: (out, in, 1, 1) there


_NUMBER = r"(?P<\1>\\d+)"
_OURS = {re.compile(re.sub(r"\{(\w+)\}", _NUMBER, row[0])): row[0] for row in NETWORK}


def _layout(column: int, attention_column: int, convolutions: tuple[str, ...]) -> Layout:
    network = {row[0]: row[column] for row in NETWORK}
    inner = {row[0]: row[column] for row in BLOCK} | {row[0]: row[attention_column] for row in ATTENTION}
    return Layout(partial(_theirs, network, inner), frozenset(convolutions))


def _theirs(network: Mapping[str, str | None], inner: Mapping[str, str], path: Path, num_levels: int) -> str:
    """("up_0_block_1", "conv_0", "kernel") is "up_blocks.3.resnets.1.conv1.weight" in diffusers, for num_levels 4.
    KeyError where the layout has no such module.
    """
    top, *modules, leaf = path
    match, row = next((found, row) for pattern, row in _OURS.items() if (found := pattern.fullmatch(top)))
    numbers = {name: int(value) for name, value in match.groupdict().items()}
    numbers["depth"], numbers["j"] = num_levels - 1 - numbers.get("level", 0), numbers.get("i", 0) + 1
    if network[row] is None:
        raise KeyError(row)
    return ".".join([network[row].format(**numbers), *(inner[name] for name in modules), LEAVES[leaf]])


DIFFUSERS = _layout(1, 1, ("shortcut",))
DIFFUSERS_OLD = _layout(1, 2, ("shortcut",))
OFFICIAL = _layout(2, 3, ("shortcut", "query", "key", "value", "out"))


def to_ours(path: Path, tensor: np.ndarray, ndim: int) -> np.ndarray:
    """Their tensor as our parameter of ndim axes: channels last; matrices, and 1x1 convolutions, as (in, out)."""
    if path[-1] != "kernel":
        return tensor
    return tensor.transpose(2, 3, 1, 0) if ndim == 4 else tensor.reshape(tensor.shape[:2]).T


def to_theirs(path: Path, array: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `to_ours`."""
    if path[-1] != "kernel":
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T[:, :, None, None] if path[-2] in layout.convolutions else array.T
