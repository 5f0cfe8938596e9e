"""Image files and .npz files, and the crop and resize of images. All images are uint8 (H, W, C) with C = 1 (grey) or 3.
Files are written atomically: a file that exists is complete.
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

from ddim_jax import checks
from ddim_jax.utils import files

TILE = 48  # pixels: `grid` enlarges smaller images by an integer factor
MAX_IMAGE_SIZE = 1 << 13

CROPS = {"center": "centre square", "none": "none"}  # name -> text for `data.Source.crop`
RESIZE_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}


def check_crop_and_resize(image_size: int, crop: str, resize: str) -> None:
    """ValueError, naming the argument, for arguments that `crop_and_resize` does not take."""
    checks.integer("image_size", image_size, 1, MAX_IMAGE_SIZE)
    checks.lookup(CROPS, crop, "crop")
    checks.lookup(RESIZE_FILTERS, resize, "resize")


def crop_and_resize(image: np.ndarray, image_size: int, crop: str = "center", resize: str = "lanczos") -> np.ndarray:
    """Crops an image to a square and resizes it: uint8 (H, W, C) -> uint8 (image_size, image_size, C).

    crop: "center" for the largest centred square, of side min(H, W); "none" for no crop, which requires H = W. resize:
    a filter of Pillow, a name in RESIZE_FILTERS; all except "nearest" are antialiased when they reduce the size. An
    image that has the size after the crop is not resized. ValueError for other arguments and if H != W with "none".
    """
    check_crop_and_resize(image_size, crop, resize)
    height, width, channels = image.shape
    if crop == "none" and height != width:
        raise ValueError(f"crop 'none' expects square images, got {height}x{width}; crop 'center' makes them square")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = _pil(image[top : top + side, left : left + side])
    resized = np.asarray(square.resize((image_size, image_size), RESIZE_FILTERS[resize]))
    return resized.reshape(image_size, image_size, channels)


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arranges images (N, H, W, C) in one picture, row by row, on white.

    columns: the number of columns; default: about as many as rows. gap: pixels between images.
    """
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
    """Writes an image (H, W, C) as PNG."""
    with files.replacing(path) as file:
        _pil(image).save(file, format="PNG")


def write_gif(path: pathlib.Path, frames: Sequence[np.ndarray], milliseconds: int = 80) -> None:
    """Writes frames (H, W, C) as an animation that repeats without end. The last frame is displayed for 2 seconds."""
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
    """Writes named arrays (length, ...) as an uncompressed .npz. The ADM evaluation suite reads images as uint8 `arr_0`
    and labels as `arr_1`.

    parts: returns an iterable over consecutive pieces of all arrays. It is called once for each array, so that no
    complete array is in memory. ValueError if the pieces do not have `length` items in total.
    """
    with files.replacing(path) as file:
        save_npz(file, length, parts)


def save_npz(file: BinaryIO, length: int, parts: Pieces, comment: bytes = b"") -> None:
    """`write_npz` to an open file. comment: the comment of the zip file, at most 65,535 bytes; NumPy ignores it."""
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
                raise ValueError(f"{name}: the parts must have {length} items in total, got {written}")


def open_npz(path: pathlib.Path, verify: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name. An uncompressed array, as written by `write_npz`, is mapped from the file, so it
    may be larger than the memory.

    verify: also verify the CRCs of uncompressed arrays, which reads them once; those of compressed arrays are always
    verified. ValueError if the path is not a regular file, if the file is damaged, if it holds Python objects, or if
    the compressed arrays do not fit into memory.
    """
    with _npz(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if len({member.filename for member in members}) < len(members):
            raise ValueError("two of its arrays have the same name")
        unpacked_bytes = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
        files.check_memory(unpacked_bytes, "its compressed arrays")
        return {member.filename.removesuffix(".npy"): _open_array(path, archive, member, verify) for member in members}


def npz_names(path: pathlib.Path) -> list[str]:
    """The names of the arrays of an .npz. ValueError if it cannot be read."""
    with _npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


@contextlib.contextmanager
def _npz(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """The open archive. All exceptions of zipfile, zlib and NumPy become a ValueError."""
    files.check_regular(path)
    try:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path) as archive:  # about unusual headers
            yield archive
    except Exception as error:
        reason = "it is too deeply nested" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise ValueError(files.printable(f"{path} cannot be read as an .npz: {reason[:200]}")) from error


HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _open_array(path: pathlib.Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, verify: bool) -> np.ndarray:
    with archive.open(member) as file:
        if (version := np.lib.format.read_magic(file)) not in HEADERS:
            raise ValueError(f"{member.filename} must be in version {' or '.join(map(str, HEADERS))}, got {version}")
        shape, fortran, dtype = HEADERS[version](file)
        header = file.tell()
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects, which only NumPy's allow_pickle reads")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or header + size != member.file_size:
            raise ValueError(
                f"{member.filename} must have {size} bytes by its header, got {member.file_size - header} bytes"
            )
        if member.compress_type != zipfile.ZIP_STORED or fortran or size == 0:
            files.check_memory(size, member.filename)
            return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")
        while verify and file.read(1 << 24):
            pass
    with open(path, "rb") as file:  # the local header ends with a name and extra data; bytes 26..30 are their lengths
        file.seek(member.header_offset + 26)
        start = file.tell() + 4 + sum(np.frombuffer(file.read(4), "<u2").tolist())
    if start + header + size > os.path.getsize(path):
        raise ValueError(f"{member.filename} is truncated")
    return np.memmap(path, dtype, "r", start + header, shape)


def _pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
