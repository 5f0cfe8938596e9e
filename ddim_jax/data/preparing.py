"""Preparation of the paper's data sets: converts the files that their authors publish to array_record files for
`prepared.PreparedSource`, by tensorflow-datasets without TensorFlow.
"""

from __future__ import annotations

import io
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddim_jax.data import prepared
from ddim_jax.utils.files import check_regular, printable

Examples = Iterator[tuple[str, dict[str, Any]]]  # key -> features

LARGEST = 1 << 26  # the limit for the bytes of a file in an archive, and for the pixels of an image
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Recipe(NamedTuple):
    """How to prepare a data set."""

    version: str
    files: tuple[str, ...]  # the names of the published files
    where: str  # the site that publishes them
    splits: Callable[[pathlib.Path], dict[str, Examples]]  # folder of the published files -> {split: examples}
    features: Callable[[Any], dict[str, Any]]  # the module tfds.features -> features


def cifar10(folder: pathlib.Path) -> dict[str, Examples]:
    """Reads records of 3,073 bytes: the class, then the planes red, green and blue of 32x32 bytes."""

    def examples(split: str, files: list[str]) -> Examples:
        with tarfile.open(folder / "cifar-10-binary.tar.gz") as archive:
            members = [archive.getmember(f"cifar-10-batches-bin/{file}.bin") for file in files]
            _check_size(members[0].name, max(member.size for member in members))
            records = b"".join(archive.extractfile(member).read() for member in members)
        rows = np.frombuffer(records, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
        images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for i, (label, image) in enumerate(zip(rows[:, 0], images, strict=True)):
            key = f"{split}_{i:05d}"
            yield key, {"id": key, "image": Image.fromarray(image), "label": int(label)}

    batches = [f"data_batch_{i}" for i in range(1, 6)]
    return {"train": examples("train", batches), "test": examples("test", ["test_batch"])}


def celeba64(folder: pathlib.Path) -> dict[str, Examples]:
    """Crops the aligned faces as in the paper, for lossless storage."""
    lines = [line.split() for line in (folder / "list_eval_partition.txt").read_text().splitlines() if line.strip()]

    def examples(partition: str) -> Examples:
        with zipfile.ZipFile(folder / "img_align_celeba.zip") as archive:
            for name in (name for name, number in lines if number == partition):
                member = archive.getinfo(f"img_align_celeba/{name}")
                _check_size(name, member.file_size)
                face = _decoded(archive.read(member), name)
                yield name, {"image": Image.fromarray(prepared.celeba(face))}

    return {"train": examples("0"), "validation": examples("1"), "test": examples("2")}


def _check_size(name: str, size: int) -> None:
    """ValueError if a file in an archive is larger than any published one."""
    if size > LARGEST:
        raise ValueError(f"{name} must have at most {LARGEST} bytes, got {size}")


def _decoded(content: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"it must have at most {LARGEST} pixels, got {image.width}x{image.height}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def lsun(category: str) -> Callable[[pathlib.Path], dict[str, Examples]]:
    """Copies the bytes of the published images. They are cropped on access, by `prepared.LSUN`."""

    def splits(folder: pathlib.Path) -> dict[str, Examples]:
        try:
            import lmdb
        except ImportError as error:
            raise ValueError("LSUN is published as lmdb; to read it, pip install 'ddim-jax[lsun]'") from error

        def examples(path: pathlib.Path) -> Examples:
            with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin() as view:
                for key, content in view.cursor():
                    yield key.decode(), {"image": bytes(content)}

        suffixes = {"train": "train", "validation": "val"}
        return {split: examples(folder / f"{category}_{suffix}_lmdb") for split, suffix in suffixes.items()}

    return splits


def _lsun(category: str) -> Recipe:
    files = (f"{category}_train_lmdb", f"{category}_val_lmdb")
    any_size = lambda kinds: {"image": kinds.Image(shape=(None, None, 3))}
    return Recipe("1.0.0", files, "github.com/fyu/lsun, its zip files unpacked", lsun(category), any_size)


RECIPES = {  # name in DATASETS -> Recipe
    "cifar10": Recipe(
        "3.0.2",  # the version of the same data set in tensorflow-datasets
        ("cifar-10-binary.tar.gz",),
        "www.cs.toronto.edu/~kriz/cifar.html",
        cifar10,
        lambda kinds: {
            "id": kinds.Text(),
            "image": kinds.Image(shape=(32, 32, 3)),
            "label": kinds.ClassLabel(names=CIFAR10_CLASSES),
        },
    ),
    "celeba64": Recipe(
        "1.0.0",
        ("img_align_celeba.zip", "list_eval_partition.txt"),
        "mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        celeba64,
        lambda kinds: {"image": kinds.Image(shape=(64, 64, 3))},
    ),
    "lsun_bedroom256": _lsun("bedroom"),
    "lsun_church256": _lsun("church_outdoor"),
}


def prepare(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Prepares the data set with this name in RECIPES from the published files in a folder, and returns its folder. An
    interrupted preparation leaves nothing that `PreparedSource` reads. ValueError if a file is missing or damaged.
    """
    import tensorflow_datasets as tfds

    recipe = RECIPES[name]
    for file in recipe.files:
        if not (folder / file).exists():
            raise ValueError(f"{folder} holds no {file}; {name} needs {', '.join(recipe.files)} ({recipe.where})")
        check_regular(folder / file)

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(recipe.version)
        pkg_dir_path = folder  # the folder in which tensorflow-datasets looks for a description

        def _info(self):
            features = tfds.features.FeaturesDict(recipe.features(tfds.features))
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return recipe.splits(folder)

        def _generate_examples(self):
            raise NotImplementedError  # not called: `_split_generators` returns the examples

    Builder.name = name
    builder = Builder(data_dir=str(prepared.root()), file_format="array_record")
    try:
        builder.download_and_prepare()
    except Exception as error:  # zipfile, tarfile, gzip and lmdb raise exceptions of different types
        if isinstance(error, OSError) and error.errno:  # an error of the disk, not of the files
            raise
        reason = printable((str(error).splitlines() or [type(error).__name__])[0][:500])
        raise ValueError(f"the files in {folder} are not the published ones: {reason}") from error
    return pathlib.Path(builder.data_dir)
