"""The image files of a folder as a data set."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ddim_jax.data.prepared import Crop
from ddim_jax.data.source import Batch
from ddim_jax.utils.files import printable

JPEG_SUFFIXES = (".jpg", ".jpeg")
IMAGE_SUFFIXES = (".png", *JPEG_SUFFIXES, ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # no others: Pillow runs external programs for some formats
MODES = ("L", "1", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # at most eight bits per channel
RECORD = "run.json"  # in the output folder of a command


class FolderSource:
    """A data set from the image files in a folder and its subfolders, sorted by path. It has no labels. Files are
    decoded on access. Symbolic links to folders are not followed.
    """

    num_classes = 0
    instant = False

    def __init__(self, folder: pathlib.Path, crop: Crop | None = None):
        """crop: how each image is cropped and resized; None: not at all, and all images must have one size. ValueError
        if the folder holds no image files, or if a file with the name of an image is not one.
        """
        self.files = sorted(_image_files(folder))
        if not self.files:
            raise ValueError(f"{printable(str(folder))} holds no image file ({', '.join(IMAGE_SUFFIXES)})")
        self.jpegs = sum(file.suffix.lower() in JPEG_SUFFIXES for file in self.files)
        self.crop = "none" if crop is None else crop.description
        self._apply = None if crop is None else crop.apply
        self.image_shape = self._read(self.files[0], None).shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return Batch(np.stack([self._read(self.files[i], self.image_shape) for i in indices]), None)

    def _read(self, file: pathlib.Path, shape: tuple[int, int, int] | None) -> np.ndarray:
        """The image in a file, cropped and resized. ValueError, naming the file, if its shape is not `shape`; None for
        any shape.
        """
        if self._apply is None:
            return _decode(file, shape)
        pixels = _decode(file, None)
        try:
            image = self._apply(pixels)
        except ValueError as error:
            raise ValueError(f"{printable(str(file))}: {error}") from error
        if shape is not None and image.shape != shape:
            channels = f"{image.shape[-1]} channels, the first image of its folder {shape[-1]}"
            raise ValueError(f"{printable(str(file))} has {channels}: all must be grey, or all in color")
        return image


def _image_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files in a folder that have the suffix of an image. ValueError for a pipe, a device or a broken link with
    such a name, and for an output folder of ddim_jax, because its image files may be grids of images.
    """
    for where, _, names in os.walk(folder):
        if RECORD in names:
            raise ValueError(f"{printable(str(where))} is the output folder of a command, not a folder of images")
        if {"config.json", "metrics.jsonl"} <= {*names}:
            raise ValueError(f"{printable(str(where))} is the workdir of a training run, not a folder of images")
        for name in names:
            file = pathlib.Path(where, name)
            if file.suffix.lower() in IMAGE_SUFFIXES:
                if not file.is_file():
                    raise ValueError(f"{printable(str(file))} is not a regular file")
                yield file


def _decode(file: pathlib.Path, shape: tuple[int, int, int] | None) -> np.ndarray:
    """The image in a file, uint8 (H, W, C) with C = 1 for a grey image, else 3. ValueError, naming the file, if it is
    damaged, too large, or of more than eight bits per channel, and if its shape is not `shape`; None for any shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                height, width = image.height, image.width
                if image.mode not in MODES:
                    raise ValueError(f"it has more than eight bits per channel (mode {image.mode})")
                if shape is None or (height, width) == shape[:2]:  # else decoding it would waste memory
                    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
                    pixels = pixels.reshape(height, width, -1)
                    decoded = pixels.shape
                else:
                    decoded = height, width, len(image.getbands())
    except UNREADABLE as error:
        raise ValueError(f"{printable(str(file))} cannot be read as an image: {printable(str(error))}") from error
    if shape is not None and decoded != shape:
        sizes = f"{'x'.join(map(str, decoded))}, the first image of its folder {'x'.join(map(str, shape))}"
        hint = "; the option image_size resizes all images to one size" if decoded[:2] != shape[:2] else ""
        raise ValueError(f"{printable(str(file))} is {sizes}{hint}")
    return pixels


# The exceptions of Pillow for damaged files, and for images with more pixels than its limit.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
