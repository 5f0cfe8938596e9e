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
import stat
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

JSON_BYTES = 1 << 26  # no config, index or record is larger
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces `path` once it is complete and on the disk.

    Until then it has a random name in the same folder, created anew: it follows no link, and two machines that share
    the folder never write to the same file. OSError where it cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: pathlib.Path) -> None:
    """Puts a rename on the disk; some file systems have no such call."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    try:
        return json_value(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{printable(str(path))} is no JSON: {error}") from error


def json_value(text: str | bytes) -> Any:
    """The JSON value in a text. ValueError if it is none, is too deep, or is longer than JSON_BYTES."""
    if len(text) > JSON_BYTES:
        raise ValueError(f"it is longer than {JSON_BYTES}")
    try:
        return json.loads(text)  # UnicodeDecodeError and JSONDecodeError are ValueErrors
    except RecursionError as error:
        raise ValueError("it is too deeply nested") from error


def check_memory(needed: int, what: str) -> None:
    """ValueError if so many bytes are more than this process can get."""
    if needed > (free := available_memory()):
        raise ValueError(f"{what} would take {needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free")


def available_memory() -> int:
    """Bytes of memory that are free on this machine, at most what its container may use."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        found = re.search(r"^MemAvailable: +(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(found[1]) * 1024
        for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
                free = min(free, int(pathlib.Path(limit).read_text()))
        return free
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
