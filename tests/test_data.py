import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import raises
from PIL import Image

from ddim_jax import data
from ddim_jax.data.batches import order
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.data.sources import ArraySource


def numbered(count):
    """A data set in which the first pixel of image i is i."""
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
    """The batches from step 7 on equal those of a stream from step 0, with flips."""
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
    with raises(ValueError, "16", "3"):
        data.batches(data.Plan(numbered(50), 16, 1, num_shards=3))


def test_flips_mirror_half_of_the_images_left_to_right():
    images = np.concatenate([batch.images for batch in take(numbered(50), 20, 50, seed=0, flip=True)])
    mirrored = images[:, 0, 0, 0] == 255
    assert 0.4 < mirrored.mean() < 0.6
    assert (images[~mirrored, 0, 2, 0] == 255).all() and (images[:, 1] == 0).all()
    assert not np.array_equal(mirrored[:50], mirrored[50:100])
    assert (np.concatenate([batch.images for batch in take(numbered(50), 5, 50, seed=0)])[:, 0, 2, 0] == 255).all()


def test_scaling_to_unit_and_back_keeps_all_pixels():
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


def test_a_folder_of_grey_images_has_one_channel(tmp_path):
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


# --- a folder of images of mixed sizes ---

SIZES = [
    (12, 20),
    (21, 13),
    (8, 8),
    (5, 9),
    (30, 7),
]  # height, width; odd and even differences, smaller and larger than 8


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name, resample", [("lanczos", Image.LANCZOS), ("bicubic", Image.BICUBIC), ("box", Image.BOX)])
def test_images_of_mixed_sizes_are_cropped_and_resized(tmp_path, name, resample, mode):
    """The pixels are those of Pillow's own crop and resize of each file."""
    write_folder(tmp_path, SIZES, mode)
    source = data.load("folder", str(tmp_path), options={"image_size": 8, "resize": name})
    channels = 3 if mode == "RGB" else 1
    assert len(source) == len(SIZES) and source.image_shape == (8, 8, channels) and source.num_classes == 0
    batch = source[np.array([3, 0, 1, 4, 2])]
    assert batch.labels is None and batch.images.dtype == np.uint8
    for image, i in zip(batch.images, [3, 0, 1, 4, 2], strict=True):
        with Image.open(tmp_path / f"{i:02d}.png") as file:
            side = min(file.size)
            left, top = (file.width - side) // 2, (file.height - side) // 2
            expected = file.crop((left, top, left + side, top + side)).resize((8, 8), resample)
        np.testing.assert_array_equal(image, np.asarray(expected).reshape(8, 8, channels))


def test_the_crop_is_the_centred_square_and_the_resize_keeps_means(tmp_path):
    """By NumPy: a wide image with a grey square in its middle, and the means of 2x2 blocks."""
    rng = np.random.default_rng(1)
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = square = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "0.png")
    Image.fromarray(wide.swapaxes(0, 1)).save(tmp_path / "1.png")
    source = data.load("folder", str(tmp_path), options={"image_size": 8, "resize": "box"})
    means = square.reshape(8, 2, 8, 2, 3).mean((1, 3))
    for image, expected in zip(source[np.arange(2)].images, (means, means.swapaxes(0, 1)), strict=True):
        assert np.abs(image - expected).max() <= 1  # Pillow rounds after the rows and after the columns
    whole = data.load("folder", str(tmp_path), options={"image_size": 16})
    np.testing.assert_array_equal(whole[np.arange(2)].images, [square, square.swapaxes(0, 1)])  # no resampling


def test_the_options_of_a_folder_change_its_fingerprint_and_its_metadata(tmp_path):
    write_folder(tmp_path, [(16, 16)] * 3)
    options = ({}, {"image_size": 8}, {"image_size": 8, "resize": "box"}, {"image_size": 8, "crop": "none"})
    sources = [data.load("folder", str(tmp_path), options=chosen) for chosen in options]
    assert (
        len({source.crop for source in sources}) == len({data.fingerprint(source) for source in sources[:3]}) + 1 == 4
    )
    assert sources[0].crop == "none" and "8x8" in sources[1].crop and "box" in sources[2].crop
    np.testing.assert_array_equal(sources[3][np.arange(3)].images, sources[1][np.arange(3)].images)  # they are square


@pytest.mark.parametrize("ahead", [{"threads": 2}, {"workers": 1}])
def test_cropped_images_in_batches_and_in_memory(tmp_path, ahead):
    write_folder(tmp_path, SIZES)
    source = data.load("folder", str(tmp_path), options={"image_size": 8})
    copy = data.in_memory(source, chunk=2)
    stream = data.batches(data.Plan(source, 4, seed=0), **ahead)
    for expected, batch in zip(take(copy, 3, 4, seed=0), stream, strict=False):
        np.testing.assert_array_equal(batch.images, expected.images)
    stream.close()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image_sise": 8}, ("image_sise", "'image_size'")),
        ({"image_size": 0}, ("image_size", "got 0")),
        ({"image_size": "8"}, ("image_size", "integer", "got '8'")),
        ({"image_size": 8, "crop": "centre"}, ("crop", "'centre'", "'center'")),
        ({"image_size": 8, "resize": "lanzcos"}, ("resize", "'lanzcos'", "'lanczos'")),
        ({"image_size": 8, "crop": "none"}, ("00.png", "crop", "12x20")),
    ],
)
def test_invalid_options_of_a_folder_are_named(tmp_path, options, words):
    write_folder(tmp_path, SIZES)
    with raises(ValueError, *words):
        data.load("folder", str(tmp_path), options=options)


def test_an_option_of_another_data_set_is_refused():
    with raises(ValueError, "image_size", "digits"):
        data.load("digits", options={"image_size": 8})


def test_mixed_sizes_without_image_size_are_refused_and_the_option_is_named(tmp_path):
    write_folder(tmp_path, SIZES)
    with raises(ValueError, "01.png", "21x13x3", "12x20x3", "image_size"):
        data.load("folder", str(tmp_path))[np.arange(2)]


def test_grey_and_color_images_in_one_folder_are_refused(tmp_path):
    write_folder(tmp_path, [(12, 20)])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "grey.png")
    with raises(ValueError, "grey.png", "1", "3"):
        data.load("folder", str(tmp_path), options={"image_size": 8})[np.arange(2)]


# --- errors ---


def test_invalid_data_is_refused(tmp_path):
    with raises(ValueError, "config.data.path", "'folder'", "got ''"):
        data.load("folder")
    with raises(ValueError, str(tmp_path), ".png"):
        data.load("folder", str(tmp_path))
    write_folder(tmp_path, [(4, 4), (5, 4)])
    with raises(ValueError, "01.png", "5x4x3", "4x4x3"):
        data.load("folder", str(tmp_path))[np.array([0, 1])]
    (tmp_path / "00.png").write_bytes(b"not a picture")
    with raises(ValueError, "00.png"):
        data.load("folder", str(tmp_path))
    with raises(ValueError, "config.data.path", "'npz'", "nope.npz"):
        data.load("npz", str(tmp_path / "nope.npz"))
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    with raises(ValueError, "bad.npz"):
        data.load("npz", str(tmp_path / "bad.npz"))
    np.savez(tmp_path / "pickled.npz", images=np.array([{"code": 1}], dtype=object))
    with raises(ValueError, "pickled.npz"):
        data.load("npz", str(tmp_path / "pickled.npz"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with raises(ValueError, "other.npz", "train_images", "images", "arr_0", "x"):
        data.load("npz", str(tmp_path / "other.npz"))
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4, 3)))
    with raises(ValueError, "floats.npz", "uint8", "float64"):
        data.load("npz", str(tmp_path / "floats.npz"))
    with raises(ValueError, "split", "train", "test", "got 'valid'"):
        data.load("digits", split="valid")
