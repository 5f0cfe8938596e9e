"""Parses and checks the values of a config: nested dicts become the dataclasses of `schema`. An error is one line that
names the field. A section with the name of a factory, such as config.model, also has the parameters of that factory as
fields.
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

_types = functools.cache(typing.get_type_hints)  # section -> {field: type}


def parse(values: Mapping[str, Any]) -> Config:
    """The Config of nested dicts (`ConfigDict.to_dict()`). ConfigError for an invalid field, for fields that are
    inconsistent, and for a field that has no effect in combination with the others.
    """
    config = typed(values)
    train, sample, model = config.train, config.sample, config.model
    if train.checkpoint_every % train.log_every:
        raise ConfigError(
            f"config.train.checkpoint_every: must be a multiple of log_every ({train.log_every}), so that a resumed "
            f"run logs the same metrics as an uninterrupted one; got {train.checkpoint_every}"
        )
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"config.train.accumulate: must divide batch_size ({train.batch_size}), got {train.accumulate}"
        )
    with error_context("config.sample.sampler"):
        factory = registry.resolve(registry.SAMPLERS, sample.sampler)
    if sample.eta and "eta" not in registry.accepts(factory):
        raise ConfigError(
            f"config.sample.eta: must be 0, because the sampler {sample.sampler!r} has no eta; got {sample.eta}"
        )
    undefined = registry.PREDICTIONS[model.prediction].undefined
    if config.schedule.zero_terminal_snr and 0 in undefined:
        defined = " or ".join(name for name, each in registry.PREDICTIONS.items() if 0 not in each.undefined)
        raise ConfigError(
            f"config.schedule.zero_terminal_snr: requires config.model.prediction {defined}, because at T, where "
            f"alpha_bar = 0, {undefined[0]}; got {model.prediction}"
        )
    if sample.keep_eps and not sample.clip_x0:
        raise ConfigError("config.sample.keep_eps: has no effect without config.sample.clip_x0=True; got True")
    if not sample.clip_x0:
        check_without_effect(dataclasses.asdict(sample), "clip_x0", "without config.sample.clip_x0=True")
    if sample.label >= max(model.num_classes, 1) or (sample.label >= 0 and not model.num_classes):
        raise ConfigError(
            f"config.sample.label: must be -1 (all classes in turn) or a class of the network, which has "
            f"{model.num_classes} classes; got {sample.label}"
        )
    if sample.guidance != 1 and not (model.num_classes and model.label_dropout):
        raise ConfigError(
            f"config.sample.guidance: must be 1 for an unconditional network, and for a network trained without "
            f"config.model.label_dropout, because it has no unconditional output; got {sample.guidance}"
        )
    return config


def typed(values: Mapping[str, Any], trusted: bool = True) -> Config:
    """The Config of nested dicts. It checks the type and the range of each field, but not their combination. Raises
    ConfigError.

    trusted: whether modules that the values name may be imported: True for the user's config, False for a file.
    """
    return _parse(Config, _with_defaults(values), "config", trusted)


def _with_defaults(values: Any) -> Any:
    """The values, in which an unset field (None) of config.sample has the default that it has without a checkpoint."""
    if not isinstance(values, Mapping) or not isinstance(values.get("sample"), Mapping):
        return values
    sample = values["sample"]
    filled = {name: unset.value for name, unset in DEFAULT_IF_UNSET.items() if name in sample and sample[name] is None}
    return {**values, "sample": {**sample, **filled}}


def decided(sample: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """config.sample, in which the unset fields (None) and their dependent fields have the values of a checkpoint.
    ConfigError if a dependent field of an unset field is set.

    sample: fields of config.sample. published: the same fields, from the checkpoint.
    """
    for name, unset in DEFAULT_IF_UNSET.items():
        if name in sample and sample[name] is None:
            check_without_effect(sample, name, f"if config.sample.{name} is not set: config.pretrained sets both")
            values = {name: published[name]} | {other: published[other] for other in unset.dependent}
            sample = {**sample, **(values if values[name] else values | unset.dependent)}
    return dict(sample)


def check_without_effect(sample: Mapping[str, Any], name: str, why: str) -> None:
    """ConfigError if a dependent field of the field `name` of config.sample is set. why: for the message."""
    for other, neutral in DEFAULT_IF_UNSET[name].dependent.items():
        if sample.get(other, neutral) != neutral:
            raise ConfigError(f"config.sample.{other}: has no effect {why}; got {shown(sample[other])}")


def section(kind: type, values: Mapping[str, Any], where: str) -> Any:
    """The section of the given kind, such as ModelConfig, with all fields checked. ConfigError that begins with `where`
    for an invalid field.
    """
    return _parse(kind, values, where, trusted=False)


def part_of_section(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The given fields of a section, checked. ConfigError that begins with `where` for an invalid field."""
    return _checked(kind, values, where, trusted=False)


def with_text(values: Mapping[str, Any], field: str, text: str) -> dict[str, Any]:
    """The nested values, with a field (dotted, "sample.seed") set to the value that the text stands for. ConfigError
    for an unknown field and for a text that is not of the field's type.
    """
    with error_context(f"config.{field}"):
        return with_value(values, field, _from_text(type_of(field, values), text))


def with_value(values: Mapping[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The nested values, with a field (dotted) set to a value."""
    name, _, rest = field.partition(".")
    inner = values.get(name, {})
    return {**values, name: with_value(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def is_open(field: str) -> bool:
    """Whether a field (dotted) is in a section with the parameters of a factory. Whether such a field exists depends on
    the factory that the config names.
    """
    section, _, _ = field.rpartition(".")
    return section in ("model", "train.optimizer") or bool(re.search(r"[._]options(\.|$)", field))


def type_of(field: str, values: Mapping[str, Any]) -> Any:
    """The type of a field (dotted, "sample.seed") in a config with these values. ConfigError with the nearest name for
    an unknown field.
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
    if kind is Any or kind == ranges.Number:
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
    """The value of a Python literal: a number, a quoted string or a tuple. Any other text is returned unchanged."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def kind_of(kind: type, values: Any, path: str, trusted: bool) -> type:
    """The dataclass of a section with these values. If the section names a factory, the dataclass has the parameters of
    the factory in addition to the common fields. A factory that must not be imported may have any parameters.
    """
    if kind not in FACTORIES or not isinstance(values, Mapping) or "name" not in values:
        return kind
    name = values["name"]
    with error_context(f"{path}.name"):
        ranges.typed(str, name)
        registry.check_name(FACTORIES[kind], name)
        if registry.is_code(name) and not trusted:
            return _untyped_section(kind, tuple(Options.of({other: 0 for other in values})))
        return section_of(kind, registry.resolve(FACTORIES[kind], name))


@functools.cache
def section_of(kind: type, factory: Any) -> type:
    """The dataclass of a section: the common fields, and the parameters of a factory. Parameters whose default is not a
    config value (for example a function) are left out.
    """
    common = {field.name for field in dataclasses.fields(kind)}
    fields = [
        (name, parameter.kind, ranges.field(parameter.default, parameter.check))
        for name, parameter in ranges.parameters(factory).items()
        if name not in common and name not in GIVEN and ranges.is_plain(parameter.default)
    ]
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)


@functools.cache
def _untyped_section(kind: type, names: tuple[str, ...]) -> type:
    """The dataclass of a section whose factory is not imported: the common fields, and `names` with any type."""
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
    """A hint for an error message: the closest of the names, or all of them if none is close."""
    close = difflib.get_close_matches(str(name)[:100], names, 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else f"; it has {', '.join(names) or 'none'}"


def field_names(kind: type = Config, path: str = "") -> Iterator[str]:
    """The dotted names of all fields of a config: "name", "data.path", ... For a section with the parameters of a
    factory, the factory is the first one of its table.
    """
    if kind in FACTORIES:
        kind = section_of(kind, next(iter(FACTORIES[kind].values())))
    for name, inner in _types(kind).items():
        if dataclasses.is_dataclass(inner):
            yield from field_names(inner, f"{path}{name}.")
        else:
            yield path + name
