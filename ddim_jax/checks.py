"""Validation of the arguments of the public functions, on the host, before anything is traced.

An invalid argument raises a ValueError of one line that names the argument. The value of a traced argument is not
known, so only its shape and its dtype are checked.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

MAX_STEPS = 10**7  # the largest T and S: larger tables would exhaust the memory of the host


def traced(*values: Any) -> bool:
    """Whether one of the values is traced, so that only its shape and its dtype are known."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def integer(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """Validates an integer in [low, high]. True, 10.0 and "10" are not integers."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {bounds}, got {number}")
    return number


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf, open: bool = False) -> Any:
    """Validates one finite real number in [low, high], or in (low, high) if open. Returns it unchanged."""
    if type(value) not in (int, float) and (not _is_real(value) or np.shape(value)):
        raise ValueError(f"{name} must be a real number, got {shown(value)}")
    if not traced(value):
        _check_range(name, value, float(value), low, high, open)
    return value


def reals(
    name: str,
    values: Any,
    low: float = -math.inf,
    high: float = math.inf,
    open: bool = False,
    infinite: bool = False,
) -> Any:
    """Validates an array, or a list, of finite real numbers in [low, high] and returns it as an array of any shape.

    open: the interval is (low, high).
    infinite: infinite entries are allowed too.
    """
    values = _array(name, values)
    if not _is_real(values):
        raise ValueError(f"{name} must hold real numbers, got {shown(values)}")
    if not traced(values):
        host = np.asarray(values, np.float64)
        inside = (host > low) & (host < high) if open else (host >= low) & (host <= high)
        if (invalid := host[~(inside & (infinite | np.isfinite(host)))]).size:
            _check_range(name, invalid[0], float(invalid[0]), low, high, open)
    return values


def _check_range(name, value, number, low, high, open):
    if math.isfinite(number) and (low < number < high if open else low <= number <= high):
        return
    if not math.isfinite(high):
        bounds = "finite" if not math.isfinite(low) else f"finite and {'above' if open else 'at least'} {low:g}"
    else:
        bounds = f"in {'(' if open else '['}{low:g}, {high:g}{')' if open else ']'}"
    raise ValueError(f"{name} must be {bounds}, got {shown(value)}")


def floating(name: str, x: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Validates an array of a floating-point dtype and returns it as a JAX array.

    Integers are not accepted, because a result in their dtype would be truncated.

    shape: the required shape; default: any.
    """
    if not isinstance(x, jax.Array):
        x = jnp.asarray(_array(name, x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must have a floating-point dtype, such as float32, got {x.dtype}")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {x.shape}")
    return x


def batch(name: str, x: Any) -> jax.Array:
    """Validates a batch (B, ...) of a floating-point dtype, B at least 1, and returns it as a JAX array."""
    x = floating(name, x)
    if not x.ndim or not len(x):
        raise ValueError(f"{name} must have the shape (B, ...), B at least 1, got {x.shape}")
    return x


def broadcasts(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the array broadcasts to the shape."""
    try:
        fits = np.broadcast_shapes(np.shape(array), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to the shape {shape}, got {np.shape(array)}")


def keys(name: str, key: Any, *shapes: tuple[int | None, ...]) -> jax.Array:
    """Validates PRNG keys of one of the shapes and returns them as typed keys.

    key: typed keys, or raw keys of `jax.random.PRNGKey`, uint32 (..., 2).
    shapes: the allowed shapes. None in a shape allows every size.
    """
    if not (_is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        try:
            if not _is_array(key) or key.dtype != np.uint32:
                raise TypeError
            key = jax.random.wrap_key_data(key)
        except TypeError as error:
            raise ValueError(f"{name} must be a key of jax.random.key, got {shown(key)}") from error
    if not any(_fits(key.shape, shape) for shape in shapes):
        allowed = ["one key" if shape == () else f"one key for each of {shape[0] or 'B'} images" for shape in shapes]
        raise ValueError(f"{name} must be {' or '.join(allowed)}, got shape {key.shape}")
    return key


def _fits(shape: tuple[int, ...], allowed: tuple[int | None, ...]) -> bool:
    return len(shape) == len(allowed) and all(b in (None, a) for a, b in zip(shape, allowed, strict=True))


def lookup(table: Mapping[str, Any], name: str, argument: str = "") -> Any:
    """The entry `name` of a table. Raises a ValueError that lists all names and suggests the nearest one.

    argument: the name of the argument in the error message; default: the message begins with the value.
    """
    if not isinstance(name, str) or name not in table:
        nearest = difflib.get_close_matches(str(name), table, 1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        subject = f"{argument} must be" if argument else f"{shown(name)} is not"
        raise ValueError(f"{subject} one of {', '.join(table)}{f', got {shown(name)}' if argument else ''}{hint}")
    return table[name]


def function(name: str, call: Any) -> Any:
    """Converts a callable to a pytree that can be called.

    A callable pytree, such as a `jax.tree_util.Partial`, is returned unchanged. Any other callable becomes a static
    pytree without leaves. It is compiled once, with the arrays that it holds as constants. It is recompiled if an
    array or a float has been replaced in its closure, in the globals that its code names, or in the attributes of the
    object to which the method belongs. Changes at a deeper level, and changes in place, are not detected.

    Raises ValueError if call is not callable or not hashable.
    """
    if not callable(call):
        raise ValueError(f"{name} must be a function (x_t, t) -> array, got {shown(call)}")
    if not jax.tree_util.all_leaves([call]):
        return call
    try:
        return Partial(_Static(call))
    except TypeError as error:
        raise ValueError(
            f"{name} must be a function or a pytree, such as jax.tree_util.Partial(function, parameters): "
            f"{type(call).__name__} is not hashable"
        ) from error


class _Static:
    """A callable that is equal to another if both have the same function and hold the same parameters."""

    def __init__(self, call: Callable):
        self._call, self._held = call, _parameters(call)
        self._key = (call, *(leaf if isinstance(leaf, (float, np.generic)) else id(leaf) for leaf in self._held))
        hash(self._key)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Static) and self._key == other._key

    def __repr__(self) -> str:
        return f"{_Static.__name__}({self._call!r})"


def _parameters(call: Any) -> tuple[Any, ...]:
    """The arrays and floats that a function holds.

    Integers are not included, because they are often counters. Traced values are not included, because they belong to
    the current trace.
    """
    held = []
    if isinstance(call, functools.partial):
        held += [call.args, call.keywords]
        call = call.func
    call = inspect.unwrap(call)
    owner = getattr(call, "__self__", call)  # the object of a method, or a callable object
    if hasattr(owner, "__dict__") and not isinstance(owner, types.ModuleType):
        held += vars(owner).values()
    python_function = getattr(call, "__func__", call)
    if not isinstance(python_function, types.FunctionType):
        python_function = inspect.getattr_static(type(call), "__call__", None)
    if isinstance(python_function, types.FunctionType):
        held += [cell.cell_contents for cell in python_function.__closure__ or () if _is_full(cell)]
        held += [python_function.__globals__.get(name) for name in python_function.__code__.co_names]
    leaves = [leaf for value in held for leaf in _leaves(value)]
    return tuple(
        leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray, np.generic, float)) and not traced(leaf)
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (types.ModuleType, types.FunctionType, type, str, int, type(None))):
        return []
    try:
        return jax.tree.leaves(value)
    except (TypeError, ValueError):  # a dict whose keys cannot be sorted, or another object that cannot be flattened
        return []


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # the variable is not assigned yet
        return False
    return True


def output(name: str, value: Any, x: jax.Array) -> jax.Array:
    """Validates the output of the function `name` for x: an array of the shape of x with a floating-point dtype."""
    shape, dtype = np.shape(value) if _is_array(value) else None, getattr(value, "dtype", None)
    if shape is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must return an array of a floating-point dtype, got {shown(value)}")
    if shape != x.shape:
        raise ValueError(f"{name} must return an array of the shape {x.shape} of x_t, got {shape}")
    return jnp.asarray(value)


def shown(value: Any) -> str:
    """The repr of a value for an error message, in one line of at most 80 characters."""
    if _is_array(value) and np.shape(value):
        return f"an array of shape {np.shape(value)} and dtype {value.dtype}"
    if _is_array(value) and not traced(value):
        value = value.item() if jnp.issubdtype(value.dtype, np.number) else value
    text = repr(value) if isinstance(value, (bool, int, float, complex, str, bytes, list, tuple, type(None))) else ""
    text = " ".join((text or f"an object of {type(value).__name__}").split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def _is_real(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (int, float)):
        return True
    dtype = getattr(value, "dtype", None) if _is_array(value) else None
    return dtype is not None and (jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def _array(name: str, values: Any) -> Any:
    """Converts values to an array. Raises ValueError for a list with rows of different lengths, and for an object."""
    try:
        array = values if _is_array(values) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers, got {shown(values)}") from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{name} must hold numbers, got {shown(values)}")
    return array
