"""Values of a config, checked: nested dicts become the dataclasses of `schema`; a mistake is one line that names the
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
from typing import Any

from ddim_jax import registry
from ddim_jax.config.schema import DEFAULT_IF_UNSET, FACTORIES, GIVEN, Config
from ddim_jax.utils import ranges
from ddim_jax.utils.errors import ConfigError, error_context
from ddim_jax.utils.files import shown
from ddim_jax.utils.ranges import Options

_types = functools.cache(typing.get_type_hints)  # of a section: field -> type


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
