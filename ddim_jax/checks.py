"""What the public functions of the mathematics accept. All of it runs on the host, before anything is traced, and every
mistake is a ValueError of one line that names the argument.

The value of a traced argument is not known, so it passes; its shape and dtype are known, and are checked.
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

MAX_STEPS = 10**7  # of a schedule or a tau: more would fill the memory of the host


def traced(*values: Any) -> bool:
    """Whether any of the values is traced, so that only its shape and dtype are known."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def integer(name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """An integer from low to high, both included. True, 10.0 and "10" are none."""
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
    """The value itself, which must be one finite real number in [low, high]; open: in (low, high)."""
    if type(value) not in (int, float) and (not _is_real(value) or np.shape(value)):
        raise ValueError(f"{name} must be a real number, got {shown(value)}")
    if not traced(value):
        _within(name, value, float(value), low, high, open)
    return value


def reals(
    name: str,
    values: Any,
    low: float = -math.inf,
    high: float = math.inf,
    open: bool = False,
    infinite: bool = False,
) -> Any:
    """The same of every entry of an array of any shape, or of a list; a list becomes an array. infinite: whether these
    are allowed too.
    """
    values = _array(name, values)
    if not _is_real(values):
        raise ValueError(f"{name} must hold real numbers, got {shown(values)}")
    if not traced(values):
        host = np.asarray(values, np.float64)
        right = (host > low) & (host < high) if open else (host >= low) & (host <= high)
        if (bad := host[~(right & (infinite | np.isfinite(host)))]).size:
            _within(name, bad[0], float(bad[0]), low, high, open)
    return values


def _within(name, value, number, low, high, open):
    if math.isfinite(number) and (low < number < high if open else low <= number <= high):
        return
    if not math.isfinite(high):
        bounds = "finite" if not math.isfinite(low) else f"finite and {'above' if open else 'at least'} {low:g}"
    else:
        bounds = f"in {'(' if open else '['}{low:g}, {high:g}{')' if open else ']'}"
    raise ValueError(f"{name} must be {bounds}, got {shown(value)}")


def floating(name: str, x: Any, shape: tuple[int, ...] | None = None) -> jax.Array:
    """x as an array of JAX, which must be of real floating point: what is computed from integers would be cut off.
    shape: the one that it must have.
    """
    if not isinstance(x, jax.Array):
        x = jnp.asarray(_array(name, x))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be of floating point, such as float32, got {x.dtype}")
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {x.shape}")
    return x


def batch(name: str, x: Any) -> jax.Array:
    """The same of a batch (B, ...)."""
    x = floating(name, x)
    if not x.ndim or not len(x):
        raise ValueError(f"{name} must be a batch (B, ...), B at least 1, got shape {x.shape}")
    return x


def broadcasts(name: str, array: Any, shape: tuple[int, ...]) -> None:
    """ValueError unless an array broadcasts to the shape."""
    try:
        fits = np.broadcast_shapes(np.shape(array), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to the shape {shape}, got {np.shape(array)}")


def keys(name: str, key: Any, *shapes: tuple[int | None, ...]) -> jax.Array:
    """Typed PRNG keys of one of the shapes, also from the raw uint32 (..., 2) of `jax.random.PRNGKey`. None in a shape
    stands for any number.
    """
    if not (_is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        try:
            if not _is_array(key) or key.dtype != np.uint32:
                raise TypeError
            key = jax.random.wrap_key_data(key)
        except TypeError as error:
            raise ValueError(f"{name} must be made by jax.random.key, got {shown(key)}") from error
    if not any(_fits(key.shape, shape) for shape in shapes):
        wanted = ["one key" if shape == () else f"one for each of {shape[0] or 'B'} images" for shape in shapes]
        raise ValueError(f"{name} must be {' or '.join(wanted)}, got shape {key.shape}")
    return key


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def lookup(table: Mapping[str, Any], name: str, argument: str = "") -> Any:
    """The entry called name, or a ValueError with the names there are and the nearest of them."""
    if not isinstance(name, str) or name not in table:
        nearest = difflib.get_close_matches(str(name), table, 1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        wrong = f"{argument} must be" if argument else f"{shown(name)} is not"
        raise ValueError(f"{wrong} one of {', '.join(table)}{f', got {shown(name)}' if argument else ''}{hint}")
    return table[name]


def function(name: str, call: Any) -> Any:
    """A function as a pytree: itself if it is one, such as a `jax.tree_util.Partial`; else without leaves, static.

    A static function is compiled once, with the arrays that it holds as constants. It counts as another one, and is
    compiled again, when an array or a float in its closure, among the globals that it names, or in the attributes of
    the object that it is a method of has been replaced. What lies deeper, or is changed in place, is not noticed.
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
            f"{type(call).__name__} cannot be hashed"
        ) from error


class _Static:
    """A function that equals another if they are the same and hold the same parameters."""

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
    """The arrays and floats that a function holds. Not integers, which count calls as often as not, and not what is
    traced, which belongs to the trace that is going on.
    """
    held = []
    if isinstance(call, functools.partial):
        held += [call.args, call.keywords]
        call = call.func
    call = inspect.unwrap(call)
    owner = getattr(call, "__self__", call)  # of a method, or an object that is called itself
    if hasattr(owner, "__dict__") and not isinstance(owner, types.ModuleType):
        held += vars(owner).values()
    plain = getattr(call, "__func__", call)
    if not isinstance(plain, types.FunctionType):
        plain = inspect.getattr_static(type(call), "__call__", None)
    if isinstance(plain, types.FunctionType):
        held += [cell.cell_contents for cell in plain.__closure__ or () if _is_full(cell)]
        held += [plain.__globals__.get(name) for name in plain.__code__.co_names]
    leaves = [leaf for value in held for leaf in _leaves(value)]
    return tuple(
        leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray, np.generic, float)) and not traced(leaf)
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (types.ModuleType, types.FunctionType, type, str, int, type(None))):
        return []
    try:
        return jax.tree.leaves(value)
    except (TypeError, ValueError):  # a dict whose keys have no order, or another object that cannot be taken apart
        return []


def _is_full(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that is not assigned yet
        return False
    return True


def output(name: str, value: Any, x: jax.Array) -> jax.Array:
    """What a function `name` returned for x: an array of floating point and of the shape of x."""
    shape, dtype = np.shape(value) if _is_array(value) else None, getattr(value, "dtype", None)
    if shape is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} must return an array of floating point, got {shown(value)}")
    if shape != x.shape:
        raise ValueError(f"{name} must return an array of the shape {x.shape} of x_t, got {shape}")
    return jnp.asarray(value)


def shown(value: Any) -> str:
    """A value for a message, in one short line."""
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
    """values as an array, if it is none. ValueError for a list whose rows are not of one length, and for an object."""
    try:
        array = values if _is_array(values) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers, got {shown(values)}") from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise ValueError(f"{name} must hold numbers, got {shown(values)}")
    return array
