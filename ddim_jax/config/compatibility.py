"""Configs that were saved: by earlier versions, by others, for others."""

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

# What held before a field was there: configs saved by earlier versions do not have it.
FIELDS_ADDED_LATER = {
    "pretrained": "",
    "data": {"in_memory": False, "workers": 0},
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


RENAMED = {"halve_padding": "downsample_padding"}  # fields of config.model, by their earlier names


def parse_saved(values: Mapping[str, Any]) -> Config:
    """The Config that was saved as JSON, also by an earlier version. Raises ConfigError.

    Earlier versions took any name: the nearest that is one now stands for it. What has no effect is no mistake here.
    """
    values = filled(values)
    if isinstance(values, Mapping) and isinstance(values.get("name"), str):
        values = {**values, "name": files.name_from(values["name"])}
    return typed(values, trusted=False)


def filled(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Saved values with the fields that came later, and under the names that they have now."""
    if isinstance(values, Mapping) and isinstance(model := values.get("model"), Mapping) and "halve_padding" in model:
        values = {**values, "model": {RENAMED.get(name, name): value for name, value in model.items()}}
    values = _fill(FIELDS_ADDED_LATER, values)
    if isinstance(values, Mapping) and isinstance(train := values.get("train"), Mapping) and "objective" not in train:
        time = "real" if train.get("real_time") else "uniform"
        objective = {"name": "noise_prediction", "weight": train.get("gamma", "one"), "time": time}
        kept = {name: value for name, value in train.items() if name not in ("gamma", "real_time")}
        values = {**values, "train": {**kept, "objective": objective}}
    return values


def _fill(defaults: Any, values: Any) -> Any:
    """values, with what they lack taken from defaults; both nested dicts."""
    if not isinstance(defaults, Mapping) or not isinstance(values, Mapping):
        return values
    return {**defaults, **{name: _fill(defaults.get(name), value) for name, value in values.items()}}


# Where things lie on this machine, and accounts: nothing that the use of a network needs.
PRIVATE = (
    "pretrained",
    "data.path",
    "train.wandb",
    "evaluate.features",  # a module of the user's, where it is none of ours
    "evaluate.weights",
    "evaluate.reference",
    "sample.options",  # arguments of the user's own code, which may be paths
    "train.objective.options",
    "train.objective.weight_options",
    "train.objective.time_options",
    "train.optimizer.schedule_options",
)


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's nested values to give to others: the fields of PRIVATE hold their defaults, and what is no
    field of a config, or of another type, is left out. It takes any part of a config.
    """
    return _public(Config, values, FIELDS_ADDED_LATER, "")


def _public(kind: type, values: Any, defaults: Mapping[str, Any], path: str) -> dict[str, Any]:
    copy = {}
    with contextlib.suppress(ConfigError, TypeError):  # TypeError: values are no fields
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


# What a run that continues must not change, and what a network must be sampled with as it was trained.
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
    """ConfigError, naming the first field that differs, unless the run in `where` can continue with this config."""
    _check_same(config, saved, MUST_MATCH_TO_RESUME, where)


def check_sampled(config: Config, saved: Any, where: str) -> None:
    """ConfigError, naming the first field that differs, unless the config is of the network and the schedule saved in
    `where`: fields .model and .schedule.
    """
    _check_same(config, saved, MUST_MATCH_TO_SAMPLE, where, ignored=NOT_ARCHITECTURE)


def _check_same(current: Any, expected: Any, fields: Iterable[str], where: str, ignored=(), path="config") -> None:
    for field in fields:
        a, b = current, expected
        for name in field.split("."):
            a, b = (getattr(section, name, "no field of it") for section in (a, b))
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            names = dict.fromkeys(one.name for section in (a, b) for one in dataclasses.fields(section))
            _check_same(a, b, [name for name in names if name not in ignored], where, ignored, f"{path}.{field}")
        elif a != b:
            raise ConfigError(f"{path}.{field} is {shown(a)}, but {where} was made with {shown(b)}")


def code_of(found: Any) -> dict[str, str]:
    """field -> "module:attribute", of what a checkpoint needs that is code of its author. found: what its file says,
    with .model, .schedule and .sample.
    """
    names = {
        "model.name": found.model.name,
        "schedule.name": found.schedule.name,
        "sample.tau": found.sample.get("tau") or "",
    }
    return {field: name for field, name in names.items() if registry.is_code(name)}


def check_trusted(values: Mapping[str, Any], found: Any, where: str) -> None:
    """ConfigError where a checkpoint needs code of its author that the config does not name too: a file alone imports
    nothing. A tau that the config gives itself stands for the file's.
    """
    for field, name in code_of(found).items():
        section, _, last = field.partition(".")
        inner = values.get(section)
        given = inner.get(last) if isinstance(inner, Mapping) else None
        if given != name and not (field == "sample.tau" and given is not None):
            raise ConfigError(f"{where} needs {name}, which is code of its author; --config.{field}={name} runs it")
