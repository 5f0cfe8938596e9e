"""What a config may say, checked.

`configs/*.py` are ml_collections files with the defaults and a comment for every field. They become the frozen
dataclasses below at once: here stand the type and the range of each field, and a mistake is one line that names the
field. A section that names a factory, as config.model does, has the parameters of that factory as its fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ddim_jax import registry
from ddim_jax.data import DATASETS, SPLITS
from ddim_jax.models import NETWORKS
from ddim_jax.training.objectives import OBJECTIVES
from ddim_jax.training.optimizers import EMAS, OPTIMIZERS, RATES
from ddim_jax.training.times import TIMES
from ddim_jax.utils import files, ranges
from ddim_jax.utils.errors import ConfigError, error_context
from ddim_jax.utils.files import shown
from ddim_jax.utils.ranges import Options

MOST_STEPS = 1_000_000  # T: a file may ask for any, and is refused before anything of that size is made

_types = functools.cache(typing.get_type_hints)  # of a section: field -> type


def entry_of(table: Mapping[str, Any], default: Any = ranges.MISSING) -> Any:
    """A field that names an entry of a table, or "package.module:attribute". Nothing is imported here."""
    return ranges.field(default, lambda name: registry.check_name(table, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = entry_of(DATASETS)
    path: str = ranges.field()
    flip: bool = ranges.field()
    in_memory: bool = ranges.field()
    workers: int = ranges.at_least(0, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is common to all networks. The other fields are the parameters of the factory that `name` is of, with their
    types, ranges and defaults; see `of_network`.
    """

    name: str = entry_of(NETWORKS)
    image_size: int = ranges.at_least(1, 2048)
    image_channels: int = ranges.at_least(1, 4096)
    num_classes: int = ranges.at_least(0, 1_000_000, 0)
    label_dropout: float = ranges.below_one(0.0)
    prediction: str = ranges.one_of(registry.PREDICTIONS, "eps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = entry_of(registry.SCHEDULES)
    num_steps: int = ranges.at_least(1, MOST_STEPS)
    beta_start: float = ranges.above_zero()
    beta_end: float = ranges.above_zero()
    betas: tuple[float, ...] = ranges.at_most_so_many(MOST_STEPS)
    log_snr_max: float = ranges.field()
    log_snr_min: float = ranges.field()
    zero_terminal_snr: bool = ranges.field()
    options: Options = ranges.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Beside these, the parameters of the factory that `name` is of."""

    name: str = entry_of(OPTIMIZERS)
    schedule: str = entry_of(RATES, "constant")
    schedule_options: Options = ranges.field(Options())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: str = entry_of(OBJECTIVES)
    weight: str = entry_of(registry.WEIGHTS)
    weight_options: Options = ranges.field(Options())
    time: str = entry_of(TIMES)
    time_options: Options = ranges.field(Options())
    options: Options = ranges.field(Options())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = ranges.at_least(1)
    batch_size: int = ranges.at_least(1)
    seed: int = ranges.at_least(0, ranges.SEED)
    learning_rate: float = ranges.above_zero()
    warmup: int = ranges.at_least(0)
    clip_norm: float = ranges.above_zero()
    optimizer: OptimizerConfig = ranges.field()
    objective: ObjectiveConfig = ranges.field()
    ema_decay: float = ranges.below_one()
    ema_schedule: str = entry_of(EMAS)
    accumulate: int = ranges.at_least(1)
    max_skipped: int = ranges.at_least(1)
    log_every: int = ranges.at_least(1)
    checkpoint_every: int = ranges.at_least(1)
    keep: int = ranges.at_least(1)
    keep_every: int = ranges.at_least(0)
    grid_every: int = ranges.at_least(0)
    evaluate_every: int = ranges.at_least(0)
    evaluate_images: int = ranges.at_least(2)
    wandb: str = ranges.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = ranges.at_least(-1)
    fsdp: int = ranges.at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    sampler: str = entry_of(registry.SAMPLERS)
    eta: float = ranges.at_least(0)
    steps: int = ranges.at_least(1, 1_000_000)
    tau: str = ranges.field()
    tau_offset: int = ranges.at_least(0, MOST_STEPS)
    tau_end: int = ranges.at_least(0, MOST_STEPS)
    fixed_stride: bool = ranges.field()
    num_images: int = ranges.at_least(1)
    batch_size: int = ranges.at_least(1)
    seed: int = ranges.at_least(0, ranges.SEED)
    clip_x0: bool = ranges.field()
    keep_eps: bool = ranges.field()
    clip_range: float = ranges.above_zero()
    clip_quantile: float = ranges.below_one()
    ema: bool = ranges.field()
    label: int = ranges.at_least(-1)
    guidance: float = ranges.at_least(0)
    refine: int = ranges.at_least(0, 1000)
    options: Options = ranges.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    features: str = ranges.field()
    weights: str = ranges.field()
    metrics: str = ranges.field()
    num_images: int = ranges.at_least(2)
    batch_size: int = ranges.at_least(1, 65_536)
    reference: str = ranges.field()
    split: str = ranges.one_of({split: None for split in SPLITS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str = ranges.field(check=files.check_name)
    pretrained: str = ranges.field()
    data: DataConfig = ranges.field()
    model: ModelConfig = ranges.field()
    schedule: ScheduleConfig = ranges.field()
    train: TrainConfig = ranges.field()
    mesh: MeshConfig = ranges.field()
    sample: SampleConfig = ranges.field()
    evaluate: EvaluateConfig = ranges.field()


# Sections with the parameters of a factory as their fields -> the table that their name is looked up in.
FACTORIES = {ModelConfig: NETWORKS, OptimizerConfig: OPTIMIZERS}
GIVEN = ("learning_rate",)  # parameters of factories that another field of the config gives

# How a network is computed, which its parameters do not depend on.
NOT_ARCHITECTURE = ("dropout", "dtype", "remat")


class Open(NamedTuple):
    """A field that may be left open, as None: a published checkpoint then decides it, and what goes with it."""

    value: Any  # without a checkpoint
    beside: Mapping[str, Any]  # the fields that are decided with it -> their values where they say nothing


DEFAULT_IF_UNSET = {  # of config.sample
    "tau": Open("uniform", {"tau_offset": 0, "tau_end": 0}),
    "clip_x0": Open(False, {"clip_range": 1.0, "clip_quantile": 0.0}),
}


def parse(values: Mapping[str, Any]) -> Config:
    """The checked Config of nested dicts (a ConfigDict's `to_dict()`). Raises ConfigError, also for a field that has no
    effect beside the others.
    """
    config = typed(values)
    train, sample, model = config.train, config.sample, config.model
    if train.checkpoint_every % train.log_every:
        raise ConfigError(
            f"config.train.checkpoint_every: must be a multiple of log_every ({train.log_every}), so that a resumed "
            f"run logs what an undisturbed one logs; got {train.checkpoint_every}"
        )
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"config.train.accumulate: must divide batch_size ({train.batch_size}), got {train.accumulate}"
        )
    with error_context("config.sample.sampler"):
        factory = registry.resolve(registry.SAMPLERS, sample.sampler)
    if sample.eta and "eta" not in registry.accepts(factory):
        raise ConfigError(
            f"config.sample.eta: the sampler {sample.sampler!r} has no eta, leave it at 0; got {sample.eta}"
        )
    if config.schedule.zero_terminal_snr and model.prediction == "eps":
        raise ConfigError(
            "config.schedule.zero_terminal_snr: needs config.model.prediction x0 or v: at T nothing of x_0 follows "
            "from eps"
        )
    if sample.keep_eps and not sample.clip_x0:
        raise ConfigError("config.sample.keep_eps: has no effect without config.sample.clip_x0=True; got True")
    if not sample.clip_x0:
        check_without_effect(dataclasses.asdict(sample), "clip_x0", "without config.sample.clip_x0=True")
    if sample.label >= max(model.num_classes, 1) or (sample.label >= 0 and not model.num_classes):
        raise ConfigError(
            f"config.sample.label: must be -1 (all in turn) or a class of the network, which has "
            f"{model.num_classes}; got {sample.label}"
        )
    if sample.guidance != 1 and not (model.num_classes and model.label_dropout):
        raise ConfigError(
            f"config.sample.guidance: must be 1 for a network without classes, or trained without "
            f"config.model.label_dropout: it cannot tell what a class adds; got {sample.guidance}"
        )
    return config


def typed(values: Mapping[str, Any], trusted: bool = True) -> Config:
    """The Config of nested dicts, of which each field by itself has the right type and range. Raises ConfigError.

    trusted: whether modules that the values name may be imported: those of a user, not of a file.
    """
    return _parse(Config, _closed(values), "config", trusted)


def _closed(values: Any) -> Any:
    """The values with what config.sample leaves open as it is without a checkpoint."""
    if not isinstance(values, Mapping) or not isinstance(values.get("sample"), Mapping):
        return values
    sample = values["sample"]
    closed = {name: field.value for name, field in DEFAULT_IF_UNSET.items() if name in sample and sample[name] is None}
    return {**values, "sample": {**sample, **closed}}


def decided(sample: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """config.sample with what it leaves open as a checkpoint is sampled. ConfigError for a field that is given though
    the checkpoint decides it.
    """
    for name, field in DEFAULT_IF_UNSET.items():
        if name in sample and sample[name] is None:
            check_without_effect(sample, name, f"while config.sample.{name} is open: config.pretrained decides both")
            given = {name: published[name]} | {other: published[other] for other in field.beside}
            sample = {**sample, **(given if given[name] else given | field.beside)}
    return dict(sample)


def check_without_effect(sample: Mapping[str, Any], name: str, why: str) -> None:
    """ConfigError if a field that goes with the open field `name` of config.sample is given."""
    for other, neutral in DEFAULT_IF_UNSET[name].beside.items():
        if sample.get(other, neutral) != neutral:
            raise ConfigError(f"config.sample.{other}: has no effect {why}; got {shown(sample[other])}")


def section(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """One section, checked: a ModelConfig or a ScheduleConfig. ConfigError, beginning with `where`, if it is not
    right.
    """
    return _parse(kind, values, where, trusted=False)


def part_of_section(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some fields of a section, checked. ConfigError, beginning with `where`, for one that is not right."""
    return _checked(kind, values, where, trusted=False)


def with_text(values: Mapping[str, Any], field: str, text: str) -> dict[str, Any]:
    """Nested values with the field (dotted, "sample.seed") set to what the text says. ConfigError if there is no such
    field, or if it cannot be that.
    """
    with error_context(f"config.{field}"):
        return with_value(values, field, _from_text(type_of(field, values), text))


def with_value(values: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """Nested values with the field (dotted) set."""
    name, _, rest = field.partition(".")
    inner = values.get(name, {})
    return {**values, name: with_value(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def is_open(field: str) -> bool:
    """Whether a field (dotted) belongs to a factory, so that its config decides whether there is one."""
    section, _, _ = field.rpartition(".")
    return section in ("model", "train.optimizer") or bool(re.search(r"[._]options(\.|$)", field))


def type_of(field: str, values: Mapping[str, Any]) -> Any:
    """The type of a field (dotted, "sample.seed") of a config with these values. ConfigError, with the nearest name, if
    there is no such field.
    """
    kind, path = Config, "config"
    for name in field.split("."):
        if kind is Options:
            return Any
        kind = kind_of(kind, values, path, trusted=True) if dataclasses.is_dataclass(kind) else kind
        fields = _types(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            raise ConfigError(f"{path} has no field {shown(name)}{nearest(name, fields)}")
        kind, path = fields[name], f"{path}.{name}"
        values = values.get(name, {}) if isinstance(values, Mapping) else {}
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"{path} is a section of fields")
    return kind


def _from_text(kind: Any, text: str) -> Any:
    if kind is Any:
        return literal(text)
    if isinstance(kind, types.GenericAlias):
        return tuple(_from_text(typing.get_args(kind)[0], part) for part in text.split(",") if part)
    if kind is bool:
        return registry.lookup({"true": True, "false": False}, text.lower())
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be of type {kind.__name__}, got {shown(text)}") from None


def literal(text: str) -> Any:
    """The value that a text is in Python, where it is a number, a text in quotes or a tuple; else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def kind_of(kind: type, values: Any, path: str, trusted: bool) -> type:
    """The dataclass of a section with these values: where its name is that of a factory, one with the parameters of the
    factory beside the common fields. A factory that is not to be imported may have any.
    """
    if kind not in FACTORIES or not isinstance(values, Mapping) or "name" not in values:
        return kind
    name = values["name"]
    with error_context(f"{path}.name"):
        ranges.typed(str, name)
        registry.check_name(FACTORIES[kind], name)
        if registry.is_code(name) and not trusted:
            return _free_section(kind, tuple(Options.of({other: 0 for other in values})))
        return section_of(kind, registry.resolve(FACTORIES[kind], name))


@functools.cache
def section_of(kind: type, factory: Any) -> type:
    """A section with the parameters of a factory as fields beside the common ones; not those that no config can say."""
    common = {field.name for field in dataclasses.fields(kind)}
    fields = [
        (name, parameter.kind, ranges.field(parameter.default, parameter.check))
        for name, parameter in ranges.parameters(factory).items()
        if name not in common and name not in GIVEN and ranges.is_plain(parameter.default)
    ]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)


@functools.cache
def _free_section(kind: type, names: tuple[str, ...]) -> type:
    common = {field.name for field in dataclasses.fields(kind)}
    fields = [(name, Any, ranges.field()) for name in names if name not in common]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)


def _parse(kind: type, values: Any, path: str, trusted: bool) -> Any:
    kind = kind_of(kind, values, path, trusted)
    checked = _checked(kind, values, path, trusted)
    for field in dataclasses.fields(kind):
        if field.name not in checked and field.default is ranges.MISSING:
            raise ConfigError(f"{path}.{field.name} is missing")
    return kind(**checked)


def _checked(kind: type, values: Any, path: str, trusted: bool) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: must be a section of fields, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{path} has no field {shown(name)}{nearest(name, fields)}")
    annotations = _types(kind)
    parsed = {}
    for name, field in fields.items():
        if name not in values:
            continue
        where = f"{path}.{name}"
        if dataclasses.is_dataclass(annotations[name]):
            parsed[name] = _parse(annotations[name], values[name], where, trusted)
        else:
            with error_context(where):
                parsed[name] = ranges.typed(annotations[name], values[name])
                if field.metadata.get("check"):
                    field.metadata["check"](parsed[name])
    return parsed


def nearest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:100], names, 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; it has {', '.join(names) or 'none'}"


def field_names(kind: type = Config, path: str = "") -> Iterator[str]:
    """All fields of the sections of a config, dotted: "name", "data.path". Of a section that names a factory those of
    the first one.
    """
    if kind in FACTORIES:
        kind = section_of(kind, next(iter(FACTORIES[kind].values())))
    for name, inner in _types(kind).items():
        if dataclasses.is_dataclass(inner):
            yield from field_names(inner, f"{path}{name}.")
        else:
            yield path + name
