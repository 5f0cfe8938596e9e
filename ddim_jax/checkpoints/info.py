"""What a checkpoint is of, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ddim_jax.utils.errors import CheckpointError

NOTHING: Mapping[str, Any] = MappingProxyType({})


class CheckpointInfo(NamedTuple):
    """A trained network as its files describe it: values of a stranger, not checked, and no tensor is read yet."""

    source: str  # where it is, for people
    read: Callable[[Any, bool], Any]  # (like, ema) -> params, in float32; see `tensors.read`
    config: Mapping[str, Any] | None = None  # the config that ddim_jax saved with it; None: of another program, and
    name: str = ""  # these say what it is: a name for output folders,
    model: Mapping[str, Any] = NOTHING  # fields of config.model,
    schedule: Mapping[str, Any] = NOTHING  # of config.schedule,
    sample: Mapping[str, Any] = NOTHING  # and of config.sample: how its authors sample it
    step: int | None = None  # how many updates made it, where that is known
    note: str = ""  # which settings of its files have no influence here, for people; "" for none


def no_raw_parameters(source: str, ema: bool) -> None:
    """CheckpointError if the raw parameters are asked of a checkpoint that holds one set alone."""
    if not ema:
        raise CheckpointError(f"config.sample.ema: {source} holds one set of parameters, False is not possible")
