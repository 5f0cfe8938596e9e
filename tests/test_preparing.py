"""The paper's data sets, made of small files in the format in which they are published, and read again."""

import io
import sys
import tarfile
import zipfile

import lmdb
import numpy as np
import pytest
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
    """A part of a photograph."""
    top, left = 3 * i, 5 * i
    return np.ascontiguousarray(PHOTO[top : top + height, left : left + width])


def cifar10(folder):
    """Four images a batch, and seven to test."""
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
    """For each image of a batch, which one it is."""
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
    """Cut when it is prepared: the same pixels as of what tensorflow-datasets prepares whole."""
    celeba64(folder)
    preparing.prepare("celeba64", folder)
    cut = []
    for i in range(1, 13):
        with Image.open(io.BytesIO(encoded(piece(i, 218, 178), "JPEG"))) as image:
            cut.append(prepared.celeba(np.asarray(image)))
    for split, expected in ("train", range(7)), ("test", range(10, 12)):
        source = data.load("celeba64", split=split)
        assert sorted(found_in(source[np.arange(len(source))], cut)) == list(expected)
        assert source.image_shape == (64, 64, 3) and source.crop == prepared.CELEBA.words


def test_lsun(folder, root):
    lsun(folder)
    preparing.prepare("lsun_church256", folder)
    source = data.load("lsun_church256")
    middle = [piece(i, 256, 341)[:, 42:298] for i in range(5)]
    assert sorted(found_in(source[np.arange(5)], middle)) == list(range(5))
    assert len(data.load("lsun_church256", split="test")) == 2


def test_the_command(folder, root):
    said = error_line(run("ddim_jax.prepare", "--data=cifra10", "--from", folder))
    assert "--data" in said and "did you mean 'cifar10'" in said
    celeba64(folder)
    assert (
        f"7 training images, 64x64x3, are in {root}"
        in ok(run("ddim_jax.prepare", "--data=celeba64", "--from", folder)).stdout
    )


def test_what_is_not_there(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"holds no img_align_celeba.zip; celeba64 is made of .*list_eval_partition"):
        preparing.prepare("celeba64", folder)
    with pytest.raises(ValueError, match="is not prepared .*: python -m ddim_jax.prepare --data celeba64 --from"):
        data.load("celeba64")
    lsun(folder, "bedroom")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"ddim-jax\[lsun\]"):
        preparing.prepare("lsun_bedroom256", folder)


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_a_member(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", encoded(piece(1, 218, 178), "JPEG"))


def with_half_an_image(file):
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(1, 13):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", encoded(piece(i, 218, 178), "JPEG")[: 9000 // i])


@pytest.mark.parametrize(
    "make, name, file, break_, said",
    [
        (cifar10, "cifar10", "cifar-10-binary.tar.gz", cut_off, ""),
        (celeba64, "celeba64", "img_align_celeba.zip", cut_off, "not a zip"),
        (celeba64, "celeba64", "img_align_celeba.zip", without_a_member, "000002.jpg"),
        (celeba64, "celeba64", "img_align_celeba.zip", with_half_an_image, "cannot be read as an image"),
    ],
)
def test_what_is_broken(folder, root, make, name, file, break_, said):
    """It is said, and nothing is left that would be read."""
    make(folder)
    break_(folder / file)
    with pytest.raises(ValueError, match=f"(?s)the files in {folder} are not those that are published: .*{said}"):
        preparing.prepare(name, folder)
    with pytest.raises(ValueError, match="is not prepared"):
        data.load(name)
