"""Fields of dataclasses with the range of their values: sections of a config, and modules whose fields are one. Whoever
reads a config checks them; a mistake is a ValueError of one line.
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

INT = 2**31 - 1  # steps and indices have 32 bits on the devices
SEED = 2**32 - 1  # a key is made of 32 bits: seeds beyond would draw the images of seeds below
FLOAT = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).tiny)  # what is smaller is 0 on the devices
CHARACTERS = 1 << 16  # of a text
ITEMS = 1 << 20  # of a tuple
MISSING = dataclasses.MISSING


def field(default: Any = MISSING, check: Callable[[Any], None] | None = None, **more: Any) -> Any:
    """A dataclass field whose value `check` refuses by a ValueError."""
    return dataclasses.field(default=default, metadata={"check": check, **more})


def at_least(low: float, most: float = INT, default: Any = MISSING) -> Any:
    def check(value):
        if value < low:
            raise ValueError(f"must be at least {low}, got {shown(value)}")
        if value > most:
            raise ValueError(f"must be at most {most}, got {shown(value)}")

    return field(default, check)


def above_zero(default: Any = MISSING) -> Any:
    def check(value):
        if value < TINY:
            raise ValueError(f"must be above 0{' in float32' if value > 0 else ''}, got {value}")

    return field(default, check)


def below_one(default: Any = MISSING) -> Any:
    def check(value):
        if not 0 <= value < 1:
            raise ValueError(f"must be in [0, 1), got {value}")

    return field(default, check)


def one_of(table: Mapping[str, Any], default: Any = MISSING) -> Any:
    return field(default, lambda value: checks.lookup(table, value))


def all_positive(count: int, most: int, default: Any = MISSING) -> Any:
    def check(values):
        if not values or min(values) < 1:
            raise ValueError(f"must hold at least one number and none below 1, got {shown(values)}")
        if len(values) > count or max(values) > most:
            raise ValueError(f"must hold at most {count} numbers and none above {most}, got {shown(values)}")

    return field(default, check)


def at_most_so_many(count: int, default: Any = MISSING) -> Any:
    def check(values):
        if len(values) > count:
            raise ValueError(f"must hold at most {count} numbers, got {len(values)}")

    return field(default, check)


def named(table: Mapping[str, Any], default: str) -> Any:
    """A field of a module whose value has a name in configs: an entry of the table."""
    return dataclasses.field(default=table[default], metadata={"table": table, "default": default})


def is_plain(value: Any) -> bool:
    """Whether a config can say this value."""
    if value is MISSING:
        return True
    try:
        _any(value)
    except ValueError:
        return False
    return True


class Parameter(NamedTuple):
    """What a factory takes by one name."""

    kind: Any  # its type, Any where none is known
    default: Any  # MISSING if it has none
    check: Callable[[Any], None] | None


def parameters(factory: Callable) -> dict[str, Parameter]:
    """What a factory takes by name: the fields of a dataclass, such as a Linen module, or the parameters of another
    callable, with the types that are annotated, else that of the default.
    """
    try:
        hints = typing.get_type_hints(factory)
    except Exception:  # annotations may be anything
        hints = {}
    if dataclasses.is_dataclass(factory) and isinstance(factory, type):
        found = {one.name: _of_field(one, hints) for one in _fields(factory)}
    else:
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        given = getattr(factory, "keywords", {})  # of a functools.partial
        found = {}
        for name, one in inspect.signature(factory).parameters.items():
            default = MISSING if one.default is inspect.Parameter.empty else one.default
            if one.kind in named and name not in given and name != "rngs":  # of NNX modules
                found[name] = Parameter(_kind(hints.get(name), default), default, None)
    return found


def _fields(factory: Any) -> list[dataclasses.Field]:
    """Those of a dataclass that its caller gives, without the two that Flax adds to a Linen module."""
    return [one for one in dataclasses.fields(factory) if one.init and one.name not in ("parent", "name")]


def _of_field(one: dataclasses.Field, hints: Mapping[str, Any]) -> Parameter:
    if table := one.metadata.get("table"):
        return Parameter(str, one.metadata["default"], lambda value: checks.lookup(table, value))
    return Parameter(_kind(hints.get(one.name), one.default), one.default, one.metadata.get("check"))


def arguments(factory: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that a factory takes, as it takes them: what is `named` in its table."""
    given = {name: value for name, value in values.items() if name in parameters(factory)}
    for one in _fields(factory) if dataclasses.is_dataclass(factory) else ():
        if one.name in given and "table" in one.metadata:
            given[one.name] = one.metadata["table"][given[one.name]]
    return given


def _kind(hint: Any, default: Any) -> Any:
    """The type that a value in a config must have. A float may be an int in a signature's default."""
    if hint in (bool, int, float, str) or isinstance(hint, types.GenericAlias) and typing.get_origin(hint) is tuple:
        return hint
    if type(default) in (bool, float, str):
        return type(default)
    return Any


def typed(kind: Any, value: Any) -> Any:
    """The value as the type that a field has: exactly so, but ints and NumPy's numbers are floats too. ValueError."""
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
    if not isinstance(value, (kind, int) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"must be of type {kind.__name__}, got {shown(value)}")
    if isinstance(value, int) and kind is float and abs(value) > FLOAT:
        raise ValueError(f"must be finite in float32, got {shown(value)}")
    value = kind(value)
    _bounded(value)
    return value


def _any(value: Any, depth: int = 4) -> Any:
    """A value of a field without a type: a number, a text, None, or a tuple of these, nested at most so deep."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, (tuple, list)) and depth:
        if len(value) > ITEMS:
            raise ValueError(f"must have at most {ITEMS} entries, got {len(value)}")
        return tuple(_any(item, depth - 1) for item in value)
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"must be a number, a text, or a tuple of these, got {shown(value)}")
    _bounded(value)
    return value


def _bounded(value: Any) -> None:
    if isinstance(value, float) and not -FLOAT <= value <= FLOAT:
        raise ValueError(f"must be finite{' in float32' if abs(value) > FLOAT else ''}, got {shown(value)}")
    if isinstance(value, int) and not -INT <= value <= SEED:
        raise ValueError(f"must have at most 32 bits, got {shown(value)}")
    if isinstance(value, str) and len(value) > CHARACTERS:
        raise ValueError(f"must have at most {CHARACTERS} characters, got {len(value)}")


class Options(dict):
    """Arguments by name for a factory of somebody's own: a dict that can be hashed, of numbers, texts and tuples."""

    @classmethod
    def of(cls, values: Any) -> Options:
        if not isinstance(values, Mapping):
            raise ValueError(f"must be arguments by name, got {shown(values)}")
        if len(values) > 100:
            raise ValueError(f"must be at most 100 arguments, got {len(values)}")
        for name in values:
            if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
                raise ValueError(f"must be arguments by name, got {shown(name)}")
        return cls((name, _any(value)) for name, value in values.items())

    def __hash__(self):
        return hash(frozenset(self.items()))
