"""Dataclass fields with a range of allowed values, for the sections of a config and for modules whose fields are such a
section. The config package checks the values when it reads a config. A wrong value raises a ValueError of one line.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddim_jax import checks
from ddim_jax.utils.files import shown

INT = 2**31 - 1  # the limit for steps and indices, which have 32 bits on the devices
SEED = 2**32 - 1  # the limit for seeds: a key uses 32 bits, so larger seeds would repeat the images of smaller ones
FLOAT = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)  # smaller values are 0 on the devices
CHARACTERS = 1 << 16  # the limit for the length of a string
ITEMS = 1 << 20  # the limit for the length of a tuple
MISSING = dataclasses.MISSING
Number = int | float  # the type of a field that keeps ints as ints, and floats as floats


def field(default: Any = MISSING, check: Callable[[Any], None] | None = None, **more: Any) -> Any:
    """A dataclass field. check: raises a ValueError for a value that is not allowed. more: further metadata."""
    return dataclasses.field(default=default, metadata={"check": check, **more})


def at_least(low: float, most: float = INT, default: Any = MISSING) -> Any:
    """A field with values in [low, most]."""

    def check(value):
        if value < low:
            raise ValueError(f"must be at least {low}, got {shown(value)}")
        if value > most:
            raise ValueError(f"must be at most {most}, got {shown(value)}")

    return field(default, check)


def above_zero(default: Any = MISSING) -> Any:
    """A field with values above 0, also in float32."""

    def check(value):
        if value < TINY:
            raise ValueError(f"must be above 0{' in float32' if value > 0 else ''}, got {value}")

    return field(default, check)


def below_one(default: Any = MISSING) -> Any:
    """A field with values in [0, 1)."""

    def check(value):
        if not 0 <= value < 1:
            raise ValueError(f"must be in [0, 1), got {value}")

    return field(default, check)


def one_of(table: Mapping[str, Any], default: Any = MISSING) -> Any:
    """A field whose values are names in a table."""
    return field(default, lambda value: checks.lookup(table, value))


def all_positive(count: int, most: int, default: Any = MISSING) -> Any:
    """A field with tuples of 1 to `count` numbers in (0, most]."""

    def check(values):
        if not values or not min(values) > 0:
            raise ValueError(f"must hold at least one number and only numbers above 0, got {shown(values)}")
        if len(values) > count or max(values) > most:
            raise ValueError(f"must hold at most {count} numbers and none above {most}, got {shown(values)}")

    return field(default, check)


def at_most_so_many(count: int, default: Any = MISSING) -> Any:
    """A field with tuples of at most `count` numbers."""

    def check(values):
        if len(values) > count:
            raise ValueError(f"must hold at most {count} numbers, got {len(values)}")

    return field(default, check)


def named(table: Mapping[str, Any], default: str) -> Any:
    """A field of a module whose values are the entries of a table. A config has the name of the entry."""
    return dataclasses.field(default=table[default], metadata={"table": table, "default": default})


def is_plain(value: Any) -> bool:
    """Whether a config can hold this value."""
    if value is MISSING:
        return True
    try:
        _any(value)
    except ValueError:
        return False
    return True


class Parameter(NamedTuple):
    """A keyword parameter of a factory."""

    kind: Any  # its type, Any if it is not known
    default: Any  # MISSING if it has none
    check: Callable[[Any], None] | None  # raises a ValueError for a value that is not allowed


def parameters(factory: Callable) -> dict[str, Parameter]:
    """The keyword parameters of a factory: the fields of a dataclass, such as a Linen module, or the parameters of
    another callable. Their types are the annotations, or else the types of the defaults.
    """
    try:
        hints = typing.get_type_hints(factory)
    except Exception:  # annotations may be any expressions
        hints = {}
    if dataclasses.is_dataclass(factory) and isinstance(factory, type):
        result = {member.name: _of_field(member, hints) for member in _fields(factory)}
    else:
        by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        bound = getattr(factory, "keywords", {})  # of a functools.partial
        result = {}
        # The metaclass of NNX modules hides the signature of their __init__.
        called = factory.__init__ if isinstance(factory, type) and type(factory) is not type else factory
        for name, parameter in list(inspect.signature(called).parameters.items())[called is not factory :]:
            default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
            if parameter.kind in by_keyword and name not in bound and name != "rngs":  # `rngs` of NNX modules
                result[name] = Parameter(_kind(hints.get(name), default), default, None)
    return result


def _fields(factory: Any) -> list[dataclasses.Field]:
    """The init fields of a dataclass, without the two that Flax adds to a Linen module."""
    return [member for member in dataclasses.fields(factory) if member.init and member.name not in ("parent", "name")]


def _of_field(member: dataclasses.Field, hints: Mapping[str, Any]) -> Parameter:
    if table := member.metadata.get("table"):
        return Parameter(str, member.metadata["default"], lambda value: checks.lookup(table, value))
    return Parameter(_kind(hints.get(member.name), member.default), member.default, member.metadata.get("check"))


def arguments(factory: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are parameters of a factory. A name for a `named` field is replaced by the entry of its table."""
    result = {name: value for name, value in values.items() if name in parameters(factory)}
    for member in _fields(factory) if dataclasses.is_dataclass(factory) else ():
        if member.name in result and "table" in member.metadata:
            result[member.name] = member.metadata["table"][result[member.name]]
    return result


def _kind(hint: Any, default: Any) -> Any:
    """The type of a parameter in a config. An int default without annotation gives Any: floats may be allowed too."""
    if hint in (bool, int, float, str) or isinstance(hint, types.GenericAlias) and typing.get_origin(hint) is tuple:
        return hint
    if type(default) in (bool, float, str):
        return type(default)
    return Any


def typed(kind: Any, value: Any) -> Any:
    """The value with the type of a field. ValueError if it has another type; ints and numbers of NumPy are accepted as
    floats.
    """
    if isinstance(kind, types.GenericAlias):  # tuple[x, ...]
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"must be a tuple, got {shown(value)}")
        if len(value) > ITEMS:
            raise ValueError(f"must have at most {ITEMS} entries, got {len(value)}")
        return tuple(typed(typing.get_args(kind)[0], item) for item in value)
    if kind is Options:
        return Options.of(value)
    value = value.item() if isinstance(value, np.generic) else value
    if kind is Any:
        return _any(value)
    if kind == Number:
        kind = int if isinstance(value, int) else float
    if not isinstance(value, (kind, int) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"must be of type {kind.__name__}, got {shown(value)}")
    if isinstance(value, int) and kind is float and abs(value) > FLOAT:
        raise ValueError(f"must be finite in float32, got {shown(value)}")
    value = kind(value)
    _bounded(value)
    return value


def _any(value: Any, depth: int = 4) -> Any:
    """The value of a field without a type: a number, a string, None, or a tuple of these. depth: the limit for nested
    tuples. ValueError for another value.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (tuple, list)) and depth:
        if len(value) > ITEMS:
            raise ValueError(f"must have at most {ITEMS} entries, got {len(value)}")
        return tuple(_any(item, depth - 1) for item in value)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"must be a number, a string, or a tuple of these, got {shown(value)}")
    _bounded(value)
    return value


def _bounded(value: Any) -> None:
    """ValueError if a value exceeds the limits for its type."""
    if isinstance(value, float) and not -FLOAT <= value <= FLOAT:
        raise ValueError(f"must be finite{' in float32' if abs(value) > FLOAT else ''}, got {shown(value)}")
    if isinstance(value, int) and not -INT <= value <= SEED:
        raise ValueError(f"must have at most 32 bits, got {shown(value)}")
    if isinstance(value, str) and len(value) > CHARACTERS:
        raise ValueError(f"must have at most {CHARACTERS} characters, got {len(value)}")


class Options(dict):
    """Keyword arguments for a factory: a hashable dict of numbers, strings and tuples."""

    @classmethod
    def of(cls, values: Any) -> Options:
        """Options from a mapping. ValueError if it is not one of names to numbers, strings and tuples."""
        if not isinstance(values, Mapping):
            raise ValueError(f"must be a dict of keyword arguments, got {shown(values)}")
        if len(values) > 100:
            raise ValueError(f"must have at most 100 arguments, got {len(values)}")
        for name in values:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
                raise ValueError(f"must have names of arguments as keys, got {shown(name)}")
        return cls((name, _any(value)) for name, value in values.items())

    def __hash__(self):
        return hash(frozenset(self.items()))
