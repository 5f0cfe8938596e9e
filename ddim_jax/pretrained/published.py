"""What a checkpoint says of itself, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ddim_jax import config as config_lib
from ddim_jax import files, registry
from ddim_jax.config import ModelConfig, SampleConfig, ScheduleConfig
from ddim_jax.errors import CheckpointError, ConfigError, error_context


class Published(NamedTuple):
    """A trained network as its files describe it; no tensor is read yet."""

    name: str  # for output folders
    source: str  # for people
    model: ModelConfig
    schedule: ScheduleConfig
    sample: Mapping[str, Any]  # the fields SAMPLED of config.sample: how its authors sample it
    config: Mapping[str, Any]  # all of the config that it was trained with, where it is ours; else nothing
    step: int | None  # how many updates made it, where that is known
    read: Callable[[Any, bool], Any]  # (like, ema) -> params, in float32; see `tensors.read`
    note: str = ""  # for people: what of its files has no influence here; "" for nothing


# What of config.sample goes with a network: two groups, each decided by its first field.
SAMPLED = tuple((name, *field.beside) for name, field in config_lib.OPEN.items())


def describe(
    name: str,
    source: str,
    model: Mapping[str, Any],
    schedule: Mapping[str, Any],
    sample: Mapping[str, Any],
    read: Callable[[Any, bool], Any],
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
    note: str = "",
) -> Published:
    """A Published of a name and the fields of config.model, config.schedule and config.sample, checked. CheckpointError
    for fields that no network can have, and for a name that cannot be part of a path.
    """
    try:
        with error_context("name"):
            if not isinstance(name, str):
                raise ValueError(f"must be a text, got {files.shown(name)}")
            files.check_name(name)
        with error_context("step"):
            if step is not None and not 0 <= step < 2**63:
                raise ValueError(f"must be in 0..2^63 - 1, got {files.shown(step)}")
        sampled = config_lib.part_of_section(SampleConfig, sample, "sample")
        assumed = {"name": "unet", "dropout": 0.0} if "name" not in model else {}
        parsed = config_lib.section(ModelConfig, {**assumed, **model}, "model")
        noise = config_lib.section(ScheduleConfig, {**config_lib.BEFORE["schedule"], **schedule}, "schedule")
        if not registry.is_code(parsed.name):  # else it is code, which a file alone does not run
            config_lib.network(parsed)
        if not registry.is_code(noise.name):
            config_lib.noise_schedule(noise)
    except ConfigError as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from error
    return Published(name, source, parsed, noise, sampled, config or {}, step, read, note)


def describe_own(
    config: Mapping[str, Any], step: int | None, source: str, read: Callable[[Any, bool], Any]
) -> Published:
    """The Published of a config that ddim_jax saved, also an earlier version."""
    try:
        config = config_lib.filled(config)
        name, model, schedule, sample = (config[section] for section in ("name", "model", "schedule", "sample"))
        sampled = {field: sample[field] for group in SAMPLED for field in group}
        model, schedule = dict(model), dict(schedule)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {source} is not whole: {error!r}") from error
    return describe(name, source, model, schedule, sampled, read, config, step)


def no_raw_parameters(source: str, ema: bool) -> None:
    """CheckpointError if the raw parameters are asked of a checkpoint that holds one set alone."""
    if not ema:
        raise CheckpointError(f"config.sample.ema: {source} holds one set of parameters, False is not possible")
