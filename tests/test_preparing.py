"""Preparation of the paper's data sets from small files in their published formats."""

import io
import sys
import tarfile
import zipfile

import lmdb
import numpy as np
import pytest
from messages import missing, raises
from PIL import Image
from processes import error_line, ok, run
from sklearn.datasets import load_sample_image

from ddim_jax import data
from ddim_jax.data import prepared, preparing

PHOTO = load_sample_image("china.jpg")  # (427, 640, 3)


def encoded(image, kind, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def piece(i, height, width):
    """A crop of a photograph."""
    top, left = 3 * i, 5 * i
    return np.ascontiguousarray(PHOTO[top : top + height, left : left + width])


def cifar10(folder):
    """Four images in each training batch, and seven test images."""
    counts = {**{f"data_batch_{i}": 4 for i in range(1, 6)}, "test_batch": 7}
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        n = 0
        for name, count in counts.items():
            rows = b"".join(
                bytes([j % 10]) + piece(j, 32, 32).transpose(2, 0, 1).tobytes() for j in range(n, n + count)
            )
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(rows)
            archive.addfile(member, io.BytesIO(rows))
            n += count


def celeba64(folder):
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for i in range(1, 13):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", encoded(piece(i, 218, 178), "JPEG"))
    parts = [0] * 7 + [1] * 3 + [2] * 2
    (folder / "list_eval_partition.txt").write_text("".join(f"{i:06d}.jpg {part}\n" for i, part in enumerate(parts, 1)))


def lsun(folder, category="church_outdoor"):
    for part, count in ("train", 5), ("val", 2):
        with lmdb.open(str(folder / f"{category}_{part}_lmdb"), map_size=2**24) as database:
            with database.begin(write=True) as view:
                for i in range(count):
                    view.put(f"{i:040x}".encode(), encoded(piece(i, 256, 341), "WEBP", lossless=True))


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    return tmp_path / "sets"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    return folder


def found_in(batch, images):
    """The index in `images` of each image of a batch."""
    return [next(i for i, image in enumerate(images) if (image == one).all()) for one in batch.images]


def test_cifar10(folder, root):
    cifar10(folder)
    assert preparing.prepare("cifar10", folder) == root / "cifar10" / "3.0.2"
    originals = [piece(i, 32, 32) for i in range(27)]
    for split, expected in ("train", range(20)), ("test", range(20, 27)):
        source = data.load("cifar10", split=split)
        batch = source[np.arange(len(source))]
        numbers = found_in(batch, originals)
        assert sorted(numbers) == list(expected)
        assert batch.labels.tolist() == [i % 10 for i in numbers] and source.num_classes == 10


def test_celeba64(folder, root):
    """The images are cropped when they are prepared, with the same result as after tensorflow-datasets."""
    celeba64(folder)
    preparing.prepare("celeba64", folder)
    crops = []
    for i in range(1, 13):
        with Image.open(io.BytesIO(encoded(piece(i, 218, 178), "JPEG"))) as image:
            crops.append(prepared.celeba(np.asarray(image)))
    for split, expected in ("train", range(7)), ("test", range(10, 12)):
        source = data.load("celeba64", split=split)
        assert sorted(found_in(source[np.arange(len(source))], crops)) == list(expected)
        assert source.image_shape == (64, 64, 3) and source.crop == prepared.CELEBA.description


def test_lsun(folder, root):
    lsun(folder)
    preparing.prepare("lsun_church256", folder)
    source = data.load("lsun_church256")
    middle = [piece(i, 256, 341)[:, 42:298] for i in range(5)]
    assert sorted(found_in(source[np.arange(5)], middle)) == list(range(5))
    assert len(data.load("lsun_church256", split="test")) == 2


def test_the_command(folder, root):
    error_line(run("ddim_jax.prepare", "--data=cifra10", "--from", folder), "--data", "'cifra10'", "'cifar10'")
    celeba64(folder)
    done = ok(run("ddim_jax.prepare", "--data=celeba64", "--from", folder))
    assert not missing(done.stdout, "7 training images", "64x64x3", str(root))


def test_missing_files_and_packages_are_named(folder, root, monkeypatch):
    with raises(ValueError, str(folder), "img_align_celeba.zip", "celeba64", "list_eval_partition.txt"):
        preparing.prepare("celeba64", folder)
    with raises(ValueError, "'celeba64'", str(root), "python -m ddim_jax.prepare --data celeba64"):
        data.load("celeba64")
    lsun(folder, "bedroom")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with raises(ValueError, "'ddim-jax[lsun]'"):
        preparing.prepare("lsun_bedroom256", folder)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_a_member(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", encoded(piece(1, 218, 178), "JPEG"))


def with_half_an_image(file):
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(1, 13):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", encoded(piece(i, 218, 178), "JPEG")[: 9000 // i])


@pytest.mark.parametrize(
    "make, name, file, damage, words",
    [
        (cifar10, "cifar10", "cifar-10-binary.tar.gz", truncate, ()),
        (celeba64, "celeba64", "img_align_celeba.zip", truncate, ("zip",)),
        (celeba64, "celeba64", "img_align_celeba.zip", without_a_member, ("000002.jpg",)),
        (celeba64, "celeba64", "img_align_celeba.zip", with_half_an_image, ("000002.jpg",)),
    ],
)
def test_damaged_files_are_named(folder, root, make, name, file, damage, words):
    """And no prepared data set is left."""
    make(folder)
    damage(folder / file)
    with pytest.raises(ValueError) as caught:
        preparing.prepare(name, folder)
    assert not missing(str(caught.value), str(folder), *words), caught.value
    with raises(ValueError, repr(name), str(root)):
        data.load(name)
