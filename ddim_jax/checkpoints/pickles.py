"""Pickles as data: a pickle is a program for a small stack machine, and this machine cannot import, call or build.

`load` runs the opcodes that make plain values: numbers, texts, bytes, lists, tuples, dicts and sets. A global,
"module name", is looked up in a table of the caller's and is otherwise only a name; to call it means to call what the
table says. So nothing of a file is executed, whoever wrote it, and memory is bounded by the size of the file.

One file because the stack machine is one loop, and a reader compares its opcodes.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Iterator, Mapping
from types import NoneType
from typing import Any, BinaryIO, NamedTuple

MAX_BYTES = 16 << 20  # of one pickle: those of the published checkpoints, which hold names and shapes, have 1 MB
SKIPPED_BYTES = 4096  # longer byte strings are not read, if `load` may skip them


class Global(NamedTuple):
    """The name of something in a module: a name only, nothing is imported."""

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
    """A byte string that is not read: where it is in the file."""

    begin: int
    length: int


class Unsupported(ValueError):
    """A pickle asks for more than values."""


Calls = Mapping[str, Callable[..., Any]]  # "module.name" -> its result; it raises ValueError for bad arguments


def load(file: BinaryIO, calls: Calls, persistent: Callable[[Any], Any] | None = None, *, skip: bool = False) -> Any:
    """The value of the pickle that begins where the file is; afterwards the file is behind it.

    calls: the globals that may be called; a result that is an `Object` gets the state that the pickle sets.
    persistent: what a persistent id means; None: there must be none.
    skip: a byte string of more than SKIPPED_BYTES is not read: it becomes `Skipped`, and does not count for MAX_BYTES.

    Unsupported where the pickle asks for anything else; ValueError where it is no pickle, is cut short, or has more
    than MAX_BYTES. A key of a dict and an item of a set must be a number, a text or bytes: to hash anything else may
    take for ever.
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
            elif not (isinstance(stack[-1], dict) and isinstance(state, dict)):  # the attributes of an OrderedDict
                raise Unsupported(f"it sets the state of a {_kind(stack[-1])}")
        elif name in ("PERSID", "BINPERSID"):
            if persistent is None:
                raise Unsupported("it refers to something outside of it")
            stack.append(persistent(argument if name == "PERSID" else stack.pop()))
        elif name == "STOP":
            return stack.pop()
        else:
            raise Unsupported(f"it holds the opcode {name}")
    raise ValueError("it ends before its last opcode")


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_LENGTHS = {"BINBYTES": pickletools.read_uint4, "BINBYTES8": pickletools.read_uint8}


def _opcodes(file: _Limited) -> Iterator[tuple[str, Any]]:
    """(name, argument) of every opcode, also of those behind the last one."""
    while code := file.read(1):
        if code not in _OPCODES:
            raise ValueError(f"it holds the unknown opcode {code!r}")
        opcode = _OPCODES[code]
        if opcode.name in _LENGTHS:
            yield opcode.name, file.bytes(_LENGTHS[opcode.name](file))
        else:
            yield opcode.name, opcode.arg.reader(file) if opcode.arg else None


def safely(read: Callable[[], Any]) -> Any:
    """The result of `read`, in which a damaged pickle fails in any way: Unsupported or ValueError, of one line."""
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
        raise Unsupported(f"it calls a {_kind(called)}")
    if str(called) not in calls:
        raise Unsupported(f"it calls {str(called)[:200]}, which is not one of {', '.join(calls)}")
    return calls[str(called)](*arguments)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    return dict(zip(map(_hashed, items[::2]), items[1::2], strict=True))


def _hashed(value: Any) -> Any:
    if not isinstance(value, (str, bytes, int, float, NoneType)):
        raise Unsupported(f"it holds a {_kind(value)} as a key")
    return value


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}, got a {_kind(value)}")
    return value


class _Limited:
    """A file of which MAX_BYTES are read. skip: see `load`."""

    def __init__(self, file: BinaryIO, skip: bool):
        self._file, self._left, self._skip = file, MAX_BYTES, skip

    def bytes(self, length: int) -> bytes | Skipped:
        """A byte string of this length. ValueError if the file is shorter; what is skipped is not checked."""
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
            raise ValueError(f"its pickle has more than {MAX_BYTES} bytes")
        return content


def _kind(value: Any) -> str:
    return type(value).__name__
