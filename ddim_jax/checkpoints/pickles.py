"""A restricted unpickler: reads pickles without importing modules and without executing code.

A pickle is a program for a stack machine. `load` supports only the opcodes that create plain values: numbers, strings,
bytes, lists, tuples, dicts and sets. A global (a module and a name in it) becomes a `Global`, which is not imported. If
the pickle calls a global, `load` calls the function that the caller gave for it; any other call raises an error. The
memory is bounded by the size of the file.

One file because the stack machine is one loop, and a reader compares its opcodes.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, BinaryIO, NamedTuple

MAX_BYTES = 16 << 20  # the limit for one pickle; those of published checkpoints (names and shapes) have 1 MB
SKIPPED_BYTES = 4096  # longer byte strings are not read, if `load` may skip them


class Global(NamedTuple):
    """The name of an attribute of a module. The module is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class Object:
    """An object of a class that a pickle names. Nothing of the class is imported."""

    kind: str  # the name of the class
    state: Any = None  # what the pickle sets as its state


class Skipped(NamedTuple):
    """A byte string that was not read, and its position in the file."""

    begin: int
    length: int


class Unsupported(ValueError):
    """A pickle needs an opcode or a call that is not supported."""


Calls = Mapping[str, Callable[..., Any]]  # "module.name" -> function; it raises ValueError for invalid arguments


def load(file: BinaryIO, calls: Calls, persistent: Callable[[Any], Any] | None = None, *, skip: bool = False) -> Any:
    """Reads the pickle at the current position of the file, and returns its value. The position is then after the
    pickle.

    calls: the functions for the globals that the pickle may call; a result that is an `Object` gets the state that the
    pickle sets. persistent: converts a persistent id to a value; None if persistent ids are not supported. skip: byte
    strings of more than SKIPPED_BYTES are not read: each becomes a `Skipped`, and does not count for MAX_BYTES.

    Unsupported for another call and for an unsupported opcode. ValueError if the file has no complete pickle there, and
    if the pickle has more than MAX_BYTES. A key of a dict and an item of a set must be a number, a string, bytes or
    None, because the hash of a nested value may take too long.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_mark() -> list[Any]:
        begin = marks.pop()
        items = stack[begin:]
        del stack[begin:]
        return items

    for name, argument in _opcodes(_Limited(file, skip)):
        if name in _IGNORED:
            pass
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "POP":
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                stack.pop()
        elif name == "POP_MARK":
            pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(pop_mark()))
        elif name == "LIST":
            stack.append(pop_mark())
        elif name == "FROZENSET":
            stack.append(frozenset(map(_hashed, pop_mark())))
        elif name == "DICT":
            stack.append(_pairs(pop_mark()))
        elif name == "APPEND":
            item = stack.pop()
            _of(list, stack[-1]).append(item)
        elif name == "APPENDS":
            items = pop_mark()
            _of(list, stack[-1]).extend(items)
        elif name == "ADDITEMS":
            items = pop_mark()
            _of(set, stack[-1]).update(map(_hashed, items))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _of(dict, stack[-1])[_hashed(key)] = value
        elif name == "SETITEMS":
            items = pop_mark()
            _of(dict, stack[-1]).update(_pairs(items))
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(Global(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = _of(str, stack.pop()), _of(str, stack.pop())
            stack.append(Global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = _of(tuple, stack.pop()), stack.pop()
            stack.append(_call(calls, called, arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Object):
                stack[-1].state = state
            elif not (isinstance(stack[-1], dict) and isinstance(state, dict)):  # ignored: attributes of an OrderedDict
                raise Unsupported(f"setting the state of a {_kind(stack[-1])} is not supported")
        elif name in ("PERSID", "BINPERSID"):
            if persistent is None:
                raise Unsupported("persistent ids are not supported")
            stack.append(persistent(argument if name == "PERSID" else stack.pop()))
        elif name == "STOP":
            return stack.pop()
        else:
            raise Unsupported(f"the opcode {name} is not supported")
    raise ValueError("its pickle has no STOP opcode")


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_LENGTHS = {"BINBYTES": pickletools.read_uint4, "BINBYTES8": pickletools.read_uint8}


def _opcodes(file: _Limited) -> Iterator[tuple[str, Any]]:
    """(name, argument) of each opcode. Unlike `pickletools.genops` it can skip long byte strings."""
    while code := file.read(1):
        if code not in _OPCODES:
            raise ValueError(f"the opcode {code!r} is unknown")
        opcode = _OPCODES[code]
        if opcode.name in _LENGTHS:
            yield opcode.name, file.bytes(_LENGTHS[opcode.name](file))
        else:
            yield opcode.name, opcode.arg.reader(file) if opcode.arg else None


def safely(read: Callable[[], Any]) -> Any:
    """The result of read(). The exceptions that a damaged pickle causes become a ValueError of one line; Unsupported is
    raised unchanged.
    """
    try:
        return read()
    except Unsupported:
        raise
    except RecursionError:
        raise ValueError("it is too deeply nested") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"it is damaged: {reason}") from error


_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
}
_LITERALS |= {"SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"SHORT_BINUNICODE", "BYTEARRAY8"}


def _call(calls: Calls, called: Any, arguments: tuple) -> Any:
    if not isinstance(called, Global):
        raise Unsupported(f"calling a {_kind(called)} is not supported")
    if str(called) not in calls:
        raise Unsupported(f"calling {str(called)[:200]} is not supported; supported: {', '.join(calls)}")
    return calls[str(called)](*arguments)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key of a dict has no value")
    return dict(zip(map(_hashed, items[::2]), items[1::2], strict=True))


def _hashed(value: Any) -> Any:
    if not isinstance(value, (str, bytes, int, float, NoneType)):
        raise Unsupported(f"a {_kind(value)} as a key of a dict or an item of a set is not supported")
    return value


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}, got a {_kind(value)}")
    return value


class _Limited:
    """A file from which at most MAX_BYTES are read; ValueError beyond. skip: see `load`."""

    def __init__(self, file: BinaryIO, skip: bool):
        self._file, self._left, self._skip = file, MAX_BYTES, skip

    def bytes(self, length: int) -> bytes | Skipped:
        """A byte string of this length. ValueError if fewer remain in the file; if they are skipped, this is
        not checked.
        """
        if self._skip and length > SKIPPED_BYTES:
            begin = self._file.tell()
            self._file.seek(begin + length)
            return Skipped(begin, length)
        content = self.read(length)
        if len(content) < length:
            raise ValueError(f"expected {length} bytes, but only {len(content)} remain")
        return content

    def read(self, count: int) -> bytes:
        return self._count(self._file.read(min(count, self._left + 1)))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left + 1))

    def _count(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"its pickle must have at most {MAX_BYTES} bytes")
        return content


def _kind(value: Any) -> str:
    return type(value).__name__
