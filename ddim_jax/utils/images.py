"""Pictures and arrays on disk. All images are uint8 (H, W, C), C = 1 (grey) or 3; a file appears whole or not
at all.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from ddim_jax.utils import files

TILE = 48  # images smaller than this are enlarged by a whole factor in pictures for people


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images (N, H, W, C) as one picture, row by row on white. columns: default makes it about square."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    factor = max(1, TILE // height)
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor + gap, width * factor + gap
    picture = np.full((rows * height + gap, columns * width + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + gap, i % columns * width + gap
        picture[top : top + image.shape[0], left : left + image.shape[1]] = image
    return picture


def write_png(path: pathlib.Path, image: np.ndarray) -> None:
    with files.replacing(path) as file:
        _pil(image).save(file, format="PNG")


def write_gif(path: pathlib.Path, frames: Sequence[np.ndarray], milliseconds: int = 80) -> None:
    """An endless animation that rests on its last frame."""
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    with files.replacing(path) as file:
        _pil(frames[0]).save(
            file,
            format="GIF",
            save_all=True,
            append_images=[_pil(frame) for frame in frames[1:]],
            duration=durations,
            loop=0,
        )


Pieces = Callable[[], Iterable[Mapping[str, np.ndarray]]]


def write_npz(path: pathlib.Path, length: int, parts: Pieces) -> None:
    """Arrays (N, ...) by their names, N = length. Images as uint8 `arr_0` with labels as `arr_1` are the layout that
    the ADM evaluation suite reads.

    parts: gives consecutive pieces of all arrays, anew for each array, so that none is ever whole in memory.
    ValueError if they do not make up the length.
    """
    with files.replacing(path) as file:
        save_npz(file, length, parts)


def save_npz(file: BinaryIO, length: int, parts: Pieces, comment: bytes = b"") -> None:
    """`write_npz` into an open file. comment: of the zip file, at most 65,535 bytes; readers of arrays ignore it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.comment = comment
        for name, piece in next(iter(parts())).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                descr = np.lib.format.dtype_to_descr(piece.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": (length, *piece.shape[1:])}
                np.lib.format.write_array_header_1_0(member, header)
                written = 0
                for part in parts():
                    member.write(np.ascontiguousarray(part[name]).data)
                    written += len(part[name])
            if written != length:
                raise ValueError(f"{name}: the parts hold {written} items, not {length}")


def open_npz(path: pathlib.Path, verify: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an .npz by their names. One that is stored uncompressed, as `write_npz` stores it, stays on the
    disk until it is indexed, so it may be larger than the memory.

    verify: read these too, to compare their checksums; those of compressed arrays always are. ValueError for what is
    no regular file, is damaged, is not plain arrays, or unpacks to more than the memory.
    """
    with _npz(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two of its arrays have the same name")
        packed = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
        files.check_memory(packed, "what is compressed in it")
        return {member.filename.removesuffix(".npy"): _open_array(path, archive, member, verify) for member in members}


def npz_names(path: pathlib.Path) -> list[str]:
    """The names of the arrays of an .npz. ValueError if it is none."""
    with _npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


@contextlib.contextmanager
def _npz(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever zipfile, zlib and NumPy raise for what is wrong with it becomes a ValueError."""
    files.check_regular(path)
    try:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path) as archive:  # of headers that are odd
            yield archive
    except Exception as error:
        reason = "it is too deeply nested" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise ValueError(files.printable(f"{path} cannot be read as an .npz: {reason[:200]}")) from error


HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _open_array(path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, verify: bool) -> np.ndarray:
    with archive.open(member) as file:
        if (version := np.lib.format.read_magic(file)) not in HEADERS:
            raise ValueError(f"{member.filename} is in version {version} of the format, which plain arrays do not need")
        shape, fortran, dtype = HEADERS[version](file)
        header = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds objects, which only allow_pickle reads")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or header + size != member.file_size:
            raise ValueError(f"{member.filename} has {member.file_size - header} bytes, not the {size} of its header")
        if member.compress_type != zipfile.ZIP_STORED or fortran or size == 0:
            files.check_memory(size, member.filename)
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
        while verify and file.read(1 << 24):
            pass
    with open(path, "rb") as file:  # what the file says of the member, where it lies, is as long as two numbers in it
        file.seek(member.header_offset + 26)
        start = file.tell() + 4 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    if start + header + size > os.path.getsize(path):
        raise ValueError(f"{member.filename} is cut off")
    return np.memmap(path, dtype, "r", start + header, shape)


def _pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
