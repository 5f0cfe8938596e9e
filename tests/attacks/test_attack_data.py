"""Damaged, hostile and invalid data sets. Each raises an error of one line that names the file. None gives a wrong
image or a wrong label, hangs, or allocates all memory.
"""

import io
import json
import os
import pathlib
import socket
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from attacking import holds, refuses
from hypothesis import given
from hypothesis import strategies as st
from mutations import altered
from PIL import Image

from ddim_jax import data
from ddim_jax.data import prepared, preparing
from ddim_jax.utils import images

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(6)


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def npz_bytes(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i, pixels in enumerate(PIXELS):
        (tmp_path / "images" / f"{i}.png").write_bytes(encoded(pixels))
    return tmp_path / "images"


def everything(name, path):
    """All images and labels of a data set."""
    source = data.load(name, str(path))
    return source[np.arange(len(source))]


# --- paths that are not regular files ---


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # its path may have 108 characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [pipe, device, unix_socket])
def test_pipes_devices_and_sockets_are_not_read(make, folder, tmp_path):
    make(tmp_path / "x.npz")
    for name in ("npz", "folder"):
        refuses(lambda name=name: data.load(name, str(tmp_path / "x.npz")), "x.npz")
    make(folder / "3.jpg")
    refuses(lambda: data.load("folder", str(folder)), "3.jpg")
    refuses(lambda: images.open_npz(tmp_path / "x.npz"), "x.npz")


@pytest.mark.parametrize("name", ["npz", "folder"])
@pytest.mark.parametrize("path", ["", "/nowhere", "a\x00b", "x" * 5000, "\x1b[31m", "/dev/null", "/proc/self/mem/x"])
def test_paths_that_do_not_exist(name, path):
    message = refuses(lambda: data.load(name, path), repr(path)[1:20].strip("'"))
    holds(message.isprintable() and len(message) < 500, message)


def test_circular_links(folder):
    """Links to a parent folder are ignored. The error names a link to itself."""
    (folder / "same").symlink_to(folder)
    (folder / "up").symlink_to("..")
    holds(len(data.load("folder", str(folder))) == 6)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    refuses(lambda: data.load("folder", str(folder)), "loop.png")


def test_broken_links(folder):
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    refuses(lambda: data.load("folder", str(folder)), "gone.png")


@pytest.mark.parametrize("name", ["a\x1b[2Jb.png", "a\nb.png", "a\rb.png", b"\xff\xfe.png", "é \u202e.png", "-rf.png"])
@pytest.mark.parametrize("content", [b"", b"nothing", encoded(PIXELS[0][:4])])
def test_names_of_files_are_shown_escaped(name, content, folder):
    with open(os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode()), "wb") as file:
        file.write(content)
    message = refuses(lambda: everything("folder", folder), str(folder))
    holds(message.isprintable(), message)


# --- images ---


@given(st.data())
def test_damaged_images(data):
    """Truncated files, flipped bits, exchanged parts: an error, or an image of the size of the other one."""
    import tempfile

    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
    content = bytearray(encoded(PIXELS[1], kind))
    content = altered(data, content, ["cut", "flip", "swap", "double", "insert"], 3)
    with tempfile.TemporaryDirectory() as root:
        pathlib.Path(root, "0.png").write_bytes(encoded(PIXELS[0]))
        pathlib.Path(root, "1.png").write_bytes(content)
        try:
            batch = everything("folder", root)
        except ValueError as error:
            holds("1.png" in str(error) and "\n" not in str(error), str(error))
        else:
            holds(batch.images.shape == (2, 8, 8, 3) and (batch.images[0] == PIXELS[0]).all())


def png(width, height, rows=b"", bits=8, colour=2):
    """A PNG with any header."""
    part = lambda name, content: (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    )
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1), (20_000, 20_000)])
@pytest.mark.parametrize("first", [True, False])
def test_images_larger_than_the_memory(size, first, folder):
    (folder / ("0.png" if first else "5.png")).write_bytes(png(*size, rows=bytes(10**7)))
    refuses(lambda: everything("folder", folder), "0.png" if first else "5.png")


@pytest.mark.parametrize("size", [(0, 0), (0, 8), (8, 0)])
def test_images_without_pixels(size, folder):
    (folder / "0.png").write_bytes(png(*size))
    refuses(lambda: everything("folder", folder), "0.png")


@pytest.mark.parametrize("kind", ["EPS", "GIF", "TIFF", "PPM", "ICO", "PDF"])
def test_files_of_another_format(kind, folder):
    """For some of them Pillow would start Ghostscript."""
    (folder / "3.png").write_bytes(encoded(PIXELS[3], kind))
    refuses(lambda: everything("folder", folder), "3.png")


def test_pixels_of_16_bits_are_not_truncated_to_8(folder):
    grey = Image.fromarray(RNG.integers(0, 2**16, (8, 8), dtype=np.uint16))
    grey.save(folder / "3.png")
    refuses(lambda: everything("folder", folder), "3.png", "I;16")


def test_folders_with_the_names_of_images(folder):
    (folder / "x.png").mkdir()
    (folder / "x.png" / "y.png").write_bytes(encoded(PIXELS[0]))
    holds(len(everything("folder", folder).images) == 7)


# --- folders that the commands of ddim_jax write ---


def test_the_output_folder_of_sample_is_read_as_its_images(tmp_path):
    """grid.png and film.png are not read."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    for name in ("grid.png", "film.png"):
        images.write_png(out / name, images.grid(PIXELS))
    refuses(lambda: data.load("folder", str(out)), "samples.npz")
    (out / "png").mkdir()
    for i, pixels in enumerate(PIXELS[:3]):
        images.write_png(out / "png" / f"{i:06d}.png", pixels)
    np.testing.assert_array_equal(everything("folder", out).images, PIXELS[:3])
    np.savez(out / "samples.npz", arr_0=PIXELS, arr_1=LABELS)
    found = everything("folder", out)
    holds((found.images == PIXELS).all() and (found.labels == LABELS).all())
    refuses(lambda: data.load("folder", str(tmp_path)), str(out))


def test_a_workdir_is_not_read_as_images(tmp_path):
    (tmp_path / "grids").mkdir()
    for i in range(3):
        images.write_png(tmp_path / "grids" / f"{i}.png", images.grid(PIXELS))
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).touch()
    refuses(lambda: data.load("folder", str(tmp_path)), str(tmp_path))


# --- .npz ---


@given(st.data())
def test_damaged_npz_files(data):
    """An error, or the original images and labels."""
    import tempfile

    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    content = bytearray(npz_bytes(save, arr_0=PIXELS, arr_1=LABELS))
    content = altered(data, content, ["cut", "flip", "flip", "swap", "zero", "insert"], 2)
    with tempfile.TemporaryDirectory() as root:
        path = pathlib.Path(root, "x.npz")
        path.write_bytes(content)
        try:
            batch = everything("npz", path)
        except ValueError as error:
            holds("x.npz" in str(error) and str(error).isprintable(), str(error))
        else:
            same = batch.images.shape == PIXELS.shape and (batch.images == PIXELS).all()
            holds(same and (batch.labels is None or (batch.labels == LABELS).all()), "other images")


def member(shape, dtype="'|u1'", header=None, content=b"", version=1):
    """An .npy with any header."""
    text = (header or f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}").encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + content


DEEP = "(" * 3000
MEMBERS = {
    "longer than the content": member("(1000000, 32, 32, 3)", content=bytes(3072)),
    "larger than any memory": member("(10000000000, 1024, 1024, 3)", content=bytes(3072)),
    "shorter than the content": member("(1, 8, 8, 3)", content=bytes(3072)),
    "a negative length": member("(-1, 8, 8, 3)", content=bytes(192)),
    "objects": member("(1,)", "'|O'", content=b"cos\nsystem\n(S'true'\ntR."),
    "a pickle in a structured type": member("(1,)", "[('a', '|O')]", content=bytes(8)),
    "huge items": member("(1,)", "('|u1', (1000000000,))", content=bytes(8)),
    "a long type": member("(1,)", "'|V2000000000'", content=bytes(8)),
    "nested brackets": member("()", header=DEEP),
    "nested signs": member("()", header="-" * 9000 + "1"),
    "a call": member("()", header="{'descr': __import__('os').system('true')}"),
    "a list": member("()", header="[1, 2]"),
    "another version": member("(1, 8, 8, 3)", content=bytes(192), version=3),
    "an unknown version": member("(1, 8, 8, 3)", content=bytes(192), version=9),
    "half a header": member("(1, 8, 8, 3)")[:12],
    "empty": b"",
    "float64": member("(1, 8, 8, 3)", "'<f8'", content=bytes(8 * 192)),
    "text": member("(1, 8, 8, 3)", "'<U1'", content=bytes(4 * 192)),
    "no pixels": member("(1, 0, 8, 3)"),
    "no images": member("(0, 8, 8, 3)"),
    "five axes": member("(1, 1, 8, 8, 3)", content=bytes(192)),
    "a bool as a length": member("(True, 8, 8, 3)", content=bytes(192 * 2)),
}


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_invalid_arrays(name, how, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", how) as archive:
        archive.writestr("arr_0.npy", MEMBERS[name])
    message = refuses(lambda: data.load("npz", str(tmp_path / "x.npz")), "x.npz")
    holds(message.isprintable() and len(message) < 700, message)


def declare(path, size):
    """Sets the size of the only member of an archive in its central directory."""
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    content[central + 24 : central + 28] = struct.pack("<I", size)
    path.write_bytes(content)


def test_archives_larger_than_the_memory(tmp_path, monkeypatch):
    """By the size in the header, and by the size of the content."""
    size = 2**31
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", member(f"({size // 3072}, 32, 32, 3)", content=bytes(10**6)))
    declare(tmp_path / "x.npz", 2**32 - 2)
    refuses(lambda: data.load("npz", str(tmp_path / "x.npz")), "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", member("(1000, 32, 32, 3)", content=bytes(1000 * 3072)))
    holds(len(data.load("npz", str(tmp_path / "y.npz"))) == 1000)
    from ddim_jax.utils import files

    monkeypatch.setattr(files, "available_memory", lambda: 10**6)
    refuses(lambda: data.load("npz", str(tmp_path / "y.npz")), "y.npz")


def test_two_arrays_of_one_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for pixels in (PIXELS, PIXELS[::-1]):
            content = io.BytesIO()
            np.save(content, pixels)
            with pytest.warns() if "arr_0.npy" in archive.namelist() else io.BytesIO():
                archive.writestr("arr_0.npy", content.getvalue())
    refuses(lambda: data.load("npz", str(tmp_path / "x.npz")), "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + bytes(18), encoded(PIXELS[0]), bytes(1000)])
def test_files_that_are_not_npz(content, tmp_path):
    (tmp_path / "x.npz").write_bytes(content)
    refuses(lambda: data.load("npz", str(tmp_path / "x.npz")), "x.npz")


@pytest.mark.parametrize("name", ["a\x1b[31m", "x" * 60_000, "../../y", ""])
def test_names_of_arrays_are_shown_escaped(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(f"{name}.npy", member("(1, 8, 8, 3)", content=bytes(192)))
    message = refuses(lambda: data.load("npz", str(tmp_path / "x.npz")), "x.npz")
    holds(message.isprintable() and len(message) < 1000, message[:300])


def test_more_images_than_fit_into_memory():
    class Huge:
        image_shape, num_classes, crop, jpegs, instant = (1024, 1024, 3), 0, "none", 0, False

        def __len__(self):
            return 10**9

        def __getitem__(self, indices):
            raise AssertionError("read")

    refuses(lambda: data.in_memory(Huge()), str(10**9))


# --- labels ---

BAD = {  # the labels, and what the error must name of them
    "negative": (np.array([0, 1, -1, 2, 3, 4]), "image 2 ", "-1"),
    "fractional": (np.array([0, 1, 2, 2.5, 3, 4]), "image 3 ", "2.5"),
    "not a number": (np.array([0, np.nan, 1, 2, 3, 4]), "image 1 ", "nan"),
    "infinite": (np.array([0, 1, 2, 3, 4, np.inf]), "image 5 ", "inf"),
    "huge": (np.array([0, 1, 2, 3, 4, 2**62]), "image 5 ", str(2**62)),
    "beyond 32 bits": (np.array([2**32, 1, 2, 3, 4, 5]), "image 0 ", str(2**32)),
    "beyond int64": (np.array([0, 2**64 - 1, 2, 3, 4, 5], np.uint64), "image 1 ", str(2**64 - 1)),
    "strings": (np.array(["0", "1", "2", "3", "4", "5"]), "<U1"),
    "complex": (np.arange(6) + 1j, "complex128"),
    "bools": (np.arange(6) > 2, "bool"),
    "dates": (np.arange(6).astype("M8[s]"), "datetime64"),
    "one-hot": (np.eye(6), "(6, 6)"),
    "too few": (np.arange(5), "(5,)"),
    "a scalar": (np.array(3), "()"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("key", ["labels", "train_labels", "arr_1"])
def test_invalid_classes(name, key, tmp_path):
    labels, *words = BAD[name]
    np.savez(tmp_path / "x.npz", images=PIXELS, **{key: labels})
    refuses(lambda: data.load("npz", str(tmp_path / "x.npz")), "x.npz", "labels", *words)


@given(st.lists(st.one_of(st.integers(-3, 12), st.floats(-2, 12), st.floats()), min_size=6, max_size=6))
def test_random_labels(labels):
    wrong = [
        i
        for i, label in enumerate(labels)
        if not (np.isfinite(label) and 0 <= label < data.source.MOST_CLASSES and label == int(label))
    ]
    try:
        source = data.ArraySource(PIXELS, np.array(labels))
    except ValueError as error:
        holds(wrong and f"image {wrong[0]} " in str(error), f"{labels}: {error}")
    else:
        holds(not wrong and (source.labels == np.array(labels)).all() and source.labels.dtype == np.int32, str(labels))


# --- data sets of tensorflow-datasets ---


@pytest.fixture(scope="module")
def prepared_root(tmp_path_factory):
    import tensorflow_datasets as tfds
    from test_prepared import prepare

    root = tmp_path_factory.mktemp("tfds")
    rows = [(i, {"image": Image.fromarray(pixels), "label": i % 3}) for i, pixels in enumerate(PIXELS)]
    features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    prepare(root, "mine", features, {"train": rows})
    return root


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_descriptions(name, prepared_root, monkeypatch):
    """An error that names the data set, or the original images."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_root))
    path = prepared_root / "mine" / "1.0.0" / name
    good = path.read_bytes()
    right = np.sort(everything("tfds", "mine").images.reshape(6, -1), axis=0)
    hostile = [b"", b"[]", b"3", b"null", b'"x"', b"{}", b"[" * 100_000, b"{" * 10, good[:-20], b"\xff\xfe"]
    hostile += [b'{"splits": 3}', good.replace(b"train", b"tr\\u0000in"), good.replace(b"8", b"100000000")]
    hostile += [good.replace(b"mine", b"../x"), good.replace(b"tensorflow_datasets.core", b"antigravity")]
    hostile += [good.replace(b":", b",", i) for i in range(1, 4)]
    hostile += [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(0, len(good), 97)]
    try:
        for content in hostile:
            path.write_bytes(content)
            try:
                batch = everything("tfds", "mine")
            except ValueError as error:
                holds("mine" in str(error) and str(error).isprintable(), f"{content[:100]}: {error}")
            else:
                found = np.sort(batch.images.reshape(6, -1), axis=0)
                holds((found == right).all() and (batch.labels is None or set(batch.labels) <= {0, 1, 2}))
        holds("antigravity" not in sys.modules, "a class that the file names was imported")
    finally:
        path.write_bytes(good)


def test_classes_that_do_not_exist(prepared_root, monkeypatch):
    """tensorflow-datasets accepts -1 for an example without a label."""
    import tensorflow_datasets as tfds
    from test_prepared import prepare

    rows = [(i, {"image": Image.fromarray(pixels), "label": -1}) for i, pixels in enumerate(PIXELS)]
    features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
    prepare(prepared_root, "unlabelled", features, {"train": rows})
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_root))
    refuses(lambda: everything("tfds", "unlabelled"), "labels", "image 0 ", "-1")


# --- published files, before they are prepared ---


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    (tmp_path / "published").mkdir()
    return tmp_path / "published"


@pytest.mark.parametrize("name", ["cifar10", "celeba64"])
def test_pipes_are_not_read(name, published):
    for file in preparing.RECIPES[name].files:
        os.mkfifo(published / file)
    refuses(lambda: preparing.prepare(name, published), preparing.RECIPES[name].files[0])


def test_an_archive_with_a_huge_file(published):
    with tarfile.open(published / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for i in range(1, 6):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{i}.bin")
            entry.size = 30_730 if i < 5 else 3_073 * 22_000
            archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    refuses(lambda: preparing.prepare("cifar10", published), str(published), "data_batch_", str(3_073 * 22_000))
    holds(not any((prepared.root() / "cifar10").glob("*/dataset_info.json")))


def test_a_huge_face(published):
    (published / "list_eval_partition.txt").write_text("000001.jpg 0\n")
    huge = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(huge, "JPEG", quality=1)
    with zipfile.ZipFile(published / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", huge.getvalue())
    message = refuses(lambda: preparing.prepare("celeba64", published), str(published))
    holds("000001.jpg" in message or str(20_000**2) in message, message)


@pytest.mark.parametrize("text", ["a b c\n", "\x00 0\n", "000001.jpg\n", "../../x 0\n", "a\x1b[31m 0\n"])
def test_invalid_lists_of_the_partitions(text, published):
    (published / "list_eval_partition.txt").write_text(text)
    with zipfile.ZipFile(published / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", encoded(PIXELS[0], "JPEG"))
    message = refuses(lambda: preparing.prepare("celeba64", published), str(published))
    holds(message.isprintable(), message)


def test_a_huge_description(monkeypatch, tmp_path):
    home = tmp_path / "huge" / "1.0.0"
    home.mkdir(parents=True)
    (home / "dataset_info.json").write_text(json.dumps({"fileFormat": "x" * 10**6}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    message = refuses(lambda: data.load("tfds", "huge"), str(home), "array_record", "xxx")
    holds(len(message) < 1000, message[:200])
