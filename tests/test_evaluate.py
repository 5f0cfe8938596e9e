"""`python -m ddim_jax.evaluate` as a process."""

import json

import numpy as np
import pytest
from conftest import once
from messages import assert_names, missing
from PIL import Image
from processes import error_line, ok, run
from test_prepared import prepare

from configs import digits
from ddim_jax import config as config_lib
from ddim_jax import data
from ddim_jax.config import evaluation
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import frechet

DIGITS = ("--config", "configs/digits.py")
FEW = "--config.evaluate.num_images=50"
RNG = np.random.default_rng(0)
METRICS = [
    *("fid", "kid", "kid_std", "kid_subset_size", "inception_score", "inception_score_std", "inception_score_splits"),
    *("precision", "recall", "confidence", "smallest_share", "largest_share", "nearest"),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """An .npz of 60 images and a folder of the same as PNG."""
    root = tmp_path_factory.mktemp("samples")
    images = data.load("digits", split="test").images[:60]
    np.savez(root / "s.npz", arr_0=images)
    (root / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(root / "png" / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    def make(folder):
        done = ok(run("ddim_jax.evaluate", *DIGITS, "--save_reference", folder / "train.npz"))
        assert done.stdout.splitlines() == [str(folder / "train.npz")]

    return once(tmp_path_factory, "statistics", make) / "train.npz"


def evaluate(*args):
    return run("ddim_jax.evaluate", *DIGITS, *args)


def numbers(process):
    pairs = (line.split(" ", 1) for line in ok(process).stdout.splitlines() if " " in line)
    return {name: float(value) for name, value in pairs if name in METRICS}


def test_samples_of_a_file_and_of_a_folder(samples, statistics, tmp_path):
    """The same numbers from images and from statistics, on one device and on eight, and by NumPy."""
    out = tmp_path / "numbers.json"
    first = numbers(evaluate(FEW, "--samples", samples / "s.npz", "--out", out))
    assert list(first) == METRICS
    saved = f"--config.evaluate.reference={statistics}"
    small = "--config.evaluate.batch_size=7"
    assert numbers(run("ddim_jax.evaluate", *DIGITS, FEW, saved, small, "--samples", samples / "png", devices=8)) == {
        name: pytest.approx(value, rel=2e-4, abs=1e-3) for name, value in first.items()
    }
    report = json.loads(out.read_text())
    assert report["images"] == 50 and report["reference"]["count"] == 1438 and report["reference"]["split"] == "train"
    feature_fn = features_lib.open_features("digits").feature_fn
    moments = [
        frechet.moments(np.asarray(feature_fn(images).features))
        for images in (data.load("digits", split="test").images[:50], data.load("digits").images)
    ]
    assert report["fid"] == pytest.approx(frechet.distance(*moments), rel=1e-4)


def test_results_are_not_overwritten(samples, statistics, tmp_path):
    out = tmp_path / "numbers.json"
    out.write_text("of the user")
    args = (FEW, "--samples", samples / "s.npz", "--config.evaluate.metrics=fid", "--out", out)
    error_line(evaluate(*args), "--out", str(out), "--overwrite")
    assert out.read_text() == "of the user"
    ok(evaluate(*args, "--overwrite"))
    assert json.loads(out.read_text())["fid"] > 0
    before = statistics.read_bytes()
    error_line(evaluate("--save_reference", statistics), "--save_reference", str(statistics))
    assert statistics.read_bytes() == before


@pytest.mark.slow
def test_statistics_that_do_not_match_are_refused(samples, statistics, tmp_path):
    saved = f"--config.evaluate.reference={statistics}"
    held_out = (FEW, saved, "--config.evaluate.split=test", "--samples", samples / "s.npz")
    error_line(evaluate(*held_out), str(statistics), "split", "'train'", "'test'", "--accept split")
    assert numbers(evaluate(*held_out, "--accept=split,count"))["fid"] > 0
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((60, 16, 16, 1), np.uint8))
    large = evaluate(FEW, saved, "--samples", tmp_path / "large.npz")
    error_line(large, "config.evaluate.features", "8x8x1", "got 16x16x1")
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    other = f"--config.evaluate.reference={tmp_path / 'other.npz'}"
    process = evaluate(FEW, other, "--config.evaluate.metrics=fid", "--samples", samples / "s.npz")
    warning, error = process.stderr.splitlines()
    assert process.returncode == 2 and warning.startswith("warning: ")
    assert_names(error, "other.npz", "7", "64")
    with np.load(statistics) as file:
        np.savez(tmp_path / "bare.npz", mu=file["mu"], sigma=file["sigma"])
    bare = (FEW, f"--config.evaluate.reference={tmp_path / 'bare.npz'}", "--samples", samples / "s.npz")
    process = evaluate(*bare, "--config.evaluate.metrics=fid")
    assert numbers(process)["fid"] > 0
    (warning,) = warnings_of(process)
    assert_names(warning, "bare.npz")
    process = evaluate(*bare)
    assert process.returncode == 2
    assert_names(process.stderr.splitlines()[-1], "config.evaluate.reference", "kid", "features")


def warnings_of(process):
    return [line for line in process.stderr.splitlines() if line.startswith("warning: ")]


def test_too_few_samples(samples):
    error_line(evaluate("--samples", samples / "s.npz"), "s.npz", "60", "config.evaluate.num_images", "1000")


def test_jpeg_files_give_a_warning(samples, tmp_path):
    for i, image in enumerate(data.load("digits").images[:60]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:03d}.jpg")
    process = evaluate(
        FEW, f"--config.evaluate.reference={tmp_path}", "--config.evaluate.metrics=fid", "--samples", samples / "s.npz"
    )
    assert numbers(process)["fid"] > 0
    (warning,) = warnings_of(process)
    assert_names(warning, "60 of 60", "JPEG")


def test_damaged_images_and_images_of_another_size_are_named(samples, statistics, tmp_path):
    for i, image in enumerate(data.load("digits").images[:60]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:03d}.png")
    args = (FEW, f"--config.evaluate.reference={statistics}", "--samples", tmp_path)
    good = (tmp_path / "042.png").read_bytes()
    (tmp_path / "042.png").write_bytes(good[:50])
    error_line(evaluate(*args), "--samples", "042.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "042.png")
    error_line(evaluate(*args), "--samples", "042.png", "9x8x1", "8x8x1")
    (tmp_path / "bad.npz").write_bytes((samples / "s.npz").read_bytes()[:-30])
    error_line(evaluate(FEW, "--samples", tmp_path / "bad.npz"), "--samples", "bad.npz")


ANY_SIZE = """
import jax.numpy as jnp
from ddim_jax.evaluation.feature_network import Output, feature_network

def extract(params, images):
    mean = images.mean((1, 2))
    return Output(mean, mean)

def make(weights):
    return feature_network("any-size", extract, {})
"""


@pytest.mark.slow
def test_real_images_of_another_size(samples, tmp_path, monkeypatch):
    """With a feature network for images of any size."""
    (tmp_path / "mine.py").write_text(ANY_SIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mine = ("--config.evaluate.features=mine:make", "--config.evaluate.metrics=fid", FEW)
    np.savez(tmp_path / "large.npz", arr_0=RNG.integers(0, 256, (60, 16, 16, 1), dtype=np.uint8))
    error_line(evaluate(*mine, "--samples", tmp_path / "large.npz"), "digits", "8x8x1", "16x16x1")
    large = f"--config.evaluate.reference={tmp_path / 'large.npz'}"
    saved = tmp_path / "large_statistics.npz"
    assert numbers(evaluate(*mine, large, "--samples", tmp_path / "large.npz", "--save_reference", saved))["fid"] < 10
    args = (*mine, f"--config.evaluate.reference={saved}", "--samples", samples / "s.npz")
    error_line(evaluate(*args, "--accept=data,split"), str(saved), "count", "60", "1438", "--accept count")
    error_line(evaluate(*args, "--accept=data,split,count"), str(saved), "resolution", "'16x16x1'", "'8x8x1'")


NAN_AT_RANDOM = """
import jax.numpy as jnp
from ddim_jax.evaluation.feature_network import Output, feature_network

def extract(params, images):
    brightest = images.max((1, 2)).astype(jnp.float32)
    features = jnp.where(brightest < 255, jnp.nan, brightest)
    return Output(features, features)

def make(weights):
    return feature_network("mine", extract, {})
"""


def test_features_that_are_not_finite(samples, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(NAN_AT_RANDOM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    images = data.load("digits").images
    bad = int(np.flatnonzero(images.max((1, 2, 3)) < 255)[0])
    process = evaluate(FEW, "--config.evaluate.features=mine:make", "--samples", samples / "s.npz")
    error_line(process, "the real images", f"image {bad}", "finite", "mine")


@pytest.mark.parametrize(
    "args, words",
    [
        ((), ("--samples",)),
        (("--samples", "nope"), ("--samples", "nope")),
        (("--samples", "S", "--config.evaluate.metrics=fid,kidd"), ("config.evaluate.metrics", "'kidd'", "'kid'")),
        (("--samples", "S", "--config.evaluate.features=digit"), ("config.evaluate.features", "'digit'", "'digits'")),
        (("--samples", "S", "--config.evaluate.weights=w.safetensors"), ("config.evaluate.weights", "w.safetensors")),
        (("--samples", "S", "--config.evaluate.reference=nope.npz"), ("config.evaluate.reference", "nope.npz")),
        (("--samples", "S", "--config.evaluate.reference=README.md"), ("config.evaluate.reference", "README.md")),
        (("--samples", "S", "--config.evaluate.split=valid"), ("config.evaluate.split", "'valid'", "train", "test")),
        (("--samples", "S", "--accept=splitt"), ("--accept", "'splitt'", "'split'")),
        (("--samples", "S", "--out", "/nope/there.json"), ("--out", "/nope")),
        (("--samples", "S", "--config.evaluate.num_images=1"), ("config.evaluate.num_images", "2", "got 1")),
    ],
)
def test_an_error_is_one_line_that_names_its_cause(samples, args, words):
    args = [samples / "s.npz" if arg == "S" else arg for arg in args]
    few = () if any("num_images" in str(arg) for arg in args) else (FEW,)
    error_line(evaluate(*few, *args), *words)


def test_statistics_name_their_data_set(tmp_path, monkeypatch, mesh):
    """A folder by its base name, a data set of tensorflow-datasets by its name there."""
    import tensorflow_datasets as tfds

    images = data.load("digits", split="test").images[:20, ..., 0]
    rows = [(i, {"image": Image.fromarray(image)}) for i, image in enumerate(images)]
    for name in ("first", "second"):
        prepare(tmp_path, name, {"image": tfds.features.Image(shape=(8, 8, 1))}, {"train": rows})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for parent in ("a", "b"):
        (tmp_path / parent / "faces").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / parent / "faces" / f"{i}.png")

    def about(**fields):
        values = digits.get_config().to_dict()
        values["data"].update(fields)
        config = config_lib.parse(values)
        evaluator = evaluation.evaluator(config, evaluation.open_network(config), mesh, None)
        return evaluator.reference.about

    assert about(name="digits").data == "digits"
    for name in ("first", "second"):
        assert about(name="tfds", path=name).data == name
    assert [about(name="folder", path=str(tmp_path / parent / "faces")).data for parent in "ab"] == ["faces"] * 2


# --- likelihoods of the network ---

BITS = (*DIGITS, "--metric=bits_per_dim", "--config.evaluate.split=test", "--config.evaluate.num_images=12")


def bits(*args):
    output = ok(run("ddim_jax.evaluate", *BITS, "--config.sample.steps=20", *args)).stdout
    return float(output.split("bits_per_dim")[1].split()[0]), output


@pytest.mark.slow
def test_bits_per_dimension():
    """The same for every batch size, and below the 8 bits of noise."""
    found, output = bits("--config.sample.eta=1", "--config.evaluate.batch_size=12")
    other, _ = bits("--config.sample.eta=1", "--config.evaluate.batch_size=5")
    assert other == pytest.approx(found, rel=1e-4) and 1 < found < 8
    assert not missing(output, "12 images", "test", "20 steps", "eta 1")


@pytest.mark.parametrize(
    "args, words",
    [
        (("--metric=bits",), ("--metric", "'bits'", "'bits_per_dim'")),
        ((), ("config.sample.eta", "bits_per_dim", "got 0.0")),
        (("--config.sample.eta=1", "--config.sample.tau_end=5"), ("config.sample.tau_end", "0", "got 5")),
        (("--config.sample.eta=1", "--config.data.name=npz"), ("config.data", "'npz'", "config.data.path")),
    ],
)
def test_errors_of_bits_per_dimension_name_the_field(args, words):
    error_line(run("ddim_jax.evaluate", *BITS, *args), *words)
