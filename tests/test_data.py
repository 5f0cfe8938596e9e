import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddim_jax import data
from ddim_jax.data.batches import order
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.data.sources import ArraySource


def numbered(count):
    """Images that are their own index."""
    images = np.zeros((count, 2, 3, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    images[:, 0, 2, 0] = 255
    return ArraySource(images, np.arange(count))


def take(source, steps, *args, first_step=0, **kwargs):
    return list(itertools.islice(data.batches(data.Plan(source, *args, **kwargs), first_step), steps))


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 50))
def test_every_epoch_is_a_permutation_whatever_the_batch(length, seed, batch):
    stream = np.concatenate([order(length, seed, step * batch, batch) for step in range(3 * length // batch + 1)])
    for epoch in range(3):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_and_seeds_differ():
    assert order(100, 0, 0, 100).tolist() != order(100, 0, 100, 100).tolist() != order(100, 1, 100, 100).tolist()


def test_the_order_is_a_function_of_seed_and_step():
    """A stream that begins at step 7 continues one that began at 0, flips included."""
    whole = take(numbered(50), 12, 16, seed=3, flip=True)
    later = take(numbered(50), 5, 16, seed=3, flip=True, first_step=7)
    for a, b in zip(whole[7:], later, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("shards", [2, 4])
def test_processes_share_a_batch_without_overlap(shards):
    whole = take(numbered(50), 4, 16, seed=1, flip=True)
    parts = [take(numbered(50), 4, 16, seed=1, flip=True, shard=i, num_shards=shards) for i in range(shards)]
    for step in range(4):
        np.testing.assert_array_equal(np.concatenate([part[step].images for part in parts]), whole[step].images)
    with pytest.raises(ValueError, match="16 does not divide over 3"):
        data.batches(data.Plan(numbered(50), 16, 1, num_shards=3))


def test_flips_mirror_half_of_the_images_left_to_right():
    images = np.concatenate([batch.images for batch in take(numbered(50), 20, 50, seed=0, flip=True)])
    mirrored = images[:, 0, 0, 0] == 255
    assert 0.4 < mirrored.mean() < 0.6
    assert (images[~mirrored, 0, 2, 0] == 255).all() and (images[:, 1] == 0).all()
    assert not np.array_equal(mirrored[:50], mirrored[50:100])
    assert (np.concatenate([batch.images for batch in take(numbered(50), 5, 50, seed=0)])[:, 0, 2, 0] == 255).all()


def test_pixels_survive_the_way_to_the_network_and_back():
    pixels = np.arange(256, dtype=np.uint8)
    unit = to_unit(pixels)
    assert unit.dtype == np.float32 and unit[0] == -1 and unit[255] == 1
    np.testing.assert_array_equal(to_uint8(unit), pixels)
    assert to_uint8(np.array([-5.0, 5.0, 0.0])).tolist() == [0, 255, 128]


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    train, test = (data.load("digits", split=split) for split in data.SPLITS)
    assert (len(train), len(test), train.image_shape, train.num_classes) == (1438, 359, (8, 8, 1), 10)
    raw = load_digits()
    np.testing.assert_array_equal(np.round(test[np.arange(359)].images[..., 0] / (255 / 16)), raw.images[4::5])
    assert len({image.tobytes() for image in np.concatenate([train.images, test.images])}) == len(
        np.unique(raw.data, axis=0)
    )


def write_folder(root, sizes, mode="RGB"):
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    arrays = [rng.integers(0, 256, (*size, 3) if mode == "RGB" else size, dtype=np.uint8) for size in sizes]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(root / f"{i:02d}.png")
    return arrays


def test_a_folder_is_a_data_set(tmp_path):
    arrays = write_folder(tmp_path / "train" / "inner", [(6, 6)] * 3)
    write_folder(tmp_path / "test", [(6, 6)])
    source = data.load("folder", str(tmp_path))
    assert len(source) == 3 and source.image_shape == (6, 6, 3)
    np.testing.assert_array_equal(source[np.array([2, 0])].images, [arrays[2], arrays[0]])
    assert source[np.array([0])].labels is None
    assert len(data.load("folder", str(tmp_path), "test")) == 1


def test_a_grey_folder_stays_grey(tmp_path):
    write_folder(tmp_path, [(4, 4)], mode="L")
    assert data.load("folder", str(tmp_path)).image_shape == (4, 4, 1)


@pytest.mark.parametrize("images, labels", [("train_images", "train_labels"), ("images", "labels"), ("arr_0", "arr_1")])
def test_an_npz_is_a_data_set(tmp_path, images, labels):
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", **{images: array, labels: np.arange(5)})
    source = data.load("npz", str(tmp_path / "set.npz"))
    batch = source[np.array([4, 1])]
    np.testing.assert_array_equal(batch.images, array[[4, 1]])
    assert batch.labels.tolist() == [4, 1] and source.num_classes == 5


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.data.path"):
        data.load("folder")
    with pytest.raises(ValueError, match="no image file"):
        data.load("folder", str(tmp_path))
    write_folder(tmp_path, [(4, 4), (5, 4)])
    with pytest.raises(ValueError, match=r"01.png is 5x4x3.*4x4x3"):
        data.load("folder", str(tmp_path))[np.array([0, 1])]
    (tmp_path / "00.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="00.png cannot be read"):
        data.load("folder", str(tmp_path))
    with pytest.raises(ValueError, match="config.data.path"):
        data.load("npz", str(tmp_path / "nope.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="bad.npz cannot be read"):
        data.load("npz", str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "pickled.npz", images=np.array([{"code": 1}], dtype=object))
    with pytest.raises(ValueError, match="pickled.npz cannot be read"):
        data.load("npz", str(tmp_path / "pickled.npz"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="none of train_images, images, arr_0; it holds x"):
        data.load("npz", str(tmp_path / "other.npz"))
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4, 3)))
    with pytest.raises(ValueError, match="uint8.*float64"):
        data.load("npz", str(tmp_path / "floats.npz"))
    with pytest.raises(ValueError, match="train, test, got 'valid'"):
        data.load("digits", split="valid")
