"""What a config may say, checked, and the objects that it names.

`configs/*.py` are ml_collections files with the defaults and a comment for every field. They become the
frozen dataclasses below at once: here stand the type and the range of each field, and a mistake is one line
that names the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ddim_jax import registry, trajectory
from ddim_jax.data import DATASETS, SPLITS
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.models.unet import HALVE_PADDING, UNet
from ddim_jax.samplers import Sampler
from ddim_jax.schedule import Schedule
from ddim_jax.trajectory import Transitions


def _field(check: Callable[[Any], None] | None = None) -> Any:
    return dataclasses.field(metadata={"check": check})


def _at_least(low: float) -> Any:
    def check(value):
        if value < low:
            raise ValueError(f"must be at least {low}, got {value}")

    return _field(check)


def _above_zero() -> Any:
    def check(value):
        if not value > 0:
            raise ValueError(f"must be above 0, got {value}")

    return _field(check)


def _below_one() -> Any:
    def check(value):
        if not 0 <= value < 1:
            raise ValueError(f"must be in [0, 1), got {value}")

    return _field(check)


def _one_of(table: Mapping[str, Any]) -> Any:
    return _field(lambda value: registry.lookup(table, value))


def _all_positive() -> Any:
    def check(values):
        if not values or min(values) < 1:
            raise ValueError(f"must hold at least one number and none below 1, got {values}")

    return _field(check)


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = _one_of(DATASETS)
    path: str = _field()
    flip: bool = _field()
    in_memory: bool = _field()
    workers: int = _at_least(0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    image_size: int = _at_least(1)
    image_channels: int = _at_least(1)
    channels: int = _at_least(4)
    channel_mult: tuple[int, ...] = _all_positive()
    num_res_blocks: int = _at_least(1)
    attention_resolutions: tuple[int, ...] = _field()
    middle_attention: bool = _field()
    head_channels: int = _at_least(0)
    groups: int = _at_least(1)
    norm_epsilon: float = _above_zero()
    halve_padding: str = _one_of(HALVE_PADDING)
    frequency_shift: float = _field()
    cos_first: bool = _field()
    dropout: float = _below_one()
    num_classes: int = _at_least(0)
    label_dropout: float = _below_one()
    dtype: str = _one_of(DTYPES)
    remat: bool = _field()
    prediction: str = _one_of(registry.PREDICTIONS)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    name: str = _one_of(registry.SCHEDULES)
    num_steps: int = _at_least(1)
    beta_start: float = _above_zero()
    beta_end: float = _above_zero()
    betas: tuple[float, ...] = _field()
    log_snr_max: float = _field()
    log_snr_min: float = _field()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int = _at_least(1)
    batch_size: int = _at_least(1)
    seed: int = _at_least(0)
    learning_rate: float = _above_zero()
    warmup: int = _at_least(0)
    clip_norm: float = _above_zero()
    ema_decay: float = _below_one()
    gamma: str = _one_of(registry.GAMMAS)
    real_time: bool = _field()
    accumulate: int = _at_least(1)
    max_skipped: int = _at_least(1)
    log_every: int = _at_least(1)
    checkpoint_every: int = _at_least(1)
    keep: int = _at_least(1)
    keep_every: int = _at_least(0)
    grid_every: int = _at_least(0)
    evaluate_every: int = _at_least(0)
    evaluate_images: int = _at_least(2)
    wandb: str = _field()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = _at_least(-1)
    fsdp: int = _at_least(1)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    sampler: str = _one_of(registry.SAMPLERS)
    eta: float = _at_least(0)
    steps: int = _at_least(1)
    tau: str = _field()
    tau_offset: int = _at_least(0)
    tau_end: int = _at_least(0)
    num_images: int = _at_least(1)
    batch_size: int = _at_least(1)
    seed: int = _at_least(0)
    clip_x0: bool = _field()
    clip_range: float = _above_zero()
    clip_quantile: float = _below_one()
    ema: bool = _field()
    label: int = _at_least(-1)
    guidance: float = _at_least(0)
    refine: int = _at_least(0)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    features: str = _field()
    weights: str = _field()
    metrics: str = _field()
    num_images: int = _at_least(2)
    batch_size: int = _at_least(1)
    reference: str = _field()
    split: str = _one_of({split: None for split in SPLITS})


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = _field()
    pretrained: str = _field()
    data: DataConfig = _field()
    model: ModelConfig = _field()
    schedule: ScheduleConfig = _field()
    train: TrainConfig = _field()
    mesh: MeshConfig = _field()
    sample: SampleConfig = _field()
    evaluate: EvaluateConfig = _field()


# How a network is computed, which its parameters do not depend on.
FREE_OF_NETWORK = ("dropout", "dtype", "remat")

# Fields that may be left open, as None: a published checkpoint then decides, and without one it is this.
OPEN = {"tau": "uniform", "clip_x0": False}

# What held before a field was there: configs saved by earlier versions do not have it.
BEFORE = {
    "pretrained": "",
    "data": {"in_memory": False, "workers": 0},
    "model": {
        "middle_attention": True,
        "norm_epsilon": 1e-6,
        "halve_padding": "end",
        "frequency_shift": 1.0,
        "cos_first": False,
        "label_dropout": 0.0,
        "remat": False,
    },
    "schedule": {"log_snr_max": 13.3, "log_snr_min": -10.0},
    "train": {
        "accumulate": 1,
        "real_time": False,
        "max_skipped": 20,
        "evaluate_every": 0,
        "evaluate_images": 1000,
        "wandb": "",
    },
    "mesh": {"data": -1, "fsdp": 1},
    "sample": {"tau_offset": 0, "tau_end": 0, "clip_range": 1.0, "clip_quantile": 0.0, "guidance": 1.0, "refine": 0},
    "evaluate": {
        "features": "inception",
        "weights": "",
        "metrics": "fid,kid,inception_score,precision_recall",
        "num_images": 50_000,
        "batch_size": 50,
        "reference": "",
        "split": "train",
    },
}


def parse(values: Mapping[str, Any]) -> Config:
    """The checked Config of nested dicts (a ConfigDict's `to_dict()`). Raises ConfigError."""
    if isinstance(values.get("sample"), Mapping):
        given = values["sample"]
        closed = {name: value for name, value in OPEN.items() if name in given and given[name] is None}
        values = {**values, "sample": {**given, **closed}}
    config = _parse(Config, values, "config")
    train = config.train
    if train.checkpoint_every % train.log_every:
        raise ConfigError(
            f"config.train.checkpoint_every: must be a multiple of log_every ({train.log_every}), so that a resumed "
            f"run logs what an undisturbed one logs; got {train.checkpoint_every}"
        )
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"config.train.accumulate: must divide batch_size ({train.batch_size}), got {train.accumulate}"
        )
    if config.sample.eta and "eta" not in registry.accepts(registry.SAMPLERS[config.sample.sampler]):
        raise ConfigError(
            f"config.sample.eta: the sampler {config.sample.sampler!r} has no eta, leave it at 0; "
            f"got {config.sample.eta}"
        )
    if config.sample.label >= max(config.model.num_classes, 1) or (
        config.sample.label >= 0 and not config.model.num_classes
    ):
        raise ConfigError(
            f"config.sample.label: must be -1 (all in turn) or a class of the network, which has "
            f"{config.model.num_classes}; got {config.sample.label}"
        )
    if config.sample.guidance != 1 and not (config.model.num_classes and config.model.label_dropout):
        raise ConfigError(
            f"config.sample.guidance: must be 1 for a network without classes, or trained without "
            f"config.model.label_dropout: it cannot tell what a class adds; got {config.sample.guidance}"
        )
    return config


def parse_saved(values: Mapping[str, Any]) -> Config:
    """The Config that was saved as JSON, also by an earlier version. Raises ConfigError."""
    return parse(filled(values))


def filled(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Saved values with the fields that came later."""
    return _fill(BEFORE, values)


def _fill(defaults: Any, values: Any) -> Any:
    """values, with what they lack taken from defaults; both nested dicts."""
    if not isinstance(defaults, Mapping) or not isinstance(values, Mapping):
        return values
    return {**defaults, **{name: _fill(defaults.get(name), value) for name, value in values.items()}}


def section(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """One section, checked: a ModelConfig or a ScheduleConfig. ConfigError, beginning with `where`, if it is not
    right.
    """
    return _parse(kind, values, where)


def with_text(values: Mapping[str, Any], field: str, text: str) -> dict[str, Any]:
    """Nested values with the field (dotted, "sample.seed") set to what the text says. ConfigError if there is no such
    field, or if it cannot be that.
    """
    return _with_text(Config, values, "config", field.split("."), text)


def _with_text(kind: type, values: Mapping[str, Any], path: str, names: list[str], text: str) -> dict[str, Any]:
    name, *rest = names
    fields = typing.get_type_hints(kind)
    if name not in fields:
        raise ConfigError(f"{path} has no field {name!r}{_nearest(name, fields)}")
    where, inner = f"{path}.{name}", fields[name]
    if dataclasses.is_dataclass(inner) != bool(rest):
        raise ConfigError(f"{where} is {'no' if rest else 'a'} section of fields")
    if rest:
        return {**values, name: _with_text(inner, values[name], where, rest, text)}
    with error_context(where):
        return {**values, name: _from_text(inner, text)}


def _from_text(kind: Any, text: str) -> Any:
    if isinstance(kind, types.GenericAlias):
        return tuple(_from_text(typing.get_args(kind)[0], part) for part in text.split(",") if part)
    if kind is bool:
        return registry.lookup({"true": True, "false": False}, text.lower())
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be of type {kind.__name__}, got {text!r}") from None


def _parse(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: must be a section of fields, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{path} has no field {name!r}{_nearest(name, fields)}")
    annotations = typing.get_type_hints(kind)
    parsed = {}
    for name, field in fields.items():
        if name not in values:
            raise ConfigError(f"{path}.{name} is missing")
        where = f"{path}.{name}"
        if dataclasses.is_dataclass(annotations[name]):
            parsed[name] = _parse(annotations[name], values[name], where)
        else:
            with error_context(where):
                parsed[name] = _typed(annotations[name], values[name])
                if field.metadata["check"]:
                    field.metadata["check"](parsed[name])
    return kind(**parsed)


def _typed(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.GenericAlias):  # tuple[x, ...]
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"must be a tuple, got {value!r}")
        return tuple(_typed(typing.get_args(kind)[0], item) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"must be finite, got {value}")
    return value


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; it has {', '.join(names)}"


# Where things lie on this machine, and accounts: nothing that the use of a network needs.
PRIVATE = (
    "pretrained",
    "data.path",
    "train.wandb",
    "evaluate.features",  # a module of the user's, where it is none of ours
    "evaluate.weights",
    "evaluate.reference",
)


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's nested values to give to others: the fields of PRIVATE hold what they hold by default.

    Sections and fields that are not there stay away, so it takes any part of a config.
    """
    for field in PRIVATE:
        values = _without(values, BEFORE, field.split("."))
    return dict(values)


def _without(values: Any, defaults: Any, names: list[str]) -> Any:
    name, *rest = names
    if not isinstance(values, Mapping) or name not in values:
        return values
    default = defaults.get(name, {} if rest else "")
    return {**values, name: _without(values[name], default, rest) if rest else default}


# What a run that continues must not change, and what a network must be sampled with as it was trained.
RESUMED_WITH = (
    "pretrained",
    "model",
    "schedule",
    "data.name",
    "data.flip",
    *(f"train.{name}" for name in ("batch_size", "seed", "learning_rate", "warmup", "clip_norm", "ema_decay", "gamma")),
    "train.accumulate",
    "train.real_time",
)
SAMPLED_WITH = (
    "schedule",
    *(f"model.{field.name}" for field in dataclasses.fields(ModelConfig) if field.name not in FREE_OF_NETWORK),
)


def check_same(config: Config, saved: Config, fields: tuple[str, ...], where: str) -> None:
    """ConfigError, naming the first field of `fields` (dotted) in which the config differs from the one saved in
    `where`.
    """
    for field in fields:
        ours, theirs = config, saved
        for name in field.split("."):
            ours, theirs = getattr(ours, name), getattr(theirs, name)
        if dataclasses.is_dataclass(ours):
            check_same(config, saved, tuple(f"{field}.{inner.name}" for inner in dataclasses.fields(ours)), where)
        elif ours != theirs:
            raise ConfigError(f"config.{field} is {ours!r}, but {where} was made with {theirs!r}")


def noise_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that config.schedule names. Its factory gets those fields that its signature names."""
    with error_context("config.schedule"):
        return registry.build(registry.lookup(registry.SCHEDULES, config.name), dataclasses.asdict(config))


def network(config: ModelConfig) -> UNet:
    """The U-Net that config.model describes; ConfigError if its sizes do not fit together."""
    fields = dataclasses.asdict(config) | {"dtype": DTYPES[config.dtype], "head_channels": config.head_channels or None}
    model = registry.build(UNet, fields)
    with error_context("config.model"):
        model.check()
    return model


class Process(NamedTuple):
    """A generative process, ready to run."""

    sampler: Sampler
    tau: np.ndarray  # (S+1,), from config.sample.tau_end up
    transitions: Transitions  # leaves (S,)


def process(config: SampleConfig, schedule: Schedule) -> Process:
    """Sampler, tau and transitions of config.sample; ConfigError if they do not fit together or the schedule.

    config.tau is a name in registry.TAUS or registry.SPACINGS, or the levels themselves: "1,10,99.5,1000"; tau_offset
    and tau_end: see `trajectory.moved`.
    """
    with error_context("config.sample.tau"):
        given = _numbers(config.tau)
        if given:
            tau = trajectory.explicit(schedule.num_steps, given)
        else:
            registry.lookup(registry.NAMED_TAUS, config.tau)
    if not given:
        with error_context("config.sample.steps"):
            if config.tau in registry.TAUS:
                tau = registry.TAUS[config.tau](schedule.num_steps, config.steps)
            else:
                tau = registry.SPACINGS[config.tau](schedule, config.steps)
    with error_context("config.sample.tau_offset and tau_end"):
        tau = trajectory.moved(schedule.num_steps, tau, config.tau_offset, config.tau_end)
    transitions = trajectory.descend(schedule, tau, config.tau_end)
    with error_context("config.sample.eta"):
        sampler = registry.build(registry.SAMPLERS[config.sampler], dataclasses.asdict(config))
        sampler.check(transitions)
    return Process(sampler, tau, transitions)


def _numbers(text: str) -> list[float]:
    """Those of a list with commas; none if it is something else."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return []
