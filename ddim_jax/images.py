"""Pictures and arrays on disk. All images are uint8 (H, W, C), C = 1 (grey) or 3; a file appears whole or not
at all.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from ddim_jax import files

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


def open_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by their names. One that is stored uncompressed, as `write_npz` stores it, stays on the
    disk until it is indexed, so it may be larger than the memory.

    Raises zipfile.BadZipFile or ValueError for what is damaged, or is not plain arrays.
    """
    with zipfile.ZipFile(path) as archive:
        return {
            member.filename.removesuffix(".npy"): _open_array(path, archive, member)
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }


def _open_array(path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        mapped = member.compress_type == zipfile.ZIP_STORED and version == (1, 0)
        if mapped:
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            header = file.tell()
        if not mapped or fortran or dtype.hasobject or 0 in shape:
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    with open(path, "rb") as file:  # what the file says of the member, where it lies, is as long as two numbers in it
        file.seek(member.header_offset + 26)
        start = file.tell() + 4 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    if start + header + int(np.prod(shape)) * dtype.itemsize > os.path.getsize(path):
        raise ValueError(f"{member.filename} is cut off")
    return np.memmap(path, dtype, "r", start + header, shape)


def _pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
