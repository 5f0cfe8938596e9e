"""Data sets that tensorflow-datasets, or `preparing`, has prepared, read as they lie on the disk: array_record files,
at random, without TensorFlow and without a network.

They are looked for in $TFDS_DATA_DIR, else ~/tensorflow_datasets, as tensorflow-datasets does.
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

SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # what others call them


class Cut(NamedTuple):
    """What is made of an image as it is published."""

    words: str
    apply: Callable[[np.ndarray], np.ndarray]  # (H, W, C) uint8 -> the same kind, of one size


def celeba(image: np.ndarray) -> np.ndarray:
    """The paper's crop of an aligned CelebA image (218, 178, 3): 128x128 around (89, 121), resized to 64x64."""
    face = Image.fromarray(image).crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.asarray(face.resize((64, 64), Image.Resampling.BILINEAR))


def centre(image: np.ndarray, size: int = 256) -> np.ndarray:
    """The middle square, resized to size x size where it is larger or smaller."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(image).crop((left, top, left + side, top + side))
    return np.asarray(square if side == size else square.resize((size, size), Image.Resampling.LANCZOS))


WHOLE = Cut("none", lambda image: image)
CELEBA = Cut("128x128 around (89, 121), to 64x64", celeba)
CELEBA_DONE = CELEBA._replace(apply=WHOLE.apply)  # it was made when they were prepared
LSUN = Cut("centre square, to 256x256", centre)


class PreparedSource:
    """A split of a prepared data set: its first image feature, and its first class label where it has one."""

    instant = False

    def __init__(self, split: str, cuts: Mapping[str, Cut], how: str | None = None):
        """split: "train" or "test". cuts: names as tensorflow-datasets has them, "cifar10", "lsun/church_outdoor",
        "cifar10:3.0.2", each with what is made of its images; the first that is prepared here is read. how: what
        prepares it. ValueError if there is none, or if it is damaged.
        """
        import tensorflow_datasets as tfds  # half a second, and only those who use it have to have it

        name = next((name for name in cuts if _versions(name)), next(iter(cuts)))
        cut = cuts[name]
        folder = _folder(name, how)
        _check_classes(folder)
        with _reading(folder):
            builder = tfds.builder_from_directory(str(folder))
            features = builder.info.features
        keys = lambda kind: [key for key, feature in features.items() if isinstance(feature, kind)]
        images, labels = keys(tfds.features.Image), keys(tfds.features.ClassLabel)
        if not images:
            raise ValueError(f"data set {name!r} has no image feature, it has {_listed(features)}")
        found = next((called for called in SPLITS[split] if called in builder.info.splits), None)
        if found is None:
            raise ValueError(f"data set {name!r} has no {split} split, it has {_listed(builder.info.splits)}")
        self._name, self._cut = f"{name}, {found}", cut
        self._image, self._label = images[0], labels[0] if labels else None
        with _reading(folder):
            self._records = builder.as_data_source(split=found)
        self.crop, self.jpegs = cut.words, 0
        self.num_classes = features[self._label].num_classes if labels else 0
        self.image_shape = self[np.array([0])].images.shape[1:]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        try:
            records = self._records.__getitems__([int(i) for i in indices])
        except Exception as error:  # array_record, the parser of records and the decoder of images each have their own
            bad = _first_bad(self._records, indices)
            raise ValueError(f"a record of {self._name} cannot be read ({bad}): {_reason(error)}") from error
        images = [self._cut.apply(record[self._image]) for record in records]
        for i, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(f"image {i} of {self._name} is {_size(image)}, others are {_size(images[0])}")
        if self._label is None:
            return Batch(np.stack(images), None)
        labels = np.array([record[self._label] for record in records])
        check_labels(labels, self.num_classes, indices)
        return Batch(np.stack(images), labels.astype(np.int32))


def _check_classes(folder: pathlib.Path) -> None:
    """ValueError if the description of the features names a class of another package: that would be imported."""
    if not (folder / "features.json").is_file():
        return
    waiting = [files.read_json(folder / "features.json")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            name = value.get("pythonClassName", "")
            if name and not str(name).startswith("tensorflow_datasets."):
                raise ValueError(f"{folder} has features of another package, {files.shown(name)}")
            value = [*value.values()]
        waiting += value if isinstance(value, list) else []


def _listed(names: Iterable[str]) -> str:
    return files.printable(", ".join(map(str, names)))[:200]


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
    """Whatever tensorflow-datasets, protobuf and array_record raise for a damaged folder becomes a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{folder} cannot be read as a data set: {_reason(error)}; prepare it again") from error


def _reason(error: Exception) -> str:
    return files.printable((str(error).splitlines() or [type(error).__name__])[0][:200])


def _first_bad(records, indices: np.ndarray) -> str:
    for i in indices:
        try:
            records.__getitems__([int(i)])
        except Exception:
            return f"number {i}"
    return "not always"


def _size(image: np.ndarray) -> str:
    return "x".join(map(str, image.shape))


def root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / "tensorflow_datasets")


def _versions(name: str) -> dict[tuple[int, ...], pathlib.Path]:
    """The folders of all versions of a data set that are here."""
    home = root() / name.partition(":")[0]
    return {
        tuple(map(int, path.name.split("."))): path
        for path in (home.iterdir() if name and home.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    }


def _folder(name: str, how: str | None) -> pathlib.Path:
    """The folder of the latest version that is prepared; ValueError, with what to do, if there is none that can be
    read.
    """
    plain, _, version = name.partition(":")
    versions = _versions(name)
    found = {key: path for key, path in versions.items() if version in ("", path.name)}
    prepare = how or f"pip install 'ddim-jax[prepare]' && tfds build {plain or 'NAME'} --file_format=array_record"
    if not found:
        others = f", only {', '.join(path.name for path in versions.values())}" if versions else ""
        raise ValueError(f"data set {name!r} is not prepared in {root()}{others}: {prepare}")
    path = found[max(found)]
    info = files.read_json(path / "dataset_info.json")
    kept = info.get("fileFormat", "tfrecord") if isinstance(info, dict) else "unknown"
    if kept != "array_record":
        raise ValueError(
            f"{path} is in the format {files.printable(str(kept)[:100])}, which cannot be read at random: {prepare}"
        )
    return path
