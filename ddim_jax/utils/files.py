"""Files on disk: atomic writes, and safe reads of untrusted files."""

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

JSON_BYTES = 1 << 26  # the limit for JSON files; no config, index or record is larger
JSON_DEPTH = 64  # the limit for the depth of JSON values
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
TEMPORARY = re.compile(r"\.(.+\.)?[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def replacing(
    path: pathlib.Path, completed: Callable[[pathlib.Path], None] = lambda temporary: None
) -> Iterator[BinaryIO]:
    """Yields a binary file to write to. When it is complete and synced to the disk, it replaces `path` atomically.

    Until then it is a new file with a random name in the same folder: it follows no symbolic link, and two machines
    with a common file system never write to the same file. OSError if it cannot be written; the temporary file is then
    removed. completed: called with the complete file, before it replaces `path`.
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
        if error.filename in (None, temporary, str(temporary)):  # None if the disk is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        unfinished.discard(temporary)


@contextlib.contextmanager
def filling(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new temporary folder in `folder`, which is created if it does not exist.

    When the content is complete, it moves into `folder`: first folders, then files, in the order of their names. It
    replaces existing files with the same names. After an exception nothing moves, and the temporary folder is removed.
    """
    is_new = not folder.exists()
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _move_content(temporary, folder)
        _sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # if it is not empty
                folder.rmdir()


def _move_content(source: pathlib.Path, target: pathlib.Path) -> None:
    for path in sorted(source.iterdir(), key=lambda path: (not path.is_dir(), path.name)):
        if path.is_dir() and (target / path.name).is_dir():
            _move_content(path, target / path.name)
        else:
            os.replace(path, target / path.name)


def is_temporary(path: pathlib.Path) -> bool:
    """Whether a path has a name of `replacing` or `filling`: a killed process does not remove its temporary files."""
    return TEMPORARY.fullmatch(path.name) is not None


def _sync_folder(folder: pathlib.Path) -> None:
    """Syncs a rename to the disk. Some file systems do not support this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: pathlib.Path, name: str = "*") -> None:
    """Removes the temporary files of `replacing` for files with this name, which a killed process left in a folder. No
    other process may be writing these files.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def check_writable_folder(folder: pathlib.Path) -> pathlib.Path:
    """ValueError if files cannot be written to a folder, or if it does not exist and cannot be created. It creates
    nothing. Returns the folder, or its nearest parent that exists.
    """
    try:
        existing = _nearest(pathlib.Path(os.path.abspath(folder)))
        with tempfile.TemporaryFile(dir=existing):
            return existing
    except OSError as error:
        raise ValueError(f"cannot write to the folder {printable(str(folder))}: {error.strerror}") from error


def _nearest(path: pathlib.Path) -> pathlib.Path:
    """The path, or its nearest parent that exists. OSError for a name that is too long or has a file as a parent."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return _nearest(path.parent)
    return path


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular(path: pathlib.Path) -> None:
    """ValueError unless a path is a regular file or a folder: reading a pipe or a device may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{printable(str(path))} is neither a regular file nor a folder")


def check_writable(path: pathlib.Path) -> None:
    """ValueError unless a regular file can be written at a path. It creates nothing."""
    folder = path.absolute().parent
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{printable(str(path))} exists and is not a regular file")
        if not folder.is_dir():
            raise ValueError(f"the folder {printable(str(path.parent))} does not exist")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {printable(str(path))[:200]}: {error.strerror}") from error


def read_json(path: pathlib.Path) -> Any:
    """The JSON value in a file. ValueError if it is not JSON, deeper than JSON_DEPTH, or larger than JSON_BYTES."""
    check_regular(path)
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{printable(str(path))} must have at most {JSON_BYTES} bytes of JSON, got {size}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """The JSON value of a text. source: where the text is from, for messages. ValueError if it is not JSON, deeper than
    JSON_DEPTH, or longer than JSON_BYTES.
    """
    if len(text) > JSON_BYTES:
        raise ValueError(f"{printable(source)} must have at most {JSON_BYTES} bytes of JSON, got {len(text)}")
    too_deep = f"{printable(source)} is not JSON: it is too deeply nested"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{printable(source)} is not JSON: {error}") from error
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [child for parent in level if isinstance(parent, (dict, list)) for child in _children(parent)]
    if level:
        raise ValueError(too_deep)
    return value


def _children(value: dict | list) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def json_digest(value: Any) -> str:
    """The SHA-256 of a JSON value, by its text with sorted keys: equal values have equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_memory(needed: int, what: str) -> None:
    """ValueError if fewer than `needed` bytes of memory are available. what: what needs them, for the message."""
    if needed > (free := available_memory()):
        raise ValueError(f"{what} would take {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free")


def available_memory() -> int:
    """The available memory of this machine in bytes, at most the limit of its container."""
    free = machine_memory()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        match = re.search(r"^MemAvailable: +(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = min(free, int(match[1]) * 1024)
    return free


def machine_memory() -> int:
    """The memory of this machine in bytes, at most the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError for "max", which means no limit
            total = min(total, int(pathlib.Path(limit).read_text()))
    return total


def check_name(name: str) -> None:
    """ValueError unless a name can be part of a path and of a web page: at most 100 characters of letters, digits, '.',
    '_' and '-', of which the first is a letter or a digit.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"a name must have at most 100 letters, digits, '.', '_' or '-', and begin with a letter or a digit, got "
            f"{printable(name[:100])!r}"
        )


def name_from(text: str) -> str:
    """A name that `check_name` accepts, from any text: other characters become '-'."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-_")[:100] or "unnamed"


def printable(text: str) -> str:
    """The text with control characters escaped, so that text of a file cannot control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value as text for a message: one line of a few hundred characters at most, control characters escaped."""
    try:
        return printable(_short.repr(value))
    except Exception:  # an int with more digits than Python prints, or an exception of a __repr__
        return f"a value of type {type(value).__name__}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxlevel = 3


def human_size(count: int) -> str:
    """A number of bytes as text with a unit, such as "1.5 MiB"."""
    power = min(max(count.bit_length() - 1, 0) // 10, 6)
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"
