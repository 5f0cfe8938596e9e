"""Data sets that tensorflow-datasets, or `preparing`, has prepared: random access to their array_record files, without
TensorFlow and without a network connection.

The folder of the data sets is $TFDS_DATA_DIR, by default ~/tensorflow_datasets, as in tensorflow-datasets.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddim_jax.data.source import Batch, check_labels
from ddim_jax.utils import files
from ddim_jax.utils.images import crop_and_resize

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # name -> possible names in a data set


class Crop(NamedTuple):
    """The crop and resize of published images."""

    description: str  # for `Source.crop`
    apply: Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, C) -> uint8 (H', W', C) of a fixed size


def celeba(image: np.ndarray) -> np.ndarray:
    """The paper's crop of an aligned CelebA image (218, 178, 3): 128x128 around (89, 121), resized to 64x64."""
    face = Image.fromarray(image).crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.asarray(face.resize((64, 64), Image.Resampling.BILINEAR))


def centre(image: np.ndarray, size: int = 256) -> np.ndarray:
    """The largest centred square of an image, resized to size x size."""
    return crop_and_resize(image, size, "center", "lanczos")


WHOLE = Crop("none", lambda image: image)
CELEBA = Crop("128x128 around (89, 121), to 64x64", celeba)
CELEBA_DONE = CELEBA._replace(apply=WHOLE.apply)  # the images were cropped when the data set was prepared
LSUN = Crop("centre square, to 256x256", centre)


class PreparedSource:
    """A split of a prepared data set: its first image feature, and its first class label if it has one."""

    instant = False

    def __init__(self, split: str, crops: Mapping[str, Crop], how: str | None = None):
        """split: "train" or "test". crops: {name in tensorflow-datasets: crop of its images}, with names such as
        "cifar10", "lsun/church_outdoor", "cifar10:3.0.2"; the first one that is prepared is read. how: the command that
        prepares the data set, for messages. ValueError if none is prepared, or if it is damaged.
        """
        import tensorflow_datasets as tfds  # optional, and its import takes half a second

        name = next((name for name in crops if _versions(name)), next(iter(crops)))
        crop = crops[name]
        folder = _folder(name, how)
        _check_classes(folder)
        with _reading(folder):
            builder = tfds.builder_from_directory(str(folder))
            features = builder.info.features
        keys = lambda kind: [key for key, feature in features.items() if isinstance(feature, kind)]
        images, labels = keys(tfds.features.Image), keys(tfds.features.ClassLabel)
        if not images:
            raise ValueError(f"data set {name!r} has no image feature, it has {_listed(features)}")
        split_name = next((name for name in SPLITS[split] if name in builder.info.splits), None)
        if split_name is None:
            raise ValueError(f"data set {name!r} has no {split} split, it has {_listed(builder.info.splits)}")
        self._name, self._crop = f"{name}, {split_name}", crop
        self._image, self._label = images[0], labels[0] if labels else None
        with _reading(folder):
            self._records = builder.as_data_source(split=split_name)
        self.crop, self.jpegs = crop.description, 0
        self.num_classes = features[self._label].num_classes if labels else 0
        self.image_shape = self[np.array([0])].images.shape[1:]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        try:
            records = self._records.__getitems__([int(i) for i in indices])
        except Exception as error:  # array_record, the record parser and the image decoder raise different types
            first = _first_unreadable(self._records, indices)
            raise ValueError(f"a record of {self._name} cannot be read ({first}): {_reason(error)}") from error
        images = [self._crop.apply(record[self._image]) for record in records]
        for i, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(f"image {i} of {self._name} is {_size(image)}, others are {_size(images[0])}")
        if self._label is None:
            return Batch(np.stack(images), None)
        labels = np.array([record[self._label] for record in records])
        check_labels(labels, self.num_classes, indices)
        return Batch(np.stack(images), labels.astype(np.int32))


def _check_classes(folder: pathlib.Path) -> None:
    """ValueError if features.json names a class of another package: tensorflow-datasets would import it."""
    if not (folder / "features.json").is_file():
        return
    stack = [files.read_json(folder / "features.json")]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            name = value.get("pythonClassName", "")
            if name and not str(name).startswith("tensorflow_datasets."):
                raise ValueError(f"{folder} must have features of tensorflow_datasets, got {files.shown(name)}")
            value = [*value.values()]
        stack += value if isinstance(value, list) else []


def _listed(names: Iterable[str]) -> str:
    return files.printable(", ".join(map(str, names)))[:200]


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """Turns the exceptions of tensorflow-datasets, protobuf and array_record for a damaged folder into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder} cannot be read as a data set: {_reason(error)}; prepare a new copy") from error


def _reason(error: Exception) -> str:
    return files.printable((str(error).splitlines() or [type(error).__name__])[0][:200])


def _first_unreadable(records, indices: np.ndarray) -> str:
    for i in indices:
        try:
            records.__getitems__([int(i)])
        except Exception:
            return f"number {i}"
    return "each can be read alone"


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape))


def root() -> pathlib.Path:
    """The folder of the prepared data sets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / "tensorflow_datasets")


def _versions(name: str) -> dict[tuple[int, ...], pathlib.Path]:
    """The folders of all prepared versions of a data set."""
    home = root() / name.partition(":")[0]
    return {
        tuple(map(int, path.name.split("."))): path
        for path in (home.iterdir() if name and home.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    }


def _folder(name: str, how: str | None) -> pathlib.Path:
    """The folder of the latest prepared version. ValueError, with the command that prepares one, if none can be read.

    name: "NAME" or "NAME:VERSION". how: the command, None for that of tensorflow-datasets.
    """
    plain, _, version = name.partition(":")
    versions = _versions(name)
    matching = {key: path for key, path in versions.items() if version in ("", path.name)}
    prepare = how or f"pip install 'ddim-jax[prepare]' && tfds build {plain or 'NAME'} --file_format=array_record"
    if not matching:
        others = f", only {', '.join(path.name for path in versions.values())}" if versions else ""
        raise ValueError(f"data set {name!r} is not prepared in {root()}{others}: {prepare}")
    path = matching[max(matching)]
    info = files.read_json(path / "dataset_info.json")
    file_format = info.get("fileFormat", "tfrecord") if isinstance(info, dict) else "unknown"
    if file_format != "array_record":
        got = files.printable(str(file_format)[:100])
        raise ValueError(f"{path} must be in the format array_record, for random access, got {got}: {prepare}")
    return path
