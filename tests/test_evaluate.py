"""`python -m ddim_jax.evaluate` as a user runs it."""

import json

import numpy as np
import pytest
from conftest import once
from PIL import Image
from processes import error_line, ok, run

from ddim_jax import data
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
        said = ok(run("ddim_jax.evaluate", *DIGITS, "--save_reference", folder / "train.npz"))
        assert said.stdout.splitlines() == [str(folder / "train.npz")]

    return once(tmp_path_factory, "statistics", make) / "train.npz"


def evaluate(*args):
    return run("ddim_jax.evaluate", *DIGITS, *args)


def numbers(process):
    pairs = (line.split(" ", 1) for line in ok(process).stdout.splitlines() if " " in line)
    return {name: float(value) for name, value in pairs if name in METRICS}


def test_samples_of_a_file_and_of_a_folder(samples, statistics, tmp_path):
    """The same numbers from images and from statistics, on one device and on eight, and those that NumPy gives."""
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
    out.write_text("mine")
    args = (FEW, "--samples", samples / "s.npz", "--config.evaluate.metrics=fid", "--out", out)
    assert "is already there; give another, or --overwrite" in error_line(evaluate(*args))
    assert out.read_text() == "mine"
    ok(evaluate(*args, "--overwrite"))
    assert json.loads(out.read_text())["fid"] > 0
    assert "--save_reference" in error_line(evaluate("--save_reference", statistics))


@pytest.mark.slow
def test_statistics_that_do_not_belong_are_refused(samples, statistics, tmp_path):
    said = error_line(
        evaluate(
            FEW,
            f"--config.evaluate.reference={statistics}",
            "--config.evaluate.split=test",
            "--samples",
            samples / "s.npz",
        )
    )
    assert "split is 'train' there, 'test' here (to compare all the same, --accept split)" in said
    accepted = evaluate(
        FEW,
        f"--config.evaluate.reference={statistics}",
        "--config.evaluate.split=test",
        "--accept=split,count",
        "--samples",
        samples / "s.npz",
    )
    assert numbers(accepted)["fid"] > 0
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((60, 16, 16, 1), np.uint8))
    said = error_line(evaluate(FEW, f"--config.evaluate.reference={statistics}", "--samples", tmp_path / "large.npz"))
    assert "config.evaluate.features: the digits classifier takes images of 8x8x1, got 16x16x1" in said
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    other = f"--config.evaluate.reference={tmp_path / 'other.npz'}"
    refused = evaluate(FEW, other, "--config.evaluate.metrics=fid", "--samples", samples / "s.npz")
    assert refused.returncode == 2 and "it has 7 features, digits-classifier has 64" in refused.stderr
    with np.load(statistics) as file:
        np.savez(tmp_path / "bare.npz", mu=file["mu"], sigma=file["sigma"])
    bare = (FEW, f"--config.evaluate.reference={tmp_path / 'bare.npz'}", "--samples", samples / "s.npz")
    process = evaluate(*bare, "--config.evaluate.metrics=fid")
    assert numbers(process)["fid"] > 0 and "warning: " in process.stderr and "origin is unknown" in process.stderr
    refused = evaluate(*bare)
    assert refused.returncode == 2 and "kid needs the features of the real images" in refused.stderr


def test_too_few_samples(samples):
    said = error_line(evaluate("--samples", samples / "s.npz"))
    assert "holds 60 images, and config.evaluate.num_images asks for 1000" in said


def test_jpegs_are_warned_of(samples, tmp_path):
    for i, image in enumerate(data.load("digits").images[:60]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:03d}.jpg")
    process = evaluate(
        FEW, f"--config.evaluate.reference={tmp_path}", "--config.evaluate.metrics=fid", "--samples", samples / "s.npz"
    )
    assert numbers(process)["fid"] > 0
    warnings = [line for line in process.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "60 of 60 images of" in warnings[0] and "are JPEG files" in warnings[0]


def test_images_that_are_broken_or_of_another_size(samples, statistics, tmp_path):
    for i, image in enumerate(data.load("digits").images[:60]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:03d}.png")
    args = (FEW, f"--config.evaluate.reference={statistics}", "--samples", tmp_path)
    good = (tmp_path / "042.png").read_bytes()
    (tmp_path / "042.png").write_bytes(good[:50])
    assert "042.png cannot be read as an image" in error_line(evaluate(*args))
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "042.png")
    assert "042.png is 9x8x1, the first image of its folder 8x8x1" in error_line(evaluate(*args))
    (tmp_path / "bad.npz").write_bytes((samples / "s.npz").read_bytes()[:-30])
    said = error_line(evaluate(FEW, "--samples", tmp_path / "bad.npz"))
    assert "bad.npz cannot be read as an .npz" in said


ANY_SIZE = """
import jax.numpy as jnp
from ddim_jax.evaluation.feature_network import Output, feature_network

def judge(params, images):
    mean = images.mean((1, 2))
    return Output(mean, mean)

def make(weights):
    return feature_network("any-size", judge, {})
"""


@pytest.mark.slow
def test_real_images_of_another_size(samples, tmp_path, monkeypatch):
    """By a judge who takes images of any size."""
    (tmp_path / "mine.py").write_text(ANY_SIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mine = ("--config.evaluate.features=mine:make", "--config.evaluate.metrics=fid", FEW)
    np.savez(tmp_path / "large.npz", arr_0=RNG.integers(0, 256, (60, 16, 16, 1), dtype=np.uint8))
    said = error_line(evaluate(*mine, "--samples", tmp_path / "large.npz"))
    assert "the real images (digits) are 8x8x1, the samples 16x16x1" in said
    large = f"--config.evaluate.reference={tmp_path / 'large.npz'}"
    saved = tmp_path / "large_statistics.npz"
    assert numbers(evaluate(*mine, large, "--samples", tmp_path / "large.npz", "--save_reference", saved))["fid"] < 10
    statistics = f"--config.evaluate.reference={saved}"
    said = error_line(evaluate(*mine, statistics, "--accept=data,split", "--samples", samples / "s.npz"))
    assert "does not belong to the samples: count is 60 there, 1438 here" in said
    said = error_line(evaluate(*mine, statistics, "--accept=data,split,count", "--samples", samples / "s.npz"))
    assert "does not belong to the samples: resolution is '16x16x1' there, '8x8x1' here" in said


NAN_AT_RANDOM = """
import jax.numpy as jnp
from ddim_jax.evaluation.feature_network import Output, feature_network

def judge(params, images):
    brightest = images.max((1, 2)).astype(jnp.float32)
    features = jnp.where(brightest < 255, jnp.nan, brightest)
    return Output(features, features)

def make(weights):
    return feature_network("mine", judge, {})
"""


def test_features_that_are_not_numbers(samples, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(NAN_AT_RANDOM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    images = data.load("digits").images
    bad = int(np.flatnonzero(images.max((1, 2, 3)) < 255)[0])
    said = error_line(evaluate(FEW, "--config.evaluate.features=mine:make", "--samples", samples / "s.npz"))
    assert said == f"error: the real images: the features of image {bad} are not finite (mine)"


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "--samples is missing"),
        (("--samples", "nope"), "--samples: there is no file or folder nope"),
        (("--samples", "S", "--config.evaluate.metrics=fid,kidd"), "config.evaluate.metrics: 'kidd' is not one of"),
        (("--samples", "S", "--config.evaluate.features=digit"), "did you mean 'digits'"),
        (("--samples", "S", "--config.evaluate.weights=w.safetensors"), "there is no file w.safetensors"),
        (("--samples", "S", "--config.evaluate.reference=nope.npz"), "reference: there is no file or folder nope.npz"),
        (("--samples", "S", "--config.evaluate.reference=README.md"), "README.md cannot be read as an .npz"),
        (("--samples", "S", "--config.evaluate.split=valid"), "config.evaluate.split: 'valid' is not one of"),
        (("--samples", "S", "--accept=splitt"), "--accept: 'splitt' is not one of data, split, crop"),
        (("--samples", "S", "--out", "/nope/there.json"), "--out: there is no folder /nope"),
        (("--samples", "S", "--config.evaluate.num_images=1"), "config.evaluate.num_images: must be at least 2"),
    ],
)
def test_mistakes_are_told_in_one_line(samples, args, said):
    args = [samples / "s.npz" if arg == "S" else arg for arg in args]
    few = () if any("num_images" in str(arg) for arg in args) else (FEW,)
    assert said in error_line(evaluate(*few, *args))


def test_statistics_tell_data_sets_of_tensorflow_datasets_apart():
    """Two that are read by the same name of ours, and a folder wherever it lies."""
    from configs import digits
    from ddim_jax import config
    from ddim_jax.config import evaluation

    def name(**fields):
        values = digits.get_config().to_dict()
        values["data"].update(fields)
        return evaluation._data_name(config.parse(values))

    assert name(name="tfds", path="mnist") == "mnist" != name(name="tfds", path="lsun/bedroom")
    assert name(name="folder", path="/a/faces") == name(name="folder", path="b/faces") == "faces"
    assert name(name="cifar10") == "cifar10" and name(name="npz", path="") is None


# --- the network itself ---

BITS = (*DIGITS, "--metric=bits_per_dim", "--config.evaluate.split=test", "--config.evaluate.num_images=12")


def bits(*args):
    said = ok(run("ddim_jax.evaluate", *BITS, "--config.sample.steps=20", *args)).stdout
    return float(said.split("bits_per_dim")[1].split()[0]), said


@pytest.mark.slow
def test_bits_per_dimension():
    """Of images i, whatever the batch; fewer than the 8 of noise, and more than nothing."""
    few, said = bits("--config.sample.eta=1", "--config.evaluate.batch_size=12")
    again, _ = bits("--config.sample.eta=1", "--config.evaluate.batch_size=5")
    assert "12 images (test), 20 steps, eta 1" in said and again == pytest.approx(few, rel=1e-4)
    assert 1 < few < 8


@pytest.mark.parametrize(
    "args, said",
    [
        (("--metric=bits",), "--metric: 'bits' is not one of bits_per_dim (did you mean 'bits_per_dim'?)"),
        ((), "config.sample.eta: must be above 0 for bits_per_dim, got 0.0"),
        (("--config.sample.eta=1", "--config.sample.tau_end=5"), "config.sample.tau_end: must be 0"),
        (("--config.sample.eta=1", "--config.data.name=npz"), "config.data: data set 'npz' needs a file"),
    ],
)
def test_mistakes_of_bits_per_dimension(args, said):
    assert said in error_line(run("ddim_jax.evaluate", *BITS, *args))
