"""Reads files of `torch.save` without PyTorch and without executing code in them.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl` is a pickle in which tensors refer to storages, and
`data/KEY` are the storages. Earlier versions write a sequence of pickles, followed by the storages. Both formats are
supported. The tar files of versions before 0.1.10 are not. `Tensor.read` reads the values, through a memory map.

In a plain pickle, as NVIDIA publishes it, each storage is a byte string with the content of a file in the format before
1.6. `load_pickle` reads it.

One file because the formats share the checks of a tensor and of a storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import mmap
import pathlib
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from ddim_jax.checkpoints import pickles
from ddim_jax.checkpoints.pickles import Global
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError, DamagedError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of PyTorch before 1.6
MAX_AXES, MAX_COUNT = 32, 1 << 48
MAX_STORAGES = 10_000  # of a plain pickle; the published networks have fewer than 1,000

DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


class Storage(NamedTuple):
    """A one-dimensional array in a file."""

    dtype: np.dtype
    count: int  # of elements
    read: Callable[[], np.ndarray]  # () -> (count,) of the dtype


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage. Its values are not read yet."""

    storage: Storage
    offset: int  # in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def read(self) -> np.ndarray:
        """A copy of the values. DamagedError if the storage does not match its CRC."""
        flat = self.storage.read()
        size = self.storage.dtype.itemsize
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, [stride * size for stride in self.strides], writeable=False
        )
        return np.array(view)


def load(path: pathlib.Path) -> Any:
    """The object in a file: plain values and `Tensor`s. CheckpointError if the file is not of `torch.save`, or holds
    anything else; DamagedError if an entry does not match its CRC.
    """
    if not path.exists():
        raise CheckpointError(f"file {path} does not exist")
    with _one_line(path):
        if zipfile.is_zipfile(path):
            return pickles.safely(lambda: _load_zip(path))
        if tarfile.is_tarfile(path):
            raise ValueError("it is a tar file (PyTorch before 0.1.10): save it with a later version of PyTorch")
        with open(path, "rb") as file:
            return pickles.safely(lambda: _load_stream(file, path))


def load_pickle(path: pathlib.Path, calls: pickles.Calls) -> Any:
    """The content of a plain pickle with tensors in it: values, `Tensor`s, and what the calls return.

    calls: the globals that may be called, in addition to those of tensors. CheckpointError as for `load`.
    """
    if not path.exists():
        raise CheckpointError(f"file {path} does not exist")
    with _one_line(path), open(path, "rb") as file:
        size, opened = path.stat().st_size, 0

        def storage(content: Any) -> Storage:
            nonlocal opened
            opened += 1
            if opened > MAX_STORAGES:
                raise ValueError(f"it has more than {MAX_STORAGES} storages")
            if isinstance(content, pickles.Skipped):
                with open(path, "rb") as inner:
                    inner.seek(content.begin)
                    found = _load_stream(inner, path, min(content.begin + content.length, size))
            else:
                if not isinstance(content, bytes):
                    raise ValueError("a storage must be bytes")
                found = _load_stream(io.BytesIO(content))
            if not isinstance(found, Storage):
                raise ValueError("the bytes of a storage must hold a storage")
            return found

        def read() -> Any:
            if file.read(1) != pickle.PROTO:
                raise ValueError("it is not a pickle")
            file.seek(0)
            content = pickles.load(file, {**CALLS, "torch.storage._load_from_bytes": storage, **calls}, skip=True)
            if file.read(1):
                raise ValueError("it has bytes after its pickle")
            return content

        return pickles.safely(read)


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Turns what reading a file raises into a CheckpointError of one line, except a DamagedError."""
    try:
        files.check_regular(path)
        yield
    except DamagedError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, tarfile.TarError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of tensors (no code in it was executed): {error}"
        ) from error


# --- tensors ---


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor has no storage")
    for number in (offset, *shape, *strides):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_COUNT:
            raise ValueError("the offset, the shape and the strides of a tensor must be integers in 0..2^48 - 1")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError(
            f"a tensor has {len(shape)} axes (at most {MAX_AXES}) and {len(strides)} strides (one per axis)"
        )
    size, last = 1, offset
    for length, stride in zip(shape, strides, strict=True):
        size *= length
        last += max(length - 1, 0) * stride
    if size and last >= storage.count or size > storage.count:  # a view with strides of 0 could have any size
        raise ValueError(f"a tensor of shape {tuple(shape)} is larger than its storage of {storage.count} elements")
    return Tensor(storage, offset if size else 0, tuple(shape), tuple(strides))


def _parameter(data: Any, *_) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter has no tensor")
    return data


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


def _size(shape: Any) -> tuple[int, ...]:
    return tuple(shape)


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
}


def dtype_of(kind: Any) -> np.dtype:
    """The dtype of a global such as "torch.FloatStorage". Unsupported for any other value."""
    if not isinstance(kind, Global) or kind.module not in ("torch", "torch.cuda") or kind.name not in DTYPES:
        raise pickles.Unsupported(f"the storage type {str(kind)[:100]} is not supported")
    return DTYPES[kind.name]


# --- the zip archive ---


def _load_zip(path: pathlib.Path) -> Any:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError("two of its entries have the same name")
        if any(
            entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries
        ):
            raise ValueError("its entries must not be compressed; torch.save does not compress")
        begins = {entry.filename: _begin(file, entry) for entry in entries}
        ranges = sorted((begins[entry.filename], begins[entry.filename] + entry.file_size) for entry in entries)
        ends = [0, *(end for _, end in ranges)]
        if ends[-1] > size or any(begin < end for (begin, _), end in zip(ranges, ends, strict=False)):
            raise ValueError("its entries overlap, or extend beyond the end of the file")
        known = {entry.filename: entry for entry in entries}
        pickled, *others = [name for name in names if name.rpartition("/")[2] == "data.pkl"] or [None]
        if pickled is None or others:
            raise ValueError(f"it must have one data.pkl, got {len(others) + 1 if others else 0}")
        prefix = pickled.removesuffix("data.pkl")
        order = known.get(f"{prefix}byteorder")
        if order is not None and _bytes(path, begins[order.filename], order) != b"little":
            raise ValueError("its byte order is not little-endian")
        if known[pickled].file_size > pickles.MAX_BYTES:
            raise ValueError(f"its data.pkl must have at most {pickles.MAX_BYTES} bytes")
        content = _bytes(path, begins[pickled], known[pickled])

        def storage(id_: Any) -> Storage:
            kind, key, _, count = _storage_id(id_, 5)
            entry = known.get(f"{prefix}data/{key}")
            if entry is None:
                raise ValueError(f"the storage {str(key)[:100]!r} is missing")
            return _storage(path, begins[entry.filename], entry, dtype_of(kind), count)

        stream = io.BytesIO(content)
        loaded = pickles.load(stream, CALLS, storage)
        if stream.read(1):
            raise ValueError("its data.pkl has data after the pickle")
        return loaded


def _begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """The offset of the bytes of an entry, which follow its local header."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("an entry has no local header")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _bytes(path: pathlib.Path, begin: int, entry: zipfile.ZipInfo) -> bytes:
    with open(path, "rb") as file:
        file.seek(begin)
        content = file.read(entry.file_size)
    _check_crc(path, entry, content)
    return content


def _check_crc(path: pathlib.Path, entry: zipfile.ZipInfo, content: Any) -> None:
    """DamagedError if an entry does not match its CRC. A CRC of 0 is not checked: an option of PyTorch writes it."""
    if entry.CRC and zlib.crc32(content) != entry.CRC:
        raise DamagedError(f"{path} is damaged: {entry.filename} in it does not match its CRC")


def _storage(path: pathlib.Path, begin: int, entry: zipfile.ZipInfo, dtype: np.dtype, count: int) -> Storage:
    if count * dtype.itemsize != entry.file_size:
        raise ValueError(f"{entry.filename} must hold {count} elements of {dtype}, got {entry.file_size} bytes")

    def read() -> np.ndarray:
        flat = mapped(path, begin, dtype, count)
        _check_crc(path, entry, flat.view(np.uint8) if count else b"")
        return flat

    return Storage(dtype, count, read)


def mapped(path: pathlib.Path, begin: int, dtype: np.dtype, count: int) -> np.ndarray:
    """The array (count,) at the byte `begin` of a file, through a memory map that is closed with the array."""
    if not count:
        return np.zeros(0, dtype)
    with open(path, "rb") as file:
        first = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        bytes_ = mmap.mmap(file.fileno(), begin - first + count * dtype.itemsize, access=mmap.ACCESS_READ, offset=first)
    return np.frombuffer(bytes_, np.uint8, count * dtype.itemsize, begin - first).view(dtype)


def _storage_id(id_: Any, length: int) -> tuple[Any, str, Any, int]:
    """(storage type, key, location, number of elements) of a persistent id. ValueError if it has another form."""
    if not isinstance(id_, tuple) or len(id_) < length or id_[0] != "storage" or not isinstance(id_[2], str):
        raise ValueError("a persistent id is not one of a storage")
    count = id_[4]
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < MAX_COUNT:
        raise ValueError("the number of elements of a storage must be an integer in 0..2^48 - 1")
    return id_[1], id_[2], id_[3], count


# --- the sequence of pickles ---


def _load_stream(file: BinaryIO, path: pathlib.Path | None = None, size: int | None = None) -> Any:
    """The object in a file of PyTorch before 1.6, from its current position.

    path: of the file, to map its storages; None if it is in memory. size: the position of its end; None: the end of the
    file.
    """
    head = file.read(2)
    file.seek(-len(head), io.SEEK_CUR)
    if head[:1] != pickle.PROTO:
        raise ValueError("it is neither a zip archive nor a pickle")
    if pickles.load(file, {}) != MAGIC:
        raise ValueError("it is a pickle that torch.save did not write")
    pickles.load(file, {})  # the version of the format
    about = pickles.load(file, {})
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise ValueError("its byte order is not little-endian")
    found: dict[str, list[Any]] = {}  # key -> [dtype, count, offset in the file]

    def storage(id_: Any) -> Storage:
        kind, key, _, count = _storage_id(id_, 6)
        if id_[5] is not None:
            raise pickles.Unsupported("views of storages are not supported")
        place = found.setdefault(key, [dtype_of(kind), count, None])
        if place[:2] != [dtype_of(kind), count]:
            raise ValueError(f"the storage {key[:100]!r} has two dtypes or two sizes")

        def read() -> np.ndarray:
            return _slice(file, path, place)

        return Storage(place[0], count, read)

    content = pickles.load(file, CALLS, storage)
    keys = pickles.load(file, {})
    names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not names or sorted(keys) != sorted(found):
        raise ValueError("its list of storages does not match its tensors")
    end = file.seek(0, io.SEEK_CUR)
    size = file.seek(0, io.SEEK_END) if size is None else size
    for key in keys:
        file.seek(end)
        (count,) = struct.unpack("<q", file.read(8).ljust(8, b"\xff"))
        dtype, expected, _ = found[key]
        found[key][2], end = end + 8, end + 8 + expected * dtype.itemsize
        if count != expected or end > size:
            raise ValueError(f"the storage {key[:100]!r} is incomplete")
    return content


def _slice(file: BinaryIO, path: pathlib.Path | None, place: list[Any]) -> np.ndarray:
    dtype, count, begin = place
    if path is not None:
        return mapped(path, begin, dtype, count)
    file.seek(begin)
    return np.frombuffer(file.read(count * dtype.itemsize), dtype)
