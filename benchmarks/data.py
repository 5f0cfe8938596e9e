"""The number of training images per second that one core reads and decodes.

    python -m benchmarks.data [--images 2000]

The data are CIFAR-10, in memory and as records of tensorflow-datasets, and records of the sizes of CelebA (64x64, PNG)
and LSUN (256x341, WebP, cropped to 256x256). The latter two are crops of the photographs of scikit-learn, written by
the code of `python -m ddim_jax.prepare`. Images are read in the order of training, flipped at random, in batches. The
process runs on one core (Linux only).
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import io
import itertools
import os
import pathlib
import platform
import statistics
import tempfile
import time
import types
import zipfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from ddim_jax import cli, data
from ddim_jax.data import preparing
from ddim_jax.utils.errors import error_context
from experiments import common

REPEATS = 7
THREADS = 4  # as in training
BATCH = 128
OPTIONS = {"images": ("2000", "The number of records of each size.")}


def main(options: types.SimpleNamespace) -> None:
    (count,) = common.ints("images", options.images, BATCH)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    with error_context("cifar10"):
        stored = data.load("cifar10")
    rows.append(("CIFAR-10, in memory", *median_and_range(rates(data.in_memory(stored), 0, batches=400))))
    rows.append(("CIFAR-10, PNG records", *median_and_range(rates(stored, THREADS, batches=40))))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TFDS_DATA_DIR"] = folder
        for name, publish in ("celeba64", publish_celeba), ("lsun_church256", publish_lsun):
            files = pathlib.Path(folder, f"{name} as published")
            files.mkdir()
            publish(files, count)
            begin = time.perf_counter()
            preparing.prepare(name, files)
            seconds = time.perf_counter() - begin
            source = data.load(name)
            shape = "x".join(map(str, source.image_shape))
            rows.append((f"{name} ({shape}), records", *median_and_range(rates(source, THREADS, count // BATCH))))
            print(f"{name}: prepared at {count / seconds:.0f} images/s")
    print(f"\none core of {platform.machine()}, NumPy {np.__version__}, median of {REPEATS} runs\n")
    print(common.markdown(["images", "images/s", "min..max"], rows))


def median_and_range(values: list[float]) -> tuple[str, str]:
    return f"{statistics.median(values):,.0f}", f"{min(values):,.0f}..{max(values):,.0f}"


def rates(source: data.Source, threads: int, batches: int) -> list[float]:
    """Images per second, one value for each of REPEATS runs. batches: of one run."""
    plan, values = data.Plan(source, BATCH, seed=0, flip=True), []
    for repeat in range(REPEATS):
        stream = data.batches(plan, repeat * batches, threads)
        next(stream)
        begin = time.perf_counter()
        for _ in itertools.islice(stream, batches - 1):
            pass
        values.append((batches - 1) * BATCH / (time.perf_counter() - begin))
        stream.close()
    return values


def crops(height: int, width: int, count: int):
    """`count` random crops (height, width, 3) of photographs."""
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
        yield Image.fromarray(np.ascontiguousarray(photo[top : top + height, left : left + width]))


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, quality=75)
    return file.getvalue()


def publish_celeba(folder: pathlib.Path, count: int) -> None:
    """Writes `count` images in the published format of CelebA."""
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i, image in enumerate(crops(218, 178, count)):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", encoded(image, "JPEG"))
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{i:06d}.jpg {(1, 2, 0)[min(i, 2)]}\n" for i in range(count))
    )


def publish_lsun(folder: pathlib.Path, count: int) -> None:
    """Writes `count` images in the published format of LSUN."""
    import lmdb

    for split, images in ("train", crops(256, 341, count)), ("val", crops(256, 341, 1)):
        with lmdb.open(str(folder / f"church_outdoor_{split}_lmdb"), map_size=2**32) as database:
            with database.begin(write=True) as transaction:
                for i, image in enumerate(images):
                    transaction.put(f"{i:040x}".encode(), encoded(image, "WEBP"))


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
