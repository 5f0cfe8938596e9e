"""Files on disk: written whole or not at all, and read as data, whoever made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import reprlib
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from ddim_jax.utils.interrupts import unfinished

JSON_BYTES = 1 << 26  # no config, index or record is larger
JSON_DEPTH = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def replacing(
    path: pathlib.Path, completed: Callable[[pathlib.Path], None] = lambda temporary: None
) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces `path` once it is complete and on the disk.

    Until then it has a random name in the same folder, created anew: it follows no link, and two machines that share
    the folder never write to the same file. OSError where it cannot be written; nothing is left behind then.
    completed: called with the complete file, before it replaces `path`.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    unfinished.add(temporary)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        completed(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)):  # None where it is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        unfinished.discard(temporary)


@contextlib.contextmanager
def filling(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder in `folder`, made if it is not there, whose content moves up into it once it is complete: replaces
    what has the same name there, files after folders, in the order of their names. Else nothing is left behind.
    """
    new = not folder.exists()
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _move_content(temporary, folder)
        _sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _move_content(source: pathlib.Path, target: pathlib.Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: (not path.is_dir(), path.name)):
        if path.is_dir() and (target / path.name).is_dir():
            _move_content(path, target / path.name)
        else:
            os.replace(path, target / path.name)


def is_temporary(path: pathlib.Path) -> bool:
    """Whether `replacing` or `filling` named it: left behind where a process was killed."""
    return TEMPORARY.fullmatch(path.name) is not None


def _sync_folder(folder: pathlib.Path) -> None:
    """Puts a rename on the disk; some file systems have no such call."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: pathlib.Path, name: str = "*") -> None:
    """Removes what `replacing` left in a folder, of files of this name, when a process was killed. No other process may
    be writing them.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def check_writable_folder(folder: pathlib.Path) -> pathlib.Path:
    """ValueError if files cannot be written into the folder, or if it is not there and cannot be made. Makes nothing.
    Returns what is there already: the folder, or the nearest one above it.
    """
    try:
        there = _nearest(pathlib.Path(os.path.abspath(folder)))
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        raise ValueError(f"cannot write to the folder {printable(str(folder))}: {error.strerror}") from error


def _nearest(path: pathlib.Path) -> pathlib.Path:
    try:
        os.lstat(path)  # which a name that is too long, or below a file, cannot pass
    except FileNotFoundError:
        return _nearest(path.parent)
    return path


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: pathlib.Path) -> None:
    """ValueError unless path is a regular file or a folder: reading a pipe or a device may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{printable(str(path))} is neither a regular file nor a folder")


def check_writable(path: pathlib.Path) -> None:
    """ValueError unless a regular file can be written at path. Nothing is left behind."""
    folder = path.absolute().parent
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{printable(str(path))} is there and is not a regular file")
        if not folder.is_dir():
            raise ValueError(f"there is no folder {printable(str(path.parent))}")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {printable(str(path))[:200]}: {error.strerror}") from error


def read_json(path: pathlib.Path) -> Any:
    """The JSON value in a file. ValueError if it is not JSON, too deep, or larger than JSON_BYTES."""
    check_regular(path)
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{printable(str(path))} has {size} bytes, JSON of at most {JSON_BYTES} is read")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """The JSON value of a text of the file `source`. ValueError if it is not JSON, deeper than JSON_DEPTH, or longer
    than JSON_BYTES.
    """
    if len(text) > JSON_BYTES:
        raise ValueError(f"{printable(source)} has {len(text)} bytes, JSON of at most {JSON_BYTES} is read")
    deep = f"{printable(source)} is no JSON: it is too deeply nested"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(deep) from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
        raise ValueError(f"{printable(source)} is no JSON: {error}") from error
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [child for parent in level if isinstance(parent, (dict, list)) for child in _children(parent)]
    if level:
        raise ValueError(deep)
    return value


def _children(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value: of one text that all equal values have."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_memory(needed: int, what: str) -> None:
    """ValueError if so many bytes are more than this process can get."""
    if needed > (free := available_memory()):
        raise ValueError(f"{what} would take {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free")


def available_memory() -> int:
    """Bytes of memory that are free on this machine, at most what its container may use."""
    free = machine_memory()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        found = re.search(r"^MemAvailable: +(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = min(free, int(found[1]) * 1024)
    return free


def machine_memory() -> int:
    """Bytes of memory of this machine, at most what its container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            total = min(total, int(pathlib.Path(limit).read_text()))
    return total


def check_name(name: str) -> None:
    """ValueError unless a name can be part of a path and of a page: letters, digits, '.', '_' and '-', at most 100,
    the first a letter or a digit.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a name must be letters, digits, '.', '_' or '-', at most 100, and begin with a letter or a digit; "
            f"got {printable(name[:100])!r}"
        )


def name_from(text: str) -> str:
    """The nearest name that `check_name` accepts: every other character becomes '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-_")[:100] or "unnamed"


def printable(text: str) -> str:
    """The text with control characters escaped, so that no file can write to a terminal but what it says."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """Any value as an error message has it: one line, a few hundred characters at most, control characters escaped."""
    try:
        return printable(_short.repr(value))
    except Exception:  # an int of more digits than Python prints, or whatever a __repr__ raises
        return f"a value of type {type(value).__name__}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlevel = 3


def human_size(count: int) -> str:
    """A number of bytes, for people."""
    power = min(max(count.bit_length() - 1, 0) // 10, 6)
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"
