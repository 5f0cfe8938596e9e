"""Data sets as random-access sources of uint8 images."""

from __future__ import annotations

import concurrent.futures
import functools
import math
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from ddim_jax import registry
from ddim_jax.data import prepared
from ddim_jax.data.image_folder import RECORD, FolderSource
from ddim_jax.data.prepared import Crop, PreparedSource
from ddim_jax.data.source import Batch, Source, check_labels
from ddim_jax.utils import files, ranges
from ddim_jax.utils.files import shown
from ddim_jax.utils.images import CROPS, check_crop_and_resize, crop_and_resize, open_npz

SPLITS = ("train", "test")
RESULT = "samples.npz"  # in the output folder of `ddim_jax.sample`


class ArraySource:
    """A data set from arrays in memory or mapped from a file.

    images: (N, H, W, C) uint8, N >= 1. labels: (N,) integers from 0 to MOST_CLASSES - 1, or None. ValueError otherwise.
    """

    crop = "none"
    jpegs = 0
    instant = True

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(f"images must be uint8 (N, H, W, C), got {images.dtype} {images.shape}")
        if 0 in images.shape:
            raise ValueError(f"images must have pixels, got shape {images.shape}")
        if labels is not None:
            if labels.shape != images.shape[:1]:
                raise ValueError(f"labels must have the shape {images.shape[:1]} of the images, got {labels.shape}")
            check_labels(labels)
        self.images = images
        self.labels = None if labels is None else labels.astype(np.int32)
        self.image_shape = images.shape[1:]
        self.num_classes = 0 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return Batch(self.images[indices], None if self.labels is None else self.labels[indices])


def _printable(text: Any) -> str:
    return files.printable(str(text))


def digits(path: str, split: str) -> ArraySource:
    """The 1,797 handwritten digits of scikit-learn, 8x8x1. The grey levels 0..16 are scaled to 0..255.

    The test split has every fifth image: 359 images; the train split has the other 1,438. path is not used.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    chosen = (np.arange(len(images)) % 5 == 4) == (split == "test")
    return ArraySource(images[chosen], labels[chosen])


def folder(
    path: str, split: str, image_size: int | None = None, crop: str = "center", resize: str = "lanczos"
) -> FolderSource | ArraySource:
    """The image files in the subfolder `path/train` or `path/test`, or in `path` if it has no such subfolder.

    For an output folder of `ddim_jax.sample`, the images in its samples.npz, or else in its png/.

    image_size: the height and width to which each image is cropped and resized, by `images.crop_and_resize` with the
    arguments `crop` and `resize`. None: images are not changed, and all must have one size.
    """
    root = pathlib.Path(path)
    check_crop_and_resize(1 if image_size is None else image_size, crop, resize)
    if not path or not root.is_dir():
        raise ValueError(f"config.data.path: data set 'folder' expects a folder, got {shown(path)}")
    if (root / RESULT).is_file():
        if image_size is not None:
            raise ValueError(
                f"image_size: must be None for the images of {_printable(root / RESULT)}, got {image_size}"
            )
        return npz(str(root / RESULT), split)
    if (root / RECORD).exists():
        if not (root / "png").is_dir():
            raise ValueError(f"{_printable(path)} is the output folder of a command, and holds no {RESULT}")
        root /= "png"
    transform = None
    if image_size is not None:
        description = f"{CROPS[crop]}, to {image_size}x{image_size} ({resize})"
        arguments = {"image_size": image_size, "crop": crop, "resize": resize}
        transform = Crop(description, functools.partial(crop_and_resize, **arguments))
    return FolderSource(root / split if (root / split).is_dir() else root, transform)


def npz(path: str, split: str) -> ArraySource:
    """The images of an .npz, uint8 (N, H, W, C) or (N, H, W), and its labels (N,) if it has any.

    Images are `{split}_images`, else `images`, else `arr_0`; labels are `{split}_labels`, else `labels`, else `arr_1`.
    Uncompressed images are mapped from the file.
    """
    if not path or not pathlib.Path(path).is_file():
        raise ValueError(f"config.data.path: data set 'npz' expects a file, got {shown(path)}")
    arrays = open_npz(pathlib.Path(path), verify=True)
    first = lambda names: next((arrays[name] for name in names if name in arrays), None)
    images = first([f"{split}_images", "images", "arr_0"])
    labels = first([f"{split}_labels", "labels", "arr_1"])
    if images is None:
        raise ValueError(
            f"{path} holds none of {split}_images, images, arr_0; it holds {_printable(', '.join(arrays))[:200]}"
        )
    try:
        return ArraySource(images[..., None] if images.ndim == 3 else images, labels)
    except ValueError as error:
        raise ValueError(f"{_printable(path)}: {error}") from error


def tfds(path: str, split: str) -> PreparedSource:
    """A data set that tensorflow-datasets has prepared, with images of one size. path is its name there."""
    return PreparedSource(split, {path: prepared.WHOLE})


def cifar10(path: str, split: str) -> PreparedSource:
    """CIFAR-10, 32x32x3: 50,000 training and 10,000 test images. path is not used."""
    return _published("cifar10", split, {"cifar10": prepared.WHOLE})


def celeba64(path: str, split: str) -> PreparedSource:
    """CelebA with the crop of the paper: 128x128 around (89, 121), resized to 64x64. path is not used."""
    return _published("celeba64", split, {"celeba64": prepared.CELEBA_DONE, "celeb_a": prepared.CELEBA})


def lsun_bedroom256(path: str, split: str) -> PreparedSource:
    """LSUN bedroom: the largest centred square, resized to 256x256. path is not used."""
    return _published("lsun_bedroom256", split, {"lsun_bedroom256": prepared.LSUN, "lsun/bedroom": prepared.LSUN})


def lsun_church256(path: str, split: str) -> PreparedSource:
    """LSUN church (outdoor): the largest centred square, resized to 256x256. path is not used."""
    return _published("lsun_church256", split, {"lsun_church256": prepared.LSUN, "lsun/church_outdoor": prepared.LSUN})


def _published(name: str, split: str, crops: Mapping[str, Crop]) -> PreparedSource:
    return PreparedSource(split, crops, f"python -m ddim_jax.prepare --data {name} --from FOLDER_OF_PUBLISHED_FILES")


DATASETS = {  # (path, split, and the options in the signature) -> Source
    "digits": digits,
    "folder": folder,
    "npz": npz,
    "tfds": tfds,
    "cifar10": cifar10,
    "celeba64": celeba64,
    "lsun_bedroom256": lsun_bedroom256,
    "lsun_church256": lsun_church256,
}


def load(
    name: str, path: str = "", split: str = "train", options: Mapping[str, Any] = types.MappingProxyType({})
) -> Source:
    """Loads a data set.

    name: a name in DATASETS, or "package.module:function" for a function (path, split, ...) -> Source. path: its file
    or folder. split: "train" or "test". options: the further arguments of the function, such as image_size for
    "folder". ValueError if the data set does not exist or cannot be read, if the function does not take an option
    (with the nearest name), and if the value of an option has another type than annotated.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    try:
        if path and pathlib.Path(path).exists():
            files.check_regular(pathlib.Path(path))
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    source = _build(registry.resolve(DATASETS, name), path, split, options)
    missing = [field for field in Source.__annotations__ if not hasattr(source, field)]
    if missing:
        raise ValueError(f"{name} must return a Source, got {type(source).__name__} without {missing[0]}")
    return source


def _build(factory: Callable[..., Source], path: str, split: str, options: Mapping[str, Any]) -> Source:
    """factory(path, split, **options), with checked options."""
    parameters, checked = ranges.parameters(factory), dict(options)
    for name in options:
        kind = parameters[name].kind if name in parameters else Any
        try:
            checked[name] = options[name] if kind is Any else ranges.typed(kind, options[name])
        except ValueError as error:
            raise ValueError(f"options.{name}: {error}") from error
    of_split = functools.partial(factory, path, split)  # its signature has the options only
    of_split.__name__ = getattr(factory, "__name__", type(factory).__name__)
    return registry.build(of_split, {"path": path, "split": split}, checked)


def in_memory(source: Source, chunk: int = 500) -> ArraySource:
    """Reads all images of a source into memory, by two threads: image decoders release the GIL. chunk: images per call
    of the source. ValueError if they do not fit into memory.
    """
    files.check_memory(len(source) * math.prod(source.image_shape), f"{len(source)} images")
    chunks = [np.arange(begin, min(begin + chunk, len(source))) for begin in range(0, len(source), chunk)]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        batches = threads.map(source.__getitem__, chunks)
        images, labels = np.empty((len(source), *source.image_shape), np.uint8), []
        for index, batch in zip(chunks, tqdm(batches, "reading", len(chunks), unit=f"x {chunk} images"), strict=True):
            images[index] = batch.images
            labels.append(batch.labels)
    copy = ArraySource(images, np.concatenate(labels) if source.num_classes else None)
    copy.crop, copy.jpegs, copy.num_classes = source.crop, source.jpegs, source.num_classes
    return copy
