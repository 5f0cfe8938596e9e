"""The descriptions of .npz files in the record of an output folder."""

from __future__ import annotations

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.utils import files, images
from ddim_jax.utils.errors import ConfigError


class Arrays(NamedTuple):
    """The arrays of an .npz of results: for each name one of shape (length, ...)."""

    length: int
    counted_by: str  # the field or option that sets the length, for messages
    items: Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape of one item, dtype)

    def described(self, length: int | None = None) -> dict[str, Any]:
        """The description in a record. length: the number of items; default: all."""
        length = self.length if length is None else length
        return {name: {"shape": [length, *shape], "dtype": dtype} for name, (shape, dtype) in self.items.items()}

    @property
    def nbytes(self) -> int:
        return self.length * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.items.values())


def checked_arrays(path: pathlib.Path) -> dict[str, Any]:
    """The description of the arrays of an .npz. ValueError if one is damaged."""
    files.check_regular(path)
    with zipfile.ZipFile(path) as archive:
        check_stored(archive)
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")
    return described(images.open_npz(path))


def check_stored(archive: zipfile.ZipFile) -> None:
    """ValueError if an array is compressed: results are never compressed, and a compressed array may have any size."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("it is compressed")


def described(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The description of arrays: {name: {"shape": ..., "dtype": ...}}."""
    return {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}


def shown(described: Any) -> str:
    """A description as text for a message."""
    items = described.items() if isinstance(described, dict) else ()
    return ", ".join(f"{name} {about['dtype']} {tuple(about['shape'])}" for name, about in items) or "no arrays"


@contextlib.contextmanager
def one_line(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError or a ValueError into a ConfigError that names the path."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be used: {getattr(error, 'strerror', None) or error}") from error


def remove(path: pathlib.Path) -> None:
    """Removes a file or a link. In a folder it removes only the files whose names are numbers; the folder itself is
    removed if it is then empty.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for file in path.iterdir():
        if file.stem.isdigit() and not file.is_dir():
            file.unlink()
    files.remove_temporaries(path)
    with contextlib.suppress(OSError):
        path.rmdir()
