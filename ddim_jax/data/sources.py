"""Data sets as random-access sources of uint8 images."""

from __future__ import annotations

import concurrent.futures
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ddim_jax.data import prepared
from ddim_jax.data.prepared import PreparedSource
from ddim_jax.data.source import Batch, Source, check_labels
from ddim_jax.registry import resolve
from ddim_jax.utils import files
from ddim_jax.utils.files import shown
from ddim_jax.utils.images import open_npz

SPLITS = ("train", "test")
JPEG_SUFFIXES = (".jpg", ".jpeg")
IMAGE_SUFFIXES = (".png", *JPEG_SUFFIXES, ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow knows others, and runs other programs for some
MODES = ("L", "1", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # eight bits a channel at most
RECORD, RESULT = "run.json", "samples.npz"  # in the output folder of `ddim_jax.sample`


class ArraySource:
    """Images of an array, in memory or mapped from a file: (N, H, W, C) uint8. labels: (N,) whole numbers from 0, or
    None. ValueError otherwise.
    """

    crop = "none"
    jpegs = 0
    instant = True

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(f"images must be uint8 (N, H, W, C), got {images.dtype} {images.shape}")
        if 0 in images.shape:
            raise ValueError(f"images must have pixels, got {images.shape}")
        if labels is not None:
            if labels.shape != images.shape[:1]:
                raise ValueError(f"{len(images)} images have labels of shape {labels.shape}")
            check_labels(labels)
        self.images = images
        self.labels = None if labels is None else labels.astype(np.int32)
        self.image_shape = images.shape[1:]
        self.num_classes = 0 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return Batch(self.images[indices], None if self.labels is None else self.labels[indices])


class FolderSource:
    """A folder of image files of one size, in subfolders or not, sorted by path; decoded when asked for. No labels.
    Links to folders are not followed. ValueError where it holds no images, or anything that only looks like one.
    """

    num_classes = 0
    crop = "none"
    instant = False

    def __init__(self, folder: pathlib.Path):
        self.files = sorted(_image_files(folder))
        if not self.files:
            raise ValueError(f"{_shown(folder)} holds no image file ({', '.join(IMAGE_SUFFIXES)})")
        self.jpegs = sum(file.suffix.lower() in JPEG_SUFFIXES for file in self.files)
        self.image_shape = _decode(self.files[0], None).shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return Batch(np.stack([_decode(self.files[i], self.image_shape) for i in indices]), None)


def _image_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files in a folder whose names are those of images. ValueError for a pipe, a device or a broken link with such
    a name, and for pictures of many images, which a command of ddim_jax wrote.
    """
    for where, _, names in os.walk(folder):
        if RECORD in names:
            raise ValueError(f"{_shown(where)} is the output folder of a command, not a folder of images")
        if {"config.json", "metrics.jsonl"} <= {*names}:
            raise ValueError(f"{_shown(where)} is the workdir of a run, not a folder of images")
        for name in names:
            file = pathlib.Path(where, name)
            if file.suffix.lower() in IMAGE_SUFFIXES:
                if not file.is_file():
                    raise ValueError(f"{_shown(file)} is no regular file")
                yield file


def _decode(file: pathlib.Path, shape: tuple[int, int, int] | None) -> np.ndarray:
    """An image as (H, W, 1 or 3); grey stays grey. ValueError, naming the file, if it is broken, too large, of more
    than eight bits a channel, or not of that shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                height, width = image.height, image.width
                if image.mode not in MODES:
                    raise ValueError(f"it has more than eight bits a channel (mode {image.mode})")
                if shape is None or (height, width) == shape[:2]:  # else it is not worth the memory
                    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
                    pixels = pixels.reshape(height, width, -1)
                    found = pixels.shape
                else:
                    found = height, width, len(image.getbands())
    except UNREADABLE as error:
        raise ValueError(f"{_shown(file)} cannot be read as an image: {_shown(error)}") from error
    if shape is not None and found != shape:
        raise ValueError(
            f"{_shown(file)} is {'x'.join(map(str, found))}, the first image of its folder {'x'.join(map(str, shape))}"
        )
    return pixels


# What Pillow raises for files that are broken, and for pixels beyond its limit.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def _shown(text: Any) -> str:
    return files.printable(str(text))


def digits(path: str, split: str) -> ArraySource:
    """The 1,797 handwritten digits that scikit-learn carries, 8x8x1, their grey levels 0..16 spread over 0..255.

    Every fifth image is the test split: 1,438 to train on, 359 held out. path is not used.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    chosen = (np.arange(len(images)) % 5 == 4) == (split == "test")
    return ArraySource(images[chosen], labels[chosen])


def folder(path: str, split: str) -> FolderSource:
    """A folder of images: those in `path/train` or `path/test` where there is such a subfolder, else all of them.

    The output folder of `ddim_jax.sample` stands for its samples.npz, or for the images in its png/.
    """
    root = pathlib.Path(path)
    if not path or not root.is_dir():
        raise ValueError(f"data set 'folder' needs a folder in config.data.path, got {shown(path)}")
    if (root / RESULT).is_file():
        return npz(str(root / RESULT), split)
    if (root / RECORD).exists():
        if not (root / "png").is_dir():
            raise ValueError(f"{_shown(path)} is the output folder of a command, and holds no {RESULT}")
        root /= "png"
    return FolderSource(root / split if (root / split).is_dir() else root)


def npz(path: str, split: str) -> ArraySource:
    """An .npz of uint8 images (N, H, W, C) or (N, H, W), and labels (N,) if it has them.

    Images are `{split}_images`, else `images`, else `arr_0`; labels are `{split}_labels`, else `labels`, else `arr_1`.
    Images that are stored uncompressed stay on the disk until they are asked for.
    """
    if not path or not pathlib.Path(path).is_file():
        raise ValueError(f"data set 'npz' needs a file in config.data.path, got {shown(path)}")
    arrays = open_npz(pathlib.Path(path), verify=True)
    first = lambda names: next((arrays[name] for name in names if name in arrays), None)
    images = first([f"{split}_images", "images", "arr_0"])
    labels = first([f"{split}_labels", "labels", "arr_1"])
    if images is None:
        raise ValueError(
            f"{path} holds none of {split}_images, images, arr_0; it holds {_shown(', '.join(arrays))[:200]}"
        )
    try:
        return ArraySource(images[..., None] if images.ndim == 3 else images, labels)
    except ValueError as error:
        raise ValueError(f"{_shown(path)}: {error}") from error


def tfds(path: str, split: str) -> PreparedSource:
    """Any data set that tensorflow-datasets has prepared, with images of one size; path is its name there."""
    return PreparedSource(split, {path: prepared.WHOLE})


def cifar10(path: str, split: str) -> PreparedSource:
    """CIFAR-10, 32x32x3: 50,000 to train on, 10,000 to test. path is not used."""
    return _published("cifar10", split, {"cifar10": prepared.WHOLE})


def celeba64(path: str, split: str) -> PreparedSource:
    """CelebA as in the paper: 128x128 around (89, 121), resized to 64x64. path is not used."""
    return _published("celeba64", split, {"celeba64": prepared.CELEBA_DONE, "celeb_a": prepared.CELEBA})


def lsun_bedroom256(path: str, split: str) -> PreparedSource:
    """LSUN bedroom, the centre square at 256x256. path is not used."""
    return _published("lsun_bedroom256", split, {"lsun_bedroom256": prepared.LSUN, "lsun/bedroom": prepared.LSUN})


def lsun_church256(path: str, split: str) -> PreparedSource:
    """LSUN church (outdoor), the centre square at 256x256. path is not used."""
    return _published("lsun_church256", split, {"lsun_church256": prepared.LSUN, "lsun/church_outdoor": prepared.LSUN})


def _published(name: str, split: str, cuts: Mapping[str, prepared.Cut]) -> PreparedSource:
    return PreparedSource(split, cuts, f"python -m ddim_jax.prepare --data {name} --from FOLDER_OF_WHAT_IS_PUBLISHED")


DATASETS = {  # (path, split) -> Source
    "digits": digits,
    "folder": folder,
    "npz": npz,
    "tfds": tfds,
    "cifar10": cifar10,
    "celeba64": celeba64,
    "lsun_bedroom256": lsun_bedroom256,
    "lsun_church256": lsun_church256,
}


def load(name: str, path: str = "", split: str = "train") -> Source:
    """The data set called name in DATASETS, or that of a function of the user's, "package.module:function". split:
    "train" or "test". ValueError where there is no such data.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    try:
        if path and pathlib.Path(path).exists():
            files.check_regular(pathlib.Path(path))
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    source = resolve(DATASETS, name)(path, split)
    missing = [field for field in Source.__annotations__ if not hasattr(source, field)]
    if missing:
        raise ValueError(f"{name} must return a Source, of which it lacks {missing[0]}")
    return source


def in_memory(source: Source, chunk: int = 500) -> ArraySource:
    """A source, read once and held. By two threads: decoders let others run. ValueError if the memory is too small."""
    files.check_memory(len(source) * math.prod(source.image_shape), f"{len(source)} images")
    pieces = [np.arange(begin, min(begin + chunk, len(source))) for begin in range(0, len(source), chunk)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        read = threads.map(source.__getitem__, pieces)
        images, labels = np.empty((len(source), *source.image_shape), np.uint8), []
        for piece, batch in zip(pieces, tqdm(read, "reading", len(pieces), unit=f"x {chunk} images"), strict=True):
            images[piece] = batch.images
            labels.append(batch.labels)
    held = ArraySource(images, np.concatenate(labels) if source.num_classes else None)
    held.crop, held.jpegs, held.num_classes = source.crop, source.jpegs, source.num_classes
    return held
