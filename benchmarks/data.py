"""How many training images a second one core prepares, and how many cores a GPU therefore needs.

    python -m benchmarks.data [--images 2000]

CIFAR-10 as tensorflow-datasets prepared it, then held in memory; and streams of records of the sizes of CelebA (64x64,
PNG) and LSUN (256x341, WebP, cut to 256x256), made of parts of the photographs that scikit-learn carries by what
`python -m ddim_jax.prepare` does. All in the order of training, mirrored at random, in batches. The process keeps to
one core (Linux alone).
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
THREADS = 4  # as training has them
BATCH = 128
OPTIONS = {"images": ("2000", "How many records of each size are made.")}


def main(options: types.SimpleNamespace) -> None:
    (count,) = common.ints("images", options.images, BATCH)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    with error_context("cifar10"):
        stored = data.load("cifar10")
    rows.append(("CIFAR-10, in memory", *told(rates(data.in_memory(stored), 0, batches=400))))
    rows.append(("CIFAR-10, PNG records", *told(rates(stored, THREADS, batches=40))))
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
            rows.append((f"{name} ({shape}), records", *told(rates(source, THREADS, count // BATCH))))
            print(f"{name}: prepared at {count / seconds:.0f} images/s")
    print(f"\none core of {platform.machine()}, NumPy {np.__version__}, median of {REPEATS} runs\n")
    print(common.markdown(["images", "images/s", "min..max"], rows))


def told(found: list[float]) -> tuple[str, str]:
    return f"{statistics.median(found):,.0f}", f"{min(found):,.0f}..{max(found):,.0f}"


def rates(source: data.Source, threads: int, batches: int) -> list[float]:
    """Images a second of so many batches, begun anew each time."""
    plan, found = data.Plan(source, BATCH, seed=0, flip=True), []
    for repeat in range(REPEATS):
        stream = data.batches(plan, repeat * batches, threads)
        next(stream)
        begin = time.perf_counter()
        for _ in itertools.islice(stream, batches - 1):
            pass
        found.append((batches - 1) * BATCH / (time.perf_counter() - begin))
        stream.close()
    return found


def parts(height: int, width: int, count: int):
    """So many parts of photographs, (height, width, 3)."""
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
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i, image in enumerate(parts(218, 178, count)):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", encoded(image, "JPEG"))
    (folder / "list_eval_partition.txt").write_text(
        "".join(f"{i:06d}.jpg {(1, 2, 0)[min(i, 2)]}\n" for i in range(count))
    )


def publish_lsun(folder: pathlib.Path, count: int) -> None:
    import lmdb

    for part, images in ("train", parts(256, 341, count)), ("val", parts(256, 341, 1)):
        with lmdb.open(str(folder / f"church_outdoor_{part}_lmdb"), map_size=2**32) as database:
            with database.begin(write=True) as view:
                for i, image in enumerate(images):
                    view.put(f"{i:040x}".encode(), encoded(image, "WEBP"))


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
