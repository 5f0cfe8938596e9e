"""What a config may say, checked, and the objects that it names.

`configs/*.py` are ml_collections files with the defaults and a comment for every field. They become the
frozen dataclasses below at once: here stand the type and the range of each field, and a mistake is one line
that names the field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ddim_jax import files, registry, trajectory
from ddim_jax.data import DATASETS, SPLITS
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.files import shown
from ddim_jax.models.unet import HALVE_PADDING, UNet
from ddim_jax.samplers import Sampler
from ddim_jax.schedule import Schedule, zero_terminal_snr
from ddim_jax.trajectory import Transitions

INT = 2**31 - 1  # steps and indices have 32 bits on the devices
SEED = 2**32 - 1  # a key is made of 32 bits: seeds beyond would draw the images of seeds below
FLOAT = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)  # what is smaller is 0 on the devices
CHARACTERS = 1 << 16  # of a text
ITEMS = 1 << 20  # of a tuple


_types = functools.cache(typing.get_type_hints)  # of a section: field -> type


def _field(check: Callable[[Any], None] | None = None) -> Any:
    return dataclasses.field(metadata={"check": check})


def _at_least(low: float, most: float = INT) -> Any:
    def check(value):
        if value < low:
            raise ValueError(f"must be at least {low}, got {shown(value)}")
        if value > most:
            raise ValueError(f"must be at most {most}, got {shown(value)}")

    return _field(check)


def _above_zero() -> Any:
    def check(value):
        if value < TINY:
            raise ValueError(f"must be above 0{' in float32' if value > 0 else ''}, got {value}")

    return _field(check)


def _below_one() -> Any:
    def check(value):
        if not 0 <= value < 1:
            raise ValueError(f"must be in [0, 1), got {value}")

    return _field(check)


def _one_of(table: Mapping[str, Any]) -> Any:
    return _field(lambda value: registry.lookup(table, value))


def _all_positive(count: int, most: int) -> Any:
    def check(values):
        if not values or min(values) < 1:
            raise ValueError(f"must hold at least one number and none below 1, got {shown(values)}")
        if len(values) > count or max(values) > most:
            raise ValueError(f"must hold at most {count} numbers and none above {most}, got {shown(values)}")

    return _field(check)


def _at_most_so_many(count: int) -> Any:
    def check(values):
        if len(values) > count:
            raise ValueError(f"must hold at most {count} numbers, got {len(values)}")

    return _field(check)


# The largest sizes of a network and a schedule, far beyond all that are known: a file may ask for any, and is refused
# before anything of that size is made.
MOST_LEVELS = 12  # resolutions
MOST_BLOCKS = 128  # residual blocks, in all
MOST_STEPS = 1_000_000  # T

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = _one_of(DATASETS)
    path: str = _field()
    flip: bool = _field()
    in_memory: bool = _field()
    workers: int = _at_least(0, 1024)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    image_size: int = _at_least(1, 2048)
    image_channels: int = _at_least(1, 4096)
    patch_size: int = _at_least(1, 64)
    channels: int = _at_least(4, 4096)
    channel_mult: tuple[int, ...] = _all_positive(MOST_LEVELS, 64)
    num_res_blocks: int = _at_least(1, MOST_BLOCKS)
    attention_resolutions: tuple[int, ...] = _at_most_so_many(MOST_LEVELS)
    middle_attention: bool = _field()
    head_channels: int = _at_least(0, 1 << 18)
    groups: int = _at_least(1, 1 << 18)
    norm_epsilon: float = _above_zero()
    halve_padding: str = _one_of(HALVE_PADDING)
    frequency_shift: float = _field()
    cos_first: bool = _field()
    dropout: float = _below_one()
    num_classes: int = _at_least(0, 1_000_000)
    label_dropout: float = _below_one()
    dtype: str = _one_of(DTYPES)
    remat: bool = _field()
    prediction: str = _one_of(registry.PREDICTIONS)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    name: str = _one_of(registry.SCHEDULES)
    num_steps: int = _at_least(1, MOST_STEPS)
    beta_start: float = _above_zero()
    beta_end: float = _above_zero()
    betas: tuple[float, ...] = _at_most_so_many(MOST_STEPS)
    log_snr_max: float = _field()
    log_snr_min: float = _field()
    zero_terminal_snr: bool = _field()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int = _at_least(1)
    batch_size: int = _at_least(1)
    seed: int = _at_least(0, SEED)
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
    steps: int = _at_least(1, 1_000_000)
    tau: str = _field()
    tau_offset: int = _at_least(0, MOST_STEPS)
    tau_end: int = _at_least(0, MOST_STEPS)
    fixed_stride: bool = _field()
    num_images: int = _at_least(1)
    batch_size: int = _at_least(1)
    seed: int = _at_least(0, SEED)
    clip_x0: bool = _field()
    keep_eps: bool = _field()
    clip_range: float = _above_zero()
    clip_quantile: float = _below_one()
    ema: bool = _field()
    label: int = _at_least(-1)
    guidance: float = _at_least(0)
    refine: int = _at_least(0, 1000)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    features: str = _field()
    weights: str = _field()
    metrics: str = _field()
    num_images: int = _at_least(2)
    batch_size: int = _at_least(1, 65_536)
    reference: str = _field()
    split: str = _one_of({split: None for split in SPLITS})


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = _field(files.check_name)
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


class Open(NamedTuple):
    """A field that may be left open, as None: a published checkpoint then decides it, and what goes with it."""

    value: Any  # without a checkpoint
    beside: Mapping[str, Any]  # the fields that are decided with it -> their values where they say nothing


OPEN = {  # of config.sample
    "tau": Open("uniform", {"tau_offset": 0, "tau_end": 0}),
    "clip_x0": Open(False, {"clip_range": 1.0, "clip_quantile": 0.0}),
}

# What held before a field was there: configs saved by earlier versions do not have it.
BEFORE = {
    "pretrained": "",
    "data": {"in_memory": False, "workers": 0},
    "model": {
        "patch_size": 1,
        "middle_attention": True,
        "norm_epsilon": 1e-6,
        "halve_padding": "end",
        "frequency_shift": 1.0,
        "cos_first": False,
        "label_dropout": 0.0,
        "remat": False,
    },
    "schedule": {"log_snr_max": 13.3, "log_snr_min": -10.0, "zero_terminal_snr": False},
    "train": {
        "accumulate": 1,
        "real_time": False,
        "max_skipped": 20,
        "evaluate_every": 0,
        "evaluate_images": 1000,
        "wandb": "",
    },
    "mesh": {"data": -1, "fsdp": 1},
    "sample": {
        "tau_offset": 0,
        "tau_end": 0,
        "fixed_stride": False,
        "clip_range": 1.0,
        "clip_quantile": 0.0,
        "keep_eps": False,
        "guidance": 1.0,
        "refine": 0,
    },
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
    if sample.eta and "eta" not in registry.accepts(registry.SAMPLERS[sample.sampler]):
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


def typed(values: Mapping[str, Any]) -> Config:
    """The Config of nested dicts, of which each field by itself has the right type and range. Raises ConfigError."""
    return _parse(Config, _closed(values), "config")


def _closed(values: Any) -> Any:
    """The values with what config.sample leaves open as it is without a checkpoint."""
    if not isinstance(values, Mapping) or not isinstance(values.get("sample"), Mapping):
        return values
    sample = values["sample"]
    closed = {name: field.value for name, field in OPEN.items() if name in sample and sample[name] is None}
    return {**values, "sample": {**sample, **closed}}


def decided(sample: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """config.sample with what it leaves open as a checkpoint is sampled. ConfigError for a field that is given though
    the checkpoint decides it.
    """
    for name, field in OPEN.items():
        if name in sample and sample[name] is None:
            check_without_effect(sample, name, f"while config.sample.{name} is open: config.pretrained decides both")
            given = {name: published[name]} | {other: published[other] for other in field.beside}
            sample = {**sample, **(given if given[name] else given | field.beside)}
    return dict(sample)


def check_without_effect(sample: Mapping[str, Any], name: str, why: str) -> None:
    """ConfigError if a field that goes with the open field `name` of config.sample is given."""
    for other, neutral in OPEN[name].beside.items():
        if sample.get(other, neutral) != neutral:
            raise ConfigError(f"config.sample.{other}: has no effect {why}; got {shown(sample[other])}")


def parse_saved(values: Mapping[str, Any]) -> Config:
    """The Config that was saved as JSON, also by an earlier version. Raises ConfigError.

    Earlier versions took any name: the nearest that is one now stands for it. What has no effect is no mistake here.
    """
    values = filled(values)
    if isinstance(values, Mapping) and isinstance(values.get("name"), str):
        values = {**values, "name": files.name_from(values["name"])}
    return typed(values)


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


def part_of_section(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some fields of a section, checked. ConfigError, beginning with `where`, for one that is not right."""
    return _checked(kind, values, where)


def with_text(values: Mapping[str, Any], field: str, text: str) -> dict[str, Any]:
    """Nested values with the field (dotted, "sample.seed") set to what the text says. ConfigError if there is no such
    field, or if it cannot be that.
    """
    with error_context(f"config.{field}"):
        return _with(values, field.split("."), _from_text(type_of(field), text))


def _with(values: Mapping[str, Any], names: list[str], value: Any) -> dict[str, Any]:
    name, *rest = names
    return {**values, name: _with(values[name], rest, value) if rest else value}


def type_of(field: str) -> Any:
    """The type of a field (dotted, "sample.seed"). ConfigError, with the nearest name, if there is no such field."""
    kind, path = Config, "config"
    for name in field.split("."):
        fields = _types(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            raise ConfigError(f"{path} has no field {shown(name)}{_nearest(name, fields)}")
        kind, path = fields[name], f"{path}.{name}"
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"{path} is a section of fields")
    return kind


def _from_text(kind: Any, text: str) -> Any:
    if isinstance(kind, types.GenericAlias):
        return tuple(_from_text(typing.get_args(kind)[0], part) for part in text.split(",") if part)
    if kind is bool:
        return registry.lookup({"true": True, "false": False}, text.lower())
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be of type {kind.__name__}, got {shown(text)}") from None


def _parse(kind: type, values: Any, path: str) -> Any:
    checked = _checked(kind, values, path)
    for field in dataclasses.fields(kind):
        if field.name not in checked:
            raise ConfigError(f"{path}.{field.name} is missing")
    return kind(**checked)


def _checked(kind: type, values: Any, path: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: must be a section of fields, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{path} has no field {shown(name)}{_nearest(name, fields)}")
    annotations = _types(kind)
    parsed = {}
    for name, field in fields.items():
        if name not in values:
            continue
        where = f"{path}.{name}"
        if dataclasses.is_dataclass(annotations[name]):
            parsed[name] = _parse(annotations[name], values[name], where)
        else:
            with error_context(where):
                parsed[name] = _typed(annotations[name], values[name])
                if field.metadata["check"]:
                    field.metadata["check"](parsed[name])
    return parsed


def _typed(kind: Any, value: Any) -> Any:
    """The value as the type that a field has: exactly so, but ints and NumPy's numbers are floats too. ValueError."""
    if isinstance(kind, types.GenericAlias):  # tuple[x, ...]
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"must be a tuple, got {shown(value)}")
        if len(value) > ITEMS:
            raise ValueError(f"must have at most {ITEMS} entries, got {len(value)}")
        return tuple(_typed(typing.get_args(kind)[0], item) for item in value)
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, (kind, int) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"must be of type {kind.__name__}, got {shown(value)}")
    if kind is float and not -FLOAT <= value <= FLOAT:
        raise ValueError(f"must be finite{' in float32' if abs(value) > FLOAT else ''}, got {shown(value)}")
    if kind is int and not -INT <= value <= SEED:
        raise ValueError(f"must have at most 32 bits, got {shown(value)}")
    if kind is str and len(value) > CHARACTERS:
        raise ValueError(f"must have at most {CHARACTERS} characters, got {len(value)}")
    return kind(value)


def _nearest(name: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name)[:100], names, 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; it has {', '.join(names) or 'none'}"


def field_names(kind: type = Config, path: str = "") -> Iterator[str]:
    """All fields of the sections of a config, dotted: "name", "data.path"."""
    for name, inner in _types(kind).items():
        if dataclasses.is_dataclass(inner):
            yield from field_names(inner, f"{path}{name}.")
        else:
            yield path + name


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
    """A copy of a config's nested values to give to others: the fields of PRIVATE hold their defaults, and what is no
    field of a config, or of another type, is left out. It takes any part of a config.
    """
    return _public(Config, values, BEFORE, "")


def _public(kind: type, values: Any, defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    copy, kinds = {}, typing.get_type_hints(kind)
    for name in kinds:
        if not isinstance(values, Mapping) or name not in values:
            continue
        if dataclasses.is_dataclass(kinds[name]):
            copy[name] = _public(kinds[name], values[name], defaults.get(name, {}), f"{path}{name}.")
        else:
            with contextlib.suppress(ValueError):
                value = _typed(kinds[name], values[name])
                copy[name] = defaults.get(name, "") if f"{path}{name}" in PRIVATE else value
    return copy


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
            raise ConfigError(f"config.{field} is {shown(ours)}, but {where} was made with {shown(theirs)}")


def noise_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that config.schedule names. Its factory gets those fields that its signature names."""
    with error_context("config.schedule"):
        made = registry.build(registry.lookup(registry.SCHEDULES, config.name), dataclasses.asdict(config))
    with error_context("config.schedule.zero_terminal_snr"):
        return zero_terminal_snr(made) if config.zero_terminal_snr else made


def network(config: ModelConfig) -> UNet:
    """The U-Net that config.model describes; ConfigError if its sizes do not fit together."""
    fields = dataclasses.asdict(config) | {"dtype": DTYPES[config.dtype], "head_channels": config.head_channels or None}
    model = registry.build(UNet, fields)
    with error_context("config.model"):
        blocks = len(config.channel_mult) * (2 * config.num_res_blocks + 1)
        if blocks > MOST_BLOCKS:
            raise ValueError(
                f"num_res_blocks {config.num_res_blocks} and channel_mult {config.channel_mult} make {blocks} residual "
                f"blocks, at most {MOST_BLOCKS} are built"
            )
        model.check()
    return model


class Process(NamedTuple):
    """A generative process, ready to run."""

    sampler: Sampler
    tau: np.ndarray  # (S+1,), from config.sample.tau_end up
    transitions: Transitions  # leaves (S,)
    stride: int  # of config.sample.fixed_stride, 0 for none


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
        stride = schedule.num_steps // (len(tau) - 1) if config.fixed_stride else 0
    with error_context("config.sample.fixed_stride" if stride else "config.sample.tau"):
        transitions = trajectory.descend(schedule, tau, config.tau_end, stride)
    with _named_in_message({"eta": "eta", "steps": "tau" if given else "steps", "tau": "tau"}):
        sampler = registry.build(registry.SAMPLERS[config.sampler], dataclasses.asdict(config))
        sampler.check(transitions)
    return Process(sampler, tau, transitions, stride)


@contextlib.contextmanager
def _named_in_message(fields: Mapping[str, str]) -> Iterator[None]:
    """`error_context` of the field of config.sample that stands for the first of these words in the error's message; of
    the sampler itself, if there is none.
    """
    try:
        yield
    except ValueError as error:
        word = next((word for word in re.findall(r"\w+", str(error)) if word in fields), None)
        with error_context(f"config.sample.{fields.get(word, 'sampler')}"):
            raise


def _numbers(text: str) -> list[float]:
    """Those of a list with commas; none if it is something else."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return []
