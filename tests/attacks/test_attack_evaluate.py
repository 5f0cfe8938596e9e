"""The command evaluate: invalid statistics, invalid images, output files, and options without effect."""

import dataclasses
import io
import json
import os
import pathlib
import tempfile
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from attacking import holds, refused, refuses
from hypothesis import given
from hypothesis import strategies as st
from mutations import altered
from processes import run

from configs import digits, digits_conditional
from ddim_jax import config as config_lib
from ddim_jax import data, evaluate, losses, sampling
from ddim_jax.config import evaluation
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import frechet, reference
from ddim_jax.utils import images, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError

RNG = np.random.default_rng(0)
ERRORS = (ValueError, CheckpointError)
FEW = {"evaluate.num_images": 20, "evaluate.metrics": "fid"}
FEATURES = RNG.normal(size=(12, 3)).astype(np.float32)


def config_of(changes, base=digits):
    values = base.get_config().to_dict()
    for field, value in changes.items():
        section, name = field.split(".")
        values[section][name] = value
    return config_lib.parse(values)


def command(changes=FEW, base=digits, **given):
    """`python -m ddim_jax.evaluate` in this process."""
    config = config_of(changes, base)
    defaults = {name: default for name, (default, _) in evaluate.OPTIONS.items()}
    return evaluate.main(types.SimpleNamespace(config=config, values=dataclasses.asdict(config), **defaults | given))


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=data.load("digits", split="test").images[:20])
    return str(tmp_path / "s.npz")


def about(**changes):
    network = features_lib.open_features("digits")
    known = reference.about(data.load("digits"), "8x8x1", network, "digits", "train")
    return dataclasses.replace(known, count=12, **changes)


ABOUT = about()


def statistics(**changes):
    """The arrays of a file of statistics. changes: other arrays; None leaves an array out."""
    moments = frechet.moments(FEATURES)
    arrays = {"mu": moments.mean, "sigma": moments.cov, "features": FEATURES}
    arrays |= {"about": np.array(json.dumps(dataclasses.asdict(ABOUT)))} | changes
    return {name: array for name, array in arrays.items() if array is not None}


# --- files of statistics ---


def described(**changes):
    return np.array(json.dumps({**dataclasses.asdict(ABOUT), **changes}))


STATISTICS = {
    "deep JSON": {"about": np.array("[" * 100_000)},
    "deep JSON in a field": {"about": np.array('{"data": ' + "[" * 100_000 + "]" * 100_000 + "}")},
    "invalid JSON": {"about": np.array("{nothing")},
    "JSON that is not a dict": {"about": np.array("[1, 2]")},
    "JSON without fields": {"about": np.array("{}")},
    "an unknown field": {"about": described(code="import os")},
    "a field with control characters": {"about": described(**{"\x1b[31m": 1})},
    "a count that is a string": {"about": described(count="12")},
    "a count that is true": {"about": described(count=True)},
    "a fractional count": {"about": described(count=12.5)},
    "a count below 1": {"about": described(count=-12)},
    "a count that is not the number of features": {"about": described(count=11)},
    "data that are a list": {"about": described(data=["digits"])},
    "a resolution that is a number": {"about": described(resolution=8)},
    "a version that is NaN": {"about": described(version=float("nan"))},
    "about as numbers": {"about": np.arange(3)},
    "about as two strings": {"about": np.array(["{}", "{}"])},
    "about as bytes": {"about": np.array(b"{}")},
    "objects": {"mu": np.array([{}], object)},
    "strings": {"mu": np.array(["1", "2", "3"])},
    "complex numbers": {"sigma": np.eye(3) + 1j},
    "bools": {"sigma": np.eye(3) > 0},
    "times": {"mu": np.arange(3).astype("M8[s]")},
    "NaN": {"mu": np.full(3, np.nan)},
    "infinity": {"sigma": np.full((3, 3), np.inf)},
    "no mu": {"mu": None},
    "no sigma": {"sigma": None},
    "mu and sigma exchanged": {"mu": np.eye(3), "sigma": np.zeros(3)},
    "another size": {"sigma": np.eye(4)},
    "a matrix that is not square": {"sigma": np.eye(3)[:, :2]},
    "a long mu": {"mu": np.zeros(10**6)},
    "no features": {"mu": np.zeros(0), "sigma": np.zeros((0, 0)), "features": None},
    "scalars": {"mu": np.array(3.0), "sigma": np.array(3.0)},
    "a negative variance": {"sigma": -np.eye(3)},
    "a covariance that is not symmetric": {"sigma": np.triu(np.ones((3, 3)))},
    "features of another size": {"features": np.zeros((12, 4), np.float32)},
    "features of one axis": {"features": np.zeros(36, np.float32)},
    "features that are NaN": {"features": np.full((12, 3), np.nan, np.float32)},
    "features that are strings": {"features": np.full((12, 3), "1")},
}


@pytest.mark.parametrize("name", STATISTICS)
def test_invalid_statistics(name, tmp_path):
    np.savez(tmp_path / "s.npz", **statistics(**STATISTICS[name]))
    message = refuses(lambda: reference.load(tmp_path / "s.npz"), "s.npz", "--save_reference")
    holds(message.isprintable() and len(message) < 1200, message)


def test_statistics_of_other_programs(tmp_path):
    """Without metadata, and without features."""
    for arrays in ({"about": None, "features": None}, {"about": None}, {"features": None}, {}):
        np.savez(tmp_path / "s.npz", **statistics(**arrays))
        found = reference.load(tmp_path / "s.npz")
        holds((found.features.moments.mean == statistics()["mu"]).all())
        holds("features" in arrays or (found.features.features == FEATURES).all() and found.features.count == 12)


@given(st.data())
def test_damaged_statistics(data):
    """An error that names the file, or the original statistics."""
    save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
    file = io.BytesIO()
    save(file, **statistics())
    content = bytearray(file.getvalue())
    content = altered(data, content, ["cut", "flip", "flip", "swap", "zero", "insert"], 2)
    with tempfile.TemporaryDirectory() as root:
        path = pathlib.Path(root, "s.npz")
        path.write_bytes(content)
        try:
            found = reference.load(path)
        except ValueError as error:
            holds("s.npz" in str(error) and str(error).isprintable(), str(error))
        else:
            moments = statistics()
            holds(
                (found.features.moments.mean == moments["mu"]).all() and found.about in (ABOUT, None),
                "other statistics",
            )


def test_a_mu_larger_than_the_memory(tmp_path):
    """By its header: the content is not read."""
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000,), }"
    huge = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(800)
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", huge)
        archive.writestr("sigma.npy", huge)
    refuses(lambda: reference.load(tmp_path / "s.npz"), "s.npz")


def test_a_difference_is_printed_in_one_line():
    for value in ("x" * 10**6, "\x1b[31m", "a\nb"):
        message = reference.difference(dataclasses.replace(ABOUT, data=value), ABOUT)
        holds(message.isprintable() and len(message) < 500, message[:300])


def test_damaged_statistics_in_the_cache_are_recomputed(tmp_path, capsys):
    config, mesh = config_of(FEW), sharding.data_mesh()
    network = evaluation.open_network(config)
    stored = tmp_path / "reference.npz"
    whole = evaluation.evaluator(config, network, mesh, (8, 8, 1), (), stored).reference
    stored.write_bytes(stored.read_bytes()[:-200])
    recomputed = evaluation.evaluator(config, network, mesh, (8, 8, 1), (), stored).reference
    holds((recomputed.features.moments.cov == whole.features.moments.cov).all())
    message = capsys.readouterr().err
    holds(str(stored) in message, message)
    holds((reference.load(stored).features.moments.mean == whole.features.moments.mean).all())


# --- input files ---


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices(make, samples, tmp_path):
    make(tmp_path / "x")
    x = str(tmp_path / "x")
    refuses(lambda: command(samples=x), "--samples", x)
    refuses(lambda: command(FEW | {"evaluate.reference": x}, samples=samples), "config.evaluate.reference", x)
    refuses(lambda: command(FEW | {"evaluate.weights": x}, samples=samples), "config.evaluate.weights", x)
    for name in ("npz", "folder"):
        changes = FEW | {"data.name": name, "data.path": x}
        refuses(lambda changes=changes: command(changes, samples=samples), "config.data", x)
    bits = {"sample.eta": 1.0, "evaluate.reference": x}
    refuses(lambda: command(bits, metric="bits_per_dim"), "config.evaluate.reference", x)


@pytest.mark.parametrize(
    "name", [".x:make", ":make", "x:", "os:path", "json:dumps.x", "\x1b[31m:x", "no such:x", "a" * 9999]
)
def test_invalid_names_of_feature_networks(name, samples):
    message = refuses(lambda: command(FEW | {"evaluate.features": name}, samples=samples), "config.evaluate.features")
    holds(len(message) < 500, message)


def test_the_output_folder_of_sample_is_evaluated(samples, tmp_path):
    """samples.npz is evaluated, and not grid.png and film.png. The numbers are those of the file alone."""
    out = tmp_path / "out"
    out.mkdir()
    drawn = images.open_npz(pathlib.Path(samples))["arr_0"]
    images.write_npz(out / "samples.npz", 20, lambda: [{"arr_0": drawn}])
    (out / "run.json").write_text("{}")
    for name in ("grid.png", "film.png"):
        images.write_png(out / name, images.grid(drawn))
    numbers = []
    for path in (samples, str(out)):
        command(samples=path, out=str(tmp_path / f"{len(numbers)}.json"))
        numbers.append(json.loads((tmp_path / f"{len(numbers)}.json").read_text())["fid"])
    holds(numbers[0] == numbers[1], str(numbers))
    refuses(lambda: command({"evaluate.num_images": 2}, samples=str(tmp_path)), "--samples", str(out))


# --- output files ---


@pytest.mark.parametrize("option", ["out", "save_reference"])
@pytest.mark.parametrize("path", ["/proc/x", "/sys/x", "/dev/null", "/nowhere/x", "F/x", "D", "P", "x" * 300])
def test_a_file_that_cannot_be_written_is_an_early_error(option, path, samples, tmp_path, monkeypatch):
    """Before the evaluation, and without a new file."""
    (tmp_path / "F").touch()
    (tmp_path / "D").mkdir()
    os.mkfifo(tmp_path / "P")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(evaluation, "evaluator", lambda *args: pytest.fail("the evaluation began"))
    monkeypatch.chdir(tmp_path)
    refuses(
        lambda: command(samples=samples, overwrite=True, **{option: path}), f"--{option}", errors=(ValueError, OSError)
    )
    holds(sorted(tmp_path.rglob("*")) == before)


@pytest.mark.parametrize("option", ["out", "save_reference"])
def test_an_input_file_is_not_overwritten(option, samples, tmp_path):
    np.savez(tmp_path / "r.npz", **statistics())
    link = tmp_path / "link.npz"
    link.symlink_to(samples)
    changes = FEW | {"evaluate.reference": str(tmp_path / "r.npz")}
    inputs = {samples: "samples", str(link): "samples", str(tmp_path / "r.npz"): "config.evaluate.reference"}
    for path, name in inputs.items():
        before = pathlib.Path(path).read_bytes()
        given = {option: path, "samples": samples, "overwrite": True}
        refuses(lambda given=given: command(changes, **given), f"--{option}", path, name)
        holds(pathlib.Path(path).read_bytes() == before)
    both = {"out": str(tmp_path / "n"), "save_reference": str(tmp_path / "n")}
    refuses(lambda: command(samples=samples, **both), "--out", "save_reference", str(tmp_path / "n"))


# --- options without effect ---


@pytest.mark.parametrize(
    "given, option",
    [
        ({"workdir": "runs/x", "samples": "S"}, "--workdir"),
        ({"workdir": "runs/x", "save_reference": "R"}, "--workdir"),
        ({"samples": "S", "metric": "bits_per_dim"}, "--samples"),
        ({"save_reference": "R", "metric": "bits_per_dim"}, "--save_reference"),
        ({"accept": "split", "metric": "bits_per_dim"}, "--accept"),
        ({"accept": "split", "save_reference": "R"}, "--accept"),
        ({"accept": "split", "samples": "S"}, "--accept"),
        ({"out": "N", "save_reference": "R"}, "--out"),
        ({"overwrite": True, "samples": "S"}, "--overwrite"),
        ({"overwrite": True, "metric": "bits_per_dim"}, "--overwrite"),
        ({"workdir": "runs/x"}, "--samples"),
        ({}, "--samples"),
    ],
)
def test_options_without_effect(given, option, samples, tmp_path):
    """The message begins with the option that has no effect, or is missing."""
    paths = {"S": samples, "R": str(tmp_path / "r.npz"), "N": str(tmp_path / "n.json")}
    given = {name: paths.get(value, value) for name, value in given.items()}
    message = refuses(lambda: command(FEW | {"sample.eta": 1.0}, **given), option, errors=ERRORS)
    holds(message.startswith(option), message)
    holds(not (tmp_path / "r.npz").exists())


def test_a_workdir_without_a_metric_as_a_command(samples):
    args = ("--config", "configs/digits.py", "--config.evaluate.num_images=20", "--workdir", "runs/x")
    refused(run("ddim_jax.evaluate", *args, "--samples", samples), "--workdir", "--metric")


# --- bits per dimension ---

BITS = {"sample.eta": 1.0, "sample.steps": 3, "evaluate.num_images": 10, "evaluate.batch_size": 10}


def test_bits_per_dim_of_the_reference(tmp_path, capsys, monkeypatch):
    """The real images are those of config.evaluate.reference. Here the bound is the mean of the pixels."""
    bound = lambda pipeline, pixels, index, labels, eta: np.log(2) * pixels.sum((1, 2, 3), dtype=float)
    monkeypatch.setattr(sampling, "likelihood_bound", bound)
    grey = data.load("digits").images[:10]
    np.savez(tmp_path / "white.npz", images=np.full((10, 8, 8, 1), 255, np.uint8))
    for path, expected in (("", grey.mean()), (str(tmp_path / "white.npz"), 255)):
        out = tmp_path / "bits.json"
        command(BITS | {"evaluate.reference": path}, metric="bits_per_dim", out=str(out), overwrite=bool(path))
        holds(json.loads(out.read_text())["bits_per_dim"] == pytest.approx(expected))
        holds(f"{expected:.6g}" in capsys.readouterr().out)


def test_a_bound_that_is_not_finite(monkeypatch):
    nats = lambda model, transitions, x_0, keys, eta, decoder: jnp.where(jnp.arange(len(x_0)) == 3, jnp.nan, 1.0)
    monkeypatch.setattr(losses, "j_sigma", nats)
    refuses(lambda: command(BITS, metric="bits_per_dim"), "image 3", errors=(ConfigError,))


def test_invalid_references_of_bits_per_dim(tmp_path):
    np.savez(tmp_path / "r.npz", **statistics())
    np.savez(tmp_path / "large.npz", images=np.zeros((10, 16, 16, 1), np.uint8))
    (tmp_path / "broken").mkdir()
    images.write_png(tmp_path / "broken" / "0.png", np.zeros((8, 8, 1), np.uint8))
    (tmp_path / "broken" / "1.png").write_bytes(b"nothing")
    for path, words in [
        ("r.npz", ("r.npz",)),
        ("large.npz", ("8x8x1", "16x16x1")),
        ("broken", ("1.png",)),
        ("nothing.npz", ("nothing.npz",)),
    ]:
        changes = BITS | {"evaluate.reference": str(tmp_path / path)}
        refuses(lambda changes=changes: command(changes, metric="bits_per_dim"), "config.evaluate.reference", *words)


def test_labels_beyond_the_classes_of_the_network(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((10, 8, 8, 1), np.uint8), labels=np.arange(10) + 1)
    changes = BITS | {"evaluate.reference": str(tmp_path / "x.npz")}
    refuses(
        lambda: command(changes, digits_conditional, metric="bits_per_dim"),
        *("config.evaluate.reference", "labels", "image 9", "10"),
    )


def test_labels_beyond_the_classes_of_the_classifier(tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=data.load("digits").images[:20], arr_1=np.arange(20))
    changes = FEW | {"evaluate.metrics": "agreement"}
    refuses(lambda: command(changes, samples=str(tmp_path / "s.npz")), "--samples", "labels", "image 10", "10")


# --- numbers of images ---


@pytest.mark.parametrize("field", ["num_images", "batch_size"])
@pytest.mark.parametrize("value", [10**30, 2**31, 0, -1])
def test_numbers_out_of_range(field, value, samples):
    refuses(
        lambda: command(FEW | {f"evaluate.{field}": value}, samples=samples), f"config.evaluate.{field}", str(value)
    )


def test_more_images_than_samples(samples):
    words = (samples, "20", "config.evaluate.num_images", "2147483647")
    refuses(lambda: command(FEW | {"evaluate.num_images": 2**31 - 1}, samples=samples), *words)


def test_features_larger_than_the_memory(samples, monkeypatch):
    from ddim_jax.utils import files

    network = features_lib.open_features("digits")
    source, mesh = data.load("npz", samples), sharding.data_mesh()
    monkeypatch.setattr(files, "available_memory", lambda: 1000)
    refuses(lambda: features_lib.extract(network, source, mesh, 10, ("features",)), "features", "20")
