"""The description of a checkpoint, which is the same for all formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ddim_jax.utils.errors import CheckpointError

NOTHING: Mapping[str, Any] = MappingProxyType({})


class CheckpointInfo(NamedTuple):
    """The description of a trained network, from its files. The values are untrusted and not checked. No tensor is read
    yet.
    """

    source: str  # its path or id, for messages
    read: Callable[[Any, bool], Any]  # (like, ema) -> params, in float32; see `tensors.read`
    config: Mapping[str, Any] | None = None  # the config that ddim_jax saved with it, None for another program
    # If config is None, the next four fields describe the network.
    name: str = ""  # a name for output folders
    model: Mapping[str, Any] = NOTHING  # fields of config.model
    schedule: Mapping[str, Any] = NOTHING  # fields of config.schedule
    sample: Mapping[str, Any] = NOTHING  # fields of config.sample: the sampling settings of its authors
    step: int | None = None  # the number of updates, None if it is not known
    # For files that do not tell the size of the images: image_size -> model. CheckpointError if it is not supported.
    sized: Callable[[int], Mapping[str, Any]] | None = None
    note: str = ""  # a message about settings in its files that are ignored, "" if there are none


def no_raw_parameters(source: str, ema: bool) -> None:
    """CheckpointError if ema is False. For a checkpoint that holds only one set of parameters."""
    if not ema:
        raise CheckpointError(f"config.sample.ema: must be True, got False: {source} holds one set of parameters")
