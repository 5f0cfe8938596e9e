import numpy as np
import pytest
from messages import raises
from PIL import Image

from ddim_jax.utils import files, images

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_contains_every_image_in_order(channels):
    batch = RNG.integers(0, 256, (5, 64, 64, channels), dtype=np.uint8)
    picture = images.grid(batch, columns=3, gap=2)
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, channels)
    for i in range(5):
        top, left = i // 3 * 66 + 2, i % 3 * 66 + 2
        np.testing.assert_array_equal(picture[top : top + 64, left : left + 64], batch[i])
    assert (picture[68:, 134:] == 255).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    batch = RNG.integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    picture = images.grid(batch, gap=0)
    assert picture.shape == (48, 48, 1)
    np.testing.assert_array_equal(picture[::6, ::6], batch[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_and_npz_are_read_by_pillow_and_numpy(tmp_path, channels):
    batch = RNG.integers(0, 256, (5, 4, 6, channels), dtype=np.uint8)
    images.write_png(tmp_path / "a.png", batch[0])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")).reshape(4, 6, channels), batch[0])
    halves = [{"arr_0": batch[i], "arr_1": np.arange(5)[i]} for i in (slice(0, 2), slice(2, 5))]
    images.write_npz(tmp_path / "a.npz", 5, lambda: iter(halves))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"] and file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["arr_0"], batch)
        np.testing.assert_array_equal(file["arr_1"], np.arange(5))
    found = images.open_npz(tmp_path / "a.npz")
    assert list(found) == ["arr_0", "arr_1"] and isinstance(found["arr_0"], np.memmap)
    np.testing.assert_array_equal(found["arr_0"], batch)
    np.testing.assert_array_equal(found["arr_1"], np.arange(5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]


@pytest.mark.parametrize("save, mapped", [(np.savez, True), (np.savez_compressed, False)])
def test_arrays_of_other_programs(tmp_path, save, mapped):
    """Any memory order, any dtype, empty arrays, names that are not ASCII."""
    batch = RNG.normal(size=(3, 4, 5))
    arrays = {
        "c": batch,
        "f": np.asfortranarray(batch),
        "none": np.zeros((0, 3)),
        "ü": np.arange(3),
        "s": np.array("x"),
    }
    save(tmp_path / "a.npz", **arrays)
    found = images.open_npz(tmp_path / "a.npz")
    assert list(found) == list(arrays) and isinstance(found["c"], np.memmap) == mapped
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    save(tmp_path / "b.npz", code=np.array([{"a": 1}], dtype=object))
    with raises(ValueError, "b.npz", "allow_pickle"):
        images.open_npz(tmp_path / "b.npz")


def test_a_gif_has_all_frames(tmp_path):
    frames = [np.full((8, 8, 1), value, np.uint8) for value in (0, 100, 200)]
    images.write_gif(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 3 and file.info["loop"] == 0
        file.seek(2)
        assert abs(int(np.asarray(file.convert("L"))[0, 0]) - 200) < 3


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as file:
        file.write(b"ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
