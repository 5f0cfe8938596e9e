"""Saved configs: reading those of earlier versions, comparing them, and removing private fields."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ddim_jax import registry
from ddim_jax.config.parsing import kind_of, typed
from ddim_jax.config.schema import NOT_ARCHITECTURE, Config
from ddim_jax.utils import files, ranges
from ddim_jax.utils.errors import ConfigError
from ddim_jax.utils.files import shown

# field -> the value that reproduces the behaviour of the versions before the field existed. Their saved configs do not
# have the field.
FIELDS_ADDED_LATER = {
    "pretrained": "",
    "data": {"in_memory": False, "workers": 0, "options": {}},
    "model": {"name": "unet"},
    "schedule": {"log_snr_max": 13.3, "log_snr_min": -10.0, "zero_terminal_snr": False, "options": {}},
    "train": {
        "accumulate": 1,
        "max_skipped": 20,
        "evaluate_every": 0,
        "evaluate_images": 1000,
        "wandb": "",
        "optimizer": {"name": "adam", "schedule": "constant", "schedule_options": {}},
        "ema_schedule": "constant",
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
        "options": {},
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


RENAMED = {"halve_padding": "downsample_padding"}  # fields of config.model: earlier name -> name


def parse_saved(values: Mapping[str, Any]) -> Config:
    """The Config of a saved JSON object, also of an earlier version. Raises ConfigError.

    Earlier versions accepted any name: an invalid one is replaced by the nearest valid name. Unlike `parsing.parse`, it
    accepts fields without effect.
    """
    values = filled(values)
    if isinstance(values, Mapping) and isinstance(values.get("name"), str):
        values = {**values, "name": files.name_from(values["name"])}
    return typed(values, trusted=False)


def filled(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The saved values of a config, with the fields that were added or renamed since then."""
    if isinstance(values, Mapping) and isinstance(model := values.get("model"), Mapping) and "halve_padding" in model:
        values = {**values, "model": {RENAMED.get(name, name): value for name, value in model.items()}}
    values = _fill(FIELDS_ADDED_LATER, values)
    if isinstance(values, Mapping) and isinstance(train := values.get("train"), Mapping) and "objective" not in train:
        time = "real" if train.get("real_time") else "uniform"
        objective = {"name": "noise_prediction", "weight": train.get("gamma", "one"), "time": time}
        other = {name: value for name, value in train.items() if name not in ("gamma", "real_time")}
        values = {**values, "train": {**other, "objective": objective}}
    return values


def _fill(defaults: Any, values: Any) -> Any:
    """The nested dict `values`; missing entries are taken from `defaults`."""
    if not isinstance(defaults, Mapping) or not isinstance(values, Mapping):
        return values
    return {**defaults, **{name: _fill(defaults.get(name), value) for name, value in values.items()}}


# Fields that hold paths of this machine, account names or the user's code. A trained network works without them.
PRIVATE = (
    "pretrained",
    "data.path",
    "train.wandb",
    "evaluate.features",  # may name a module of the user
    "evaluate.weights",
    "evaluate.reference",
    "data.options",  # arguments of the user's code, which may be paths
    "sample.options",
    "train.objective.options",
    "train.objective.weight_options",
    "train.objective.time_options",
    "train.optimizer.schedule_options",
)


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's nested dict that can be published: the fields of PRIVATE have their defaults, and entries
    that are not a field of a config, or have an invalid type, are removed. Fields may be missing.
    """
    return _public(Config, values, FIELDS_ADDED_LATER, "")


def _public(kind: type, values: Any, defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    copy = {}
    with contextlib.suppress(ConfigError, TypeError):  # TypeError: values is not a dict
        kind = kind_of(kind, {**defaults, **values}, path, trusted=False)
    kinds = typing.get_type_hints(kind)
    for name in kinds:
        if not isinstance(values, Mapping) or name not in values:
            continue
        if dataclasses.is_dataclass(kinds[name]):
            copy[name] = _public(kinds[name], values[name], defaults.get(name, {}), f"{path}{name}.")
        else:
            with contextlib.suppress(ValueError):
                value = ranges.typed(kinds[name], values[name])
                copy[name] = defaults.get(name, type(value)()) if f"{path}{name}" in PRIVATE else value
    return copy


# Fields that must not change when a run resumes, and those that must be equal in training and sampling.
MUST_MATCH_TO_RESUME = (
    "pretrained",
    "model",
    "schedule",
    "data.name",
    "data.flip",
    *(f"train.{name}" for name in ("batch_size", "seed", "learning_rate", "warmup", "clip_norm", "ema_decay")),
    *(f"train.{name}" for name in ("optimizer", "objective", "ema_schedule", "accumulate")),
)
MUST_MATCH_TO_SAMPLE = ("schedule", "model")


def check_resumed(config: Config, saved: Config, where: str) -> None:
    """ConfigError with the first field that differs, unless a run can resume with this config. where: the run, for the
    message.
    """
    _check_same(config, saved, MUST_MATCH_TO_RESUME, where)


def check_sampled(config: Config, saved: Any, where: str) -> None:
    """ConfigError with the first field that differs, unless the config has the network and the schedule of a
    checkpoint. saved: with attributes .model and .schedule. where: the checkpoint, for the message.
    """
    _check_same(config, saved, MUST_MATCH_TO_SAMPLE, where, ignored=NOT_ARCHITECTURE)


def _check_same(current: Any, expected: Any, fields: Iterable[str], where: str, ignored=(), path="config") -> None:
    for field in fields:
        a, b = current, expected
        for name in field.split("."):
            a, b = (getattr(section, name, "no such field") for section in (a, b))
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            names = dict.fromkeys(item.name for section in (a, b) for item in dataclasses.fields(section))
            _check_same(a, b, [name for name in names if name not in ignored], where, ignored, f"{path}.{field}")
        elif a != b:
            raise ConfigError(f"{path}.{field}: must be {shown(b)}, as in {where}, got {shown(a)}")


def code_of(checkpoint: Any) -> dict[str, str]:
    """field -> "module:attribute": the code of its author that a checkpoint needs.

    checkpoint: its description, with attributes .model, .schedule and .sample.
    """
    names = {
        "model.name": checkpoint.model.name,
        "schedule.name": checkpoint.schedule.name,
        "sample.tau": checkpoint.sample.get("tau") or "",
    }
    return {field: name for field, name in names.items() if registry.is_code(name)}


def check_trusted(values: Mapping[str, Any], checkpoint: Any, where: str) -> None:
    """ConfigError if a checkpoint needs code of its author that the config does not name: a file alone never imports
    code. A config with another tau does not need the code of the checkpoint's tau.

    values: of the config. checkpoint: see `code_of`. where: the checkpoint, for the message.
    """
    for field, name in code_of(checkpoint).items():
        section, _, last = field.partition(".")
        inner = values.get(section)
        current = inner.get(last) if isinstance(inner, Mapping) else None
        if current != name and not (field == "sample.tau" and current is not None):
            raise ConfigError(
                f"{where} needs the code {name} of the checkpoint's author; to run it, add --config.{field}={name}"
            )
