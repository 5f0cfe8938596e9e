"""Files on disk: written whole or not at all, and read as data, whoever made them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

from ddim_jax.interrupts import unfinished

JSON_BYTES = 1 << 26  # no config, index or record is larger
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which replaces `path` once it is complete and on the disk.

    Until then it has a random name in the same folder, created anew: it follows no link, and two machines that share
    the folder never write to the same file. OSError where it cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    unfinished.add(temporary)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename in (None, temporary, str(temporary)):  # None where it is full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        unfinished.discard(temporary)


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


def read_json(path: pathlib.Path) -> Any:
    """The JSON value in a file. ValueError if it is not JSON, too deep, or larger than JSON_BYTES."""
    check_regular(path)
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{printable(str(path))} has {size} bytes, JSON of at most {JSON_BYTES} is read")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "it is too deeply nested" if isinstance(error, RecursionError) else error
        raise ValueError(f"{printable(str(path))} is no JSON: {reason}") from error


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


def human_size(count: int) -> str:
    """A number of bytes, for people."""
    power = min(max(count.bit_length() - 1, 0) // 10, 6)
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"
