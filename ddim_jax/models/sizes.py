"""Checks of sizes that several networks share. Each raises a ValueError that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The limits for the sizes, much larger than those of published networks. A checkpoint file may contain any size: one
# above the limit raises an error before an array is allocated.
MOST_LEVELS = 12  # resolutions
MOST_BLOCKS = 128  # residual blocks of a network


def check_blocks(network: Any, per_resolution: int) -> None:
    """The number of residual blocks. per_resolution: the blocks of the encoder and the decoder at one resolution."""
    blocks = len(network.channel_mult) * per_resolution
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"num_res_blocks {network.num_res_blocks} and channel_mult {network.channel_mult} give {blocks} residual "
            f"blocks, expected at most {MOST_BLOCKS}"
        )


def check_resolutions(network: Any, names: Sequence[str], patch_size: int = 1) -> list[int]:
    """The size of the image, and the resolutions in the fields of these names. Returns the network's resolutions."""
    downsamplings = len(network.channel_mult) - 1
    multiple = patch_size * 2**downsamplings
    if network.image_size % multiple or network.image_size < multiple:
        patches = f" of patches of {patch_size}" if patch_size > 1 else ""
        raise ValueError(
            f"image_size must be a multiple of {multiple} for {downsamplings} downsamplings{patches} "
            f"(channel_mult {network.channel_mult}), got {network.image_size}"
        )
    resolutions = [network.image_size // patch_size >> level for level in range(downsamplings + 1)]
    for name in names:
        for resolution in getattr(network, name):
            if resolution not in resolutions:
                raise ValueError(f"{name} must be among the network's resolutions {resolutions}, got {resolution}")
    return resolutions


def check_label_dropout(network: Any) -> None:
    if network.label_dropout and not network.num_classes:
        raise ValueError(f"label_dropout needs num_classes above 0, got {network.label_dropout}")
