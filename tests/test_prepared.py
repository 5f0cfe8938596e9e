"""Data sets that tensorflow-datasets prepares, read without TensorFlow."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from messages import raises
from PIL import Image

from ddim_jax import data
from ddim_jax.data import prepared

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (40, 12, 10, 3), dtype=np.uint8),
    "test": RNG.integers(0, 256, (7, 12, 10, 3), dtype=np.uint8),
}


def prepare(root, called, features, examples):
    """Prepares a data set `called` in root. examples: {split: [(key, features)]}."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = called
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = root

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {split: iter(rows) for split, rows in examples.items()}

        def _generate_examples(self):
            raise NotImplementedError

    Builder(data_dir=str(root), file_format="array_record").download_and_prepare()


def prepared_digits(root, count):
    """Prepares the first digits as "mine", and returns its folder."""
    import tensorflow_datasets as tfds

    images = data.load("digits").images[:count, ..., 0]
    rows = [(i, {"image": Image.fromarray(image)}) for i, image in enumerate(images)]
    prepare(root, "mine", {"image": tfds.features.Image(shape=(8, 8, 1))}, {"train": rows})
    return root / "mine"


def break_a_record(folder, picture):
    """Overwrites the middle of a picture. Returns its number."""
    (file,) = folder.rglob("*train*array_record*")
    content = bytearray(file.read_bytes())
    places = [place for place in range(len(content)) if content.startswith(b"IDAT", place)]
    content[places[picture] + 8 : places[picture] + 24] = bytes(16)
    file.write_bytes(content)
    return picture


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """$TFDS_DATA_DIR with two data sets: "mine", and "plain" without labels and with a validation split."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    rows = lambda split: [
        (i, {"image": Image.fromarray(image), "label": i % 3}) for i, image in enumerate(IMAGES[split])
    ]
    image = tfds.features.Image(shape=(None, None, 3))
    prepare(
        root, "mine", {"image": image, "label": tfds.features.ClassLabel(num_classes=3)}, {s: rows(s) for s in IMAGES}
    )
    pictures = [(i, {"picture": Image.fromarray(image[: 12 - i])}) for i, image in enumerate(IMAGES["train"][:2])]
    prepare(root, "plain", {"picture": image}, {"train": pictures, "validation": pictures[:1]})
    return root


@pytest.fixture(autouse=True)
def where(root, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))


def test_random_access_to_images_and_labels():
    source = data.load("tfds", "mine")
    assert len(source) == 40 and source.image_shape == (12, 10, 3) and source.num_classes == 3
    assert (source.crop, source.jpegs) == ("none", 0)
    order = np.sort(source[np.arange(40)].images.reshape(40, -1), axis=0)  # tfds shuffles the examples
    np.testing.assert_array_equal(order, np.sort(IMAGES["train"].reshape(40, -1), axis=0))
    batch, single = source[np.array([3, 17, 3])], source[np.array([17])]
    np.testing.assert_array_equal(batch.images[0], batch.images[2])
    np.testing.assert_array_equal(batch.images[1], single.images[0])
    (number,) = [i for i, image in enumerate(IMAGES["train"]) if (image == single.images[0]).all()]
    assert single.labels.tolist() == [number % 3] and single.labels.dtype == np.int32
    assert len(data.load("tfds", "mine:1.0.0", "test")) == 7


def test_a_split_and_a_feature_by_another_name():
    source = data.load("tfds", "plain", "test")
    assert len(source) == 1 and source.num_classes == 0 and source[np.array([0])].labels is None
    with raises(ValueError, "plain, train", "11x10x3", "12x10x3"):
        data.load("tfds", "plain")[np.array([0, 1])]


def test_in_memory():
    source = data.load("tfds", "mine")
    copy = data.in_memory(source, chunk=7)
    np.testing.assert_array_equal(copy.images, source[np.arange(40)].images)
    np.testing.assert_array_equal(copy.labels, source[np.arange(40)].labels)
    assert copy.num_classes == 3 and data.fingerprint(copy) == data.fingerprint(source)
    assert data.fingerprint(source) != data.fingerprint(data.load("tfds", "mine", "test"))


@pytest.mark.parametrize("ahead", [{"threads": 3}, {"workers": 2}])
def test_threads_and_workers_change_no_batch(ahead):
    plan = data.Plan(data.load("tfds", "mine"), 16, seed=1, flip=True)
    expected = list(itertools.islice(data.batches(plan, 3), 6))
    stream = data.batches(plan, 3, **ahead)
    for batch, found in zip(expected, stream, strict=False):
        np.testing.assert_array_equal(batch.images, found.images)
        np.testing.assert_array_equal(batch.labels, found.labels)
    stream.close()


def test_a_data_set_that_is_not_prepared(root, tmp_path, monkeypatch):
    for name, words in [
        ("nope", ("'nope'", str(root), "tfds build nope --file_format=array_record")),
        ("mine:2.0.0", ("'mine:2.0.0'", str(root), "1.0.0")),
        ("", ("''", str(root))),
    ]:
        with raises(ValueError, *words):
            data.load("tfds", name)
    with raises(ValueError, "'cifar10'", str(root), "python -m ddim_jax.prepare --data cifar10"):
        data.load("cifar10")
    home = tmp_path / "other" / "1.2.3"
    home.mkdir(parents=True)
    info = json.loads((root / "mine" / "1.0.0" / "dataset_info.json").read_text())
    (home / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with raises(ValueError, str(home), "tfrecord", "array_record"):
        data.load("tfds", "other")


def test_a_damaged_record_is_named(root, tmp_path, monkeypatch):
    shutil.copytree(root / "mine", tmp_path / "mine")
    number = break_a_record(tmp_path / "mine", 17)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with raises(ValueError, "mine, train", f"number {number}"):
        source = data.load("tfds", "mine")
        source[np.arange(40)]


def test_crops():
    """CelebA: the pixels around (89, 121) are the middle of 64x64. LSUN: the centred square."""
    face = np.zeros((218, 178, 3), np.uint8)
    face[121 - 6 : 121 + 6, 89 - 6 : 89 + 6] = 255
    crop = prepared.celeba(face)
    assert crop.shape == (64, 64, 3) and (crop[31:33, 31:33] > 200).all()
    assert crop[:28].max() == crop[:, 36:].max() == 0
    edge = np.zeros((218, 178, 3), np.uint8)
    edge[57:185, 25:153] = 255
    assert (prepared.celeba(edge) == 255).all()
    wide = np.zeros((256, 341, 3), np.uint8)
    wide[:, 42:298] = 9
    assert (prepared.centre(wide) == 9).all()
    assert prepared.centre(np.zeros((300, 512, 3), np.uint8)).shape == (256, 256, 3)


def test_tensorflow_is_not_imported():
    code = """
import sys
import numpy as np
from ddim_jax import data
print(data.load("tfds", "mine")[np.array([5])].images.sum(), "tensorflow" in sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [str(data.load("tfds", "mine")[np.array([5])].images.sum()), "False"]
