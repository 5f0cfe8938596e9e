"""The scripts of the paper's tables and figures, and properties of DDIM on the digits."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
import types

import matplotlib.figure
import numpy as np
import pytest
import safetensors.numpy
from conftest import meshes, once
from messages import assert_names, missing, raises
from PIL import Image
from processes import error_line, ok, run, start

from configs import digits
from ddim_jax import checkpoints, data, encode, oracle, sampling, schedule
from ddim_jax import config as config_lib
from ddim_jax.config import weights
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import frechet
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError
from experiments import ablation, common, fig3_fig5_consistency, fig4_wallclock, grid, oracle_table1, paper, table1_fid

DIGITS = ("--config", "configs/digits.py")
TABLE1 = (
    *DIGITS,
    "--etas=0,hat",
    "--steps=5,10",
    "--config.evaluate.num_images=30",
    "--config.sample.batch_size=8",
    "--config.evaluate.metrics=fid,kid",
)


def rows(out):
    with open(out / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- table 1: cells, resumed ---


@pytest.fixture(scope="module")
def table1(tmp_path_factory):
    """The folder of an uninterrupted run."""
    return once(tmp_path_factory, "table1", lambda out: ok(run("experiments.table1_fid", *TABLE1, "--out", out)))


def test_every_cell_is_in_the_table(table1):
    found = rows(table1)
    assert [(row["eta"], row["S"]) for row in found] == [("0", "5"), ("hat", "5"), ("0", "10"), ("hat", "10")]
    assert all(row["images"] == "30" and row["steps"] == row["S"] and float(row["fid"]) > 0 for row in found)
    table = json.loads((table1 / "table.json").read_text())
    assert table["features"] == "digits-classifier" and len(table["rows"]) == 4
    assert "| sigma-hat | " in (table1 / "table.md").read_text()
    width, height = Image.open(table1 / "table.png").size
    assert width > 2 * 8 * 50 and height > 2 * 50
    assert not list(table1.rglob("samples.*"))  # removed after the evaluation


@pytest.mark.slow
def test_the_numbers_of_a_cell_are_those_of_sample_and_evaluate(tmp_path):
    out = tmp_path / "out"
    table = (*TABLE1, "--etas=hat", "--steps=5")
    ok(run("experiments.table1_fid", *table, "--out", out, "--keep_samples"))
    (row,) = rows(out)
    sampled = ("--config.sample.sampler=ddpm_hat", "--config.sample.steps=5", "--config.sample.num_images=30")
    ok(run("ddim_jax.sample", *DIGITS, *sampled, "--out", tmp_path / "samples"))
    kept = next(out.rglob("samples.npz"))
    with np.load(kept) as of_cell, np.load(tmp_path / "samples" / "samples.npz") as of_sample:
        assert of_cell["arr_0"].shape == (30, 8, 8, 1)
        np.testing.assert_array_equal(of_cell["arr_0"], of_sample["arr_0"])
    done = ok(run("ddim_jax.evaluate", *TABLE1[:2], *TABLE1[4:], "--samples", tmp_path / "samples" / "samples.npz"))
    numbers = dict(line.split() for line in done.stdout.splitlines())
    assert (numbers["fid"], numbers["kid"]) == (row["fid"], row["kid"])


def kill_after(seconds, out):
    process = start("experiments.table1_fid", *TABLE1, "--out", out)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_killed_table_ends_like_an_uninterrupted_one(table1, tmp_path):
    """Killed after the first result, in the middle of another cell. The finished cell is not computed again."""
    out = tmp_path / "out"
    process = start("experiments.table1_fid", *TABLE1, "--out", out)
    deadline = time.time() + 200
    while not list(out.rglob("result.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert 0 < len(results) < 4
    resumed = ok(run("experiments.table1_fid", *TABLE1, "--out", out))
    assert f"(1 of {4 - len(results)};" in resumed.stdout
    assert all(path.stat().st_mtime_ns == written for path, written in results.items())
    assert (out / "table.csv").read_bytes() == (table1 / "table.csv").read_bytes()
    assert (out / "table.png").read_bytes() == (table1 / "table.png").read_bytes()


@pytest.mark.slow
def test_a_table_that_is_killed_ten_times(table1, tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(10):
        kill_after(rng.uniform(1, 9), tmp_path / "out")
    ok(run("experiments.table1_fid", *TABLE1, "--out", tmp_path / "out"))
    assert (tmp_path / "out" / "table.csv").read_bytes() == (table1 / "table.csv").read_bytes()


def test_a_reference_of_another_program_is_not_used(tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(64), sigma=np.eye(64))
    before = (tmp_path / "reference.npz").read_bytes()
    error_line(run("experiments.table1_fid", *TABLE1, "--out", tmp_path), str(tmp_path), "reference.npz")
    assert (tmp_path / "reference.npz").read_bytes() == before


@pytest.mark.slow
def test_a_later_command_adds_only_its_cells(table1, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(table1, out)
    ok(run("experiments.table1_fid", *TABLE1, "--etas=0.5", "--steps=5", "--out", out))
    assert [(row["eta"], row["S"]) for row in rows(out)][:3] == [("0", "5"), ("0.5", "5"), ("hat", "5")]
    for change, words in [
        ("--config.sample.seed=1", ("sample.seed", "0", "1")),
        ("--config.sample.tau=quadratic", ("sample.tau", "uniform", "quadratic")),
        ("--config.sample.clip_x0=True", ("sample.clip_x0", "False", "True")),
        ("--config.evaluate.num_images=31", ("evaluate.num_images", "30", "31")),
        ("--config.evaluate.split=test", ("evaluate.split", "train", "test")),
        ("--sweep=sample.seed=1,2", ("axes", "['eta', 'S']", "['eta', 'S', 'sample.seed']")),
    ]:
        error_line(run("experiments.table1_fid", *TABLE1, change, "--out", out), str(out), "--out", *words)
    with safetensors.safe_open(checkpoints.shipped("digits"), framework="numpy") as file:
        other = {name: 1.01 * file.get_tensor(name) for name in file.keys()}
        metadata = {name: text for name, text in file.metadata().items() if name not in ("digest", "checksums")}
        safetensors.numpy.save_file(other, tmp_path / "other.safetensors", metadata)
    pretrained = f"--config.pretrained={tmp_path}/other.safetensors"
    error_line(run("experiments.table1_fid", *TABLE1, pretrained, "--out", out), str(out), "--out", "weights")


@pytest.mark.slow
def test_any_field_as_a_further_axis(tmp_path):
    out = tmp_path / "out"
    args = ("--steps=5", "--etas=0", "--sweep=sample.tau=uniform,quadratic", "--sweep", "sample.seed=0,1", "--floor")
    done = ok(run("experiments.table1_fid", *TABLE1, *args, "--out", out))
    found = {(row["sample.tau"], row["sample.seed"]): float(row["fid"]) for row in rows(out)}
    assert list(found) == [("quadratic", "0"), ("uniform", "0"), ("quadratic", "1"), ("uniform", "1")]
    assert len(set(found.values())) == 4
    assert "| seed 1, tau uniform, eta 0 |" in done.stdout
    (floor,) = (line for line in done.stdout.splitlines() if not missing(line, "30 real images", "test", "fid"))
    assert floor
    one = ok(run("experiments.table1_fid", *TABLE1, "--steps=5", "--etas=", "--out", tmp_path / "one"))
    assert float(rows(tmp_path / "one")[0]["fid"]) == found["uniform", "0"], one.stdout


@pytest.mark.slow
def test_checkpoints_as_an_axis(tmp_path):
    """The shipped weights in two files give the same number."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        path.write_bytes(checkpoints.shipped("digits").read_bytes())
    sweep = f"--sweep=pretrained={paths[0]},{paths[1]}"
    ok(run("experiments.table1_fid", *TABLE1, "--steps=5", "--etas=0", sweep, "--out", tmp_path / "out"))
    first, second = rows(tmp_path / "out")
    assert first["pretrained"] == str(paths[0]) and first["fid"] == second["fid"]


@pytest.mark.parametrize(
    "args, words",
    [
        (("--etas=0,x",), ("--etas", "hat", "got 'x'")),
        (("--etas=-1",), ("config.sample.eta", "got -1.0")),
        (("--etas=0,1.5",), ("config.sample.eta", "got 1.5")),
        (("--steps=ten",), ("--steps", "got 'ten'")),
        (("--etas=", "--steps=0"), ("--steps", "got 0")),  # without --etas: the sampler of the config
        (("--steps=0",), ("--steps", "got 0")),
        (("--steps=2000",), ("config.sample.steps", "got 2000")),
        (("--sweep=sample.tau",), ("--sweep", "got 'sample.tau'")),
        (("--sweep=sample.tao=uniform",), ("config.sample", "tao", "'tau'")),
        (("--sweep=sample.tau=quadratik",), ("config.sample.tau", "'quadratik'", "'quadratic'")),
        (("--sweep=sample.seed=a",), ("config.sample.seed", "int", "got 'a'")),
        (("--sweep=sample.clip_x0=maybe",), ("config.sample.clip_x0", "'maybe'", "true", "false")),
        (("--sweep=sample=1",), ("config.sample", "section")),
        (("--sweep=sample.eta=0,1",), ("--sweep", "sample.eta", "axis")),
        (("--sweep=train.seed=0,1",), ("--sweep", "train.seed")),
        (("--sweep=model.channels=8",), ("--sweep", "model.channels", "pretrained")),
        (("--sweep=schedule.name=cosine",), ("--sweep", "schedule.name", "pretrained")),
        (("--config.evaluate.metrics=fit",), ("config.evaluate.metrics", "'fit'", "fid")),
        (("--config.evaluate.reference=nope.npz",), ("config.evaluate.reference", "nope.npz")),
        (("--config.name=mine",), ("config.name", "'mine'", "digits")),
    ],
)
def test_errors_name_their_cause_before_sampling(tmp_path, args, words):
    error_line(run("experiments.table1_fid", *TABLE1, *args, "--out", tmp_path / "out"), *words)
    assert not list(tmp_path.rglob("samples.*"))


MODEL = {
    **dict(image_size=8, image_channels=1, patch_size=1, channels=32, channel_mult=[1, 2], num_res_blocks=1),
    **dict(attention_resolutions=[4], middle_attention=True, head_channels=0, groups=8, norm_epsilon=1e-6),
    **dict(halve_padding="end", frequency_shift=1.0, cos_first=False, num_classes=0, label_dropout=0.0),
    **dict(dtype="float32", prediction="eps"),
}
PROCESSES = {
    "eta=0_S=5": "d58b1f07232de4fe77dc02acd8d2ed385256a808d36464b2996311fe0da2d943",
    "eta=0_S=10": "f98d82dd7e396ec3266fd963264da98261fb0a9c84aadecfa2e3f820c5c135fb",
    "eta=hat_S=5": "636af7bc2ffff205ab53b953ab111ab81f4124ff97626a1ba3ddc5d3097a6c20",
    "eta=hat_S=10": "8038359f50890fd2c7672e7e627d8ac76ec014f597eb950ae8da32573e8181af",
}


def test_a_table_of_an_earlier_version_would_be_resumed(table1):
    """The folders record the same dependencies under the same names as before `ablation` was added."""
    sample = dict(tau="uniform", tau_offset=0, tau_end=0, seed=0, clip_x0=False)
    more = dict(clip_range=1.0, clip_quantile=0.0, ema=True, label=-1, guidance=1.0)
    network = "c09d00b25b707e6e5767c0dad2ce883a126e9755c76264b1eb71602afc68f6a4"
    made_from = lambda folder: json.loads((folder / "run.json").read_text())["made_from"]
    assert made_from(table1) == {
        "experiment": "table1_fid",
        "weights": network,
        "features": "55b670c101a508dd635ff33fd0a6acc0b9bc9d652b4ab63853ab79a923997195",
        "axes": ["eta", "S"],
        "sample": sample | more,
        "evaluate": dict(features="digits", weights="", metrics="fid,kid", num_images=30, batch_size=None)
        | dict(reference="", split="train"),
        "data": {"name": "digits", "path": ""},
    }
    cells = {folder.name: made_from(folder) for folder in (table1 / "cells").iterdir()}
    assert all(len(cell.pop("reference")) == 64 for cell in cells.values())
    assert cells == {
        name: {"weights": network, "process": process, "model": MODEL} for name, process in PROCESSES.items()
    }
    result = json.loads((table1 / "cells" / "eta=hat_S=5" / "result.json").read_text())
    assert result["axes"] == {"eta": "hat", "S": 5}
    assert list(result["numbers"]) == ["fid", "kid", "kid_std", "kid_subset_size", "images", "steps"]
    assert {path.name for path in table1.iterdir()} == {"run.json", "cells", "reference.npz", *common.FILES}


def test_the_paper_s_value_and_the_difference():
    """The corners of the paper's tables, typed by hand."""
    table = paper.fid_of("ddpm-cifar10-32")
    assert (table["0", 10], table["hat", 10], table["1", 1000], table["hat", 1000]) == (13.36, 367.43, 4.73, 3.17)
    assert len(table) == len(paper.fid_of("celeba64")) == 25 and paper.fid_of("celeba64")["0.5", 50] == 11.01
    assert len(paper.fid_of("lsun_church256")) == 8 and paper.fid_of("ddpm-bedroom-256")["1", 100] == 6.81
    assert paper.fid_of("digits") == {}
    row = {"eta": "0.2", "S": 20, "fid": 8.0, "images": 50_000}
    assert table1_fid.with_paper_values(row, table) == {**row, "paper": 7.11, "difference": pytest.approx(0.89)}
    assert table1_fid.with_paper_values({**row, "S": 21}, table) == {**row, "S": 21}
    text = table1_fid.text([table1_fid.with_paper_values(row, table)], ["eta", "S"], None)
    assert "fid (the paper's, difference)" in text and "| eta 0.2 | 8 (7.11, +0.89) |" in text and "Of " not in text
    fewer = table1_fid.text([table1_fid.with_paper_values({**row, "images": 5000}, table)], ["eta", "S"], None)
    assert not missing(fewer, "5000 images", "50000")


# --- ablation: any fields, means over seeds ---


def ablate(out, *axes, seeds="", changed=None, **options):
    """Runs `experiments.ablation` in this process."""
    values = digits.get_config().to_dict()
    values["evaluate"].update(num_images=16, metrics="fid,kid")
    for field, text in (changed or {}).items():
        values = config_lib.with_text(values, field, text)
    config = config_lib.parse(weights.completed(values) if values["pretrained"] else values)
    given = dict(axis=[*axes], seeds=seeds, out=out, workdir=None, accept="", floor=False, keep_samples=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "data_mesh", lambda: meshes()[0])  # eight devices of two cores are slow
        ablation.main(types.SimpleNamespace(config=config, values=values, **(given | options)))


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Two axes and two seeds."""
    axes = ("sample.steps=3,2", "sample.clip_x0=False,True")
    return once(tmp_path_factory, "ablated", lambda out: ablate(out, *axes, seeds="0,1"))


def test_a_row_for_each_cell_and_seed(ablated):
    found = rows(ablated)
    names = ("sample.steps", "sample.clip_x0", "sample.seed")
    assert [tuple(row[name] for name in names) for row in found] == [
        (steps, clip, seed) for steps in "23" for clip in ("False", "True") for seed in "01"
    ]
    assert all(row["images"] == "16" and row["steps"] == row["sample.steps"] for row in found)
    assert len({row["fid"] for row in found}) == 8
    assert {path.name for path in ablated.iterdir()} == {"run.json", "cells", "reference.npz", *ablation.WRITTEN}


def by_hand(found):
    """Mean and standard error of the numbers in some rows of table.csv."""
    values = [float(row["fid"]) for row in found]
    mean = sum(values) / len(values)
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5


def test_mean_and_standard_error_are_those_of_the_rows(ablated):
    table = json.loads((ablated / "table.json").read_text())
    assert len(table["rows"]) == 8 and len(table["means"]) == 4 and table["metrics"] == ["fid", "kid"]
    lines = (ablated / "table.md").read_text().splitlines()
    assert not missing(lines[0], "standard error", "16 images")
    for cell, line in zip(table["means"], lines[4:], strict=True):
        steps, clip = cell["axes"].values()
        some = [row for row in rows(ablated) if (row["sample.steps"], row["sample.clip_x0"]) == (str(steps), str(clip))]
        mean, error = by_hand(some)
        assert cell["seeds"] == [0, 1] and list(cell["mean"]) == ["fid", "kid"]
        assert (cell["mean"]["fid"], cell["standard_error"]["fid"]) == pytest.approx((mean, error), rel=1e-4)
        assert error == pytest.approx(abs(float(some[0]["fid"]) - float(some[1]["fid"])) / 2)  # of two values
        assert line.startswith(f"| {steps} | {clip} | 2 | {cell['mean']['fid']:.4g} ± ")


def test_mean_and_standard_error_of_known_numbers():
    """2, 4, 9: mean 5, sample variance (9 + 1 + 16) / 2 = 13."""
    some = [{"a": 0.5, "sample.seed": seed, "fid": value} for seed, value in enumerate([2.0, 4.0, 9.0])]
    (cell,) = ablation.over_seeds(some, ["a"])
    assert cell["axes"] == {"a": 0.5} and cell["seeds"] == [0, 1, 2]
    assert cell["mean"] == {"fid": 5} and cell["standard_error"]["fid"] == pytest.approx((13 / 3) ** 0.5)
    assert ablation.standard_error([2.0]) is None
    assert ablation.mean_and_error(1234.5, 118.0) == "1234 ± 120" and ablation.mean_and_error(0.5, None) == "0.5"


def test_a_later_seed_is_added_and_no_cell_is_computed_again(ablated, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(ablated, out)
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    ablate(out, "sample.steps=2", "sample.clip_x0=False,True", seeds="0,1,2")
    assert "(2 of 2; 0 s left)" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == before for path, before in results.items())
    assert len(rows(out)) == 10
    cell = json.loads((out / "table.json").read_text())["means"][0]
    assert cell["seeds"] == [0, 1, 2]
    some = [row for row in rows(out) if (row["sample.steps"], row["sample.clip_x0"]) == ("2", "False")]
    found = cell["mean"]["fid"], cell["standard_error"]["fid"]
    assert len(some) == 3 and found == pytest.approx(by_hand(some), rel=1e-4)
    for changed, words in [
        ({"sample.tau": "quadratic"}, ("sample.tau", "uniform", "quadratic")),
        ({"sample.eta": "1"}, ("sample.eta", "0.0", "1.0")),
        ({"model.dtype": "bfloat16"}, ("dtype", "float32", "bfloat16")),
    ]:
        with raises(ConfigError, str(out), *words):
            ablate(out, "sample.steps=2", "sample.clip_x0=False", changed=changed)


def test_ablation_and_table_1_give_the_same_numbers(table1, tmp_path):
    """Also where a value of an axis is a path."""
    path = tmp_path / "a$b$.safetensors"
    path.write_bytes(checkpoints.shipped("digits").read_bytes())
    axes = ("--axis", f"pretrained={path}", "--axis=sample.sampler=ddim,ddpm_hat", "--config.sample.steps=5")
    done = ok(run("experiments.ablation", *DIGITS, *TABLE1[4:], *axes, "--out", tmp_path / "out"))
    assert "sample.sampler ddpm_hat, sample.seed 0: fid" in done.stdout
    found = {row["sample.sampler"]: row["fid"] for row in rows(tmp_path / "out")}
    expected = {row["eta"]: row["fid"] for row in rows(table1) if row["S"] == "5"}
    assert found == {"ddim": expected["0"], "ddpm_hat": expected["hat"]}
    head = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "30 images" in head[0] and head[2] == "| pretrained | sampler | fid | kid |"
    assert np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("L")).std() > 10


def test_the_curves(ablated):
    """The axis with the most numbers is x, and every combination of the others has a curve, with error bars."""
    summary = json.loads((ablated / "table.json").read_text())["means"]
    assert ablation.x_axis(summary) == "sample.steps"
    curves = dict(ablation.curves_of(summary, "sample.steps"))
    assert list(curves) == ["clip_x0 False", "clip_x0 True"]
    assert [cell["axes"]["sample.steps"] for cell in curves["clip_x0 True"]] == [2, 3]
    figure = matplotlib.figure.Figure(ablation.size_of_plot(summary, 2))
    ablation.draw(summary, ["fid", "kid"], figure)
    fid, kid = figure.axes
    assert (fid.get_ylabel(), kid.get_ylabel(), fid.get_xlabel()) == ("fid", "kid", "steps")
    line, _, (bars,) = fid.containers[0]
    assert list(line.get_xdata()) == [2, 3]
    assert list(line.get_ydata()) == [cell["mean"]["fid"] for cell in curves["clip_x0 False"]]
    first = curves["clip_x0 False"][0]
    (_, low), (_, high) = bars.get_segments()[0]
    assert (high - low) / 2 == pytest.approx(first["standard_error"]["fid"])
    for name in ("curves.png", "table.png"):
        picture = np.asarray(Image.open(ablated / name).convert("L"))
        assert picture.std() > 10 and picture.shape[1] > 400, name


@pytest.mark.parametrize(
    "axes, across",
    [
        ({"a": [1.0, 2.0], "b": [1, 2, 3], "c": ["x", "y", "z", "w"]}, "b"),
        ({"a": ["x"], "b": [1.0, 2.0], "c": [3, 4]}, "b"),
        ({"a": [False, True], "b": ["x", "y", "z"]}, "b"),
        ({"a": [5]}, "a"),
    ],
)
def test_the_x_axis_of_the_plot(axes, across):
    """The axis with the most numbers, of several the first. Without numbers the axis with the most values."""
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    results = [{**axes, "sample.seed": 0, "fid": 1.0 + i, "kid": -1.0} for i, axes in enumerate(settings)]
    summary = ablation.over_seeds(results, list(axes))
    assert ablation.x_axis(summary) == across
    figure = matplotlib.figure.Figure(ablation.size_of_plot(summary, 2))
    ablation.draw(summary, ["fid", "kid"], figure)
    assert len(figure.axes[0].containers) == len(settings) / len(axes[across])


@pytest.mark.parametrize(
    "axes, options, words",
    [
        ([], {}, ("--axis",)),
        (["sample.tau"], {}, ("--axis", "got 'sample.tau'")),
        (["sample.tao=uniform"], {}, ("--axis sample.tao", "'sample.tau'")),
        (["eta=0,1"], {}, ("--axis eta", "'sample.eta'")),
        (["xyz=0"], {}, ("--axis xyz", "pretrained", "model.dtype", "sample.tau")),
        (["sample=1"], {}, ("--axis sample", "config.sample", "section")),
        (["sample.eta=0,x"], {}, ("--axis sample.eta", "config.sample.eta", "float", "got 'x'")),
        (["sample.eta=0,-1"], {}, ("--axis sample.eta", "config.sample.eta", "got -1.0")),
        (["sample.eta=0,,1"], {}, ("--axis sample.eta", "empty")),
        (["sample.clip_x0=maybe"], {}, ("--axis sample.clip_x0", "config.sample.clip_x0", "'maybe'", "true", "false")),
        (["sample.eta=0", "sample.eta=1"], {}, ("--axis sample.eta", "twice")),
        (["sample.seed=0,1"], {}, ("--axis sample.seed", "--seeds")),
        (["train.seed=0,1"], {}, ("--axis train.seed",)),
        (["sample.refine=0,1"], {}, ("--axis sample.refine",)),
        (["model.channels=8"], {}, ("--axis model.channels", "pretrained")),
        (["sample.tau=uniform,quadratik"], {}, ("--axis", "tau quadratik", "config.sample.tau", "'quadratic'")),
        (["sample.steps=5", "sample.eta=0,1.5"], {}, ("--axis", "steps 5", "eta 1.5", "config.sample.eta")),
        (["sample.sampler=ddim,heun", "sample.eta=1"], {}, ("--axis", "sampler heun", "eta 1", "config.sample.eta")),
        (["pretrained=nowhere"], {}, ("--axis", "pretrained nowhere")),
        (["sample.eta=0"], {"seeds": "a"}, ("--seeds", "got 'a'")),
        (["sample.eta=0"], {"seeds": "0,-1"}, ("--seeds", "got -1")),
        (["sample.eta=0"], {"seeds": "4294967296"}, ("--seeds", "4294967295", "got 4294967296")),
        (["sample.eta=0"], {"changed": {"evaluate.metrics": "fit"}}, ("config.evaluate.metrics", "'fit'", "fid")),
        (
            ["sample.eta=0"],
            {"changed": {"evaluate.metrics": "agreement"}},
            ("config.evaluate.metrics", "agreement", "classes"),
        ),
        (["sample.eta=0"], {"changed": {"data.name": "npz"}, "floor": True}, ("--floor", "config.data.path")),
    ],
)
def test_errors_in_an_ablation_name_their_cause_before_sampling(tmp_path, axes, options, words):
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        ablate(tmp_path / "out", *axes, **options)
    message = str(caught.value)
    assert message.startswith(words[0]) and not (tmp_path / "out").exists()
    assert_names(message, *words)


def test_cells_with_images_of_different_sizes_are_refused():
    values = digits.get_config().to_dict()
    small, large = (config_lib.parse(config_lib.with_text(values, "model.image_size", size)) for size in ("8", "16"))
    with raises(ConfigError, "8x8x1", "pretrained a", "16x16x1", "pretrained b"):
        ablation.check_images([{"pretrained": "a"}, {"pretrained": "b"}], [small, large], small)


# --- the other scripts, with few images ---


TINY_TRAINING = (
    "--config.train.num_steps=2",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.evaluate.num_images=70",
    "--config.model.channels=8",
)
SCRIPTS = [
    pytest.param(
        *("table3_lsun", ("--steps=5", "--config.evaluate.num_images=20"), [], "eta 1"),
        marks=pytest.mark.slow,  # it is table 1
    ),
    ("table2_reconstruction", ("--steps=5,10", "--count=12"), ["errors.png"], "std of the latents"),
    pytest.param(
        *("fig3_fig5_consistency", ("--steps=5,10", "--etas=0,1", "--count=9"), [], "twin is nearest"),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "fig4_wallclock",
        ("--steps=5,10,20", "--repeats=2", "--config.sample.batch_size=8"),
        [],
        "R^2 = ",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *(
            "fig6_interpolation",
            ("--config.sample.steps=5", "--lines=2", "--points=3", "--side=3"),
            ["random_lines.png", "random_grid.png", "encoded_lines.png", "encoded_grid.png"],
            "distance of the ends",
        ),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("inversion", ("--explicit=5,10", "--solved=5", "--refine=2", "--count=9"), [], "iterations a step"),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("inpainting", ("--steps=5", "--etas=0,1", "--count=20"), [], "the upper halves alone"), marks=pytest.mark.slow
    ),
    pytest.param(
        *(
            "parallel_sampling",
            ("--steps=10", "--windows=4", "--tolerances=0.1", "--count=2"),
            [],
            "seconds_sequential",
        ),
        marks=pytest.mark.slow,
    ),
    pytest.param(
        *("discrete_digits", (*TINY_TRAINING, "--steps=2,3", "--fractions=0,1", "--held_out=3"), [], "bits_per_dim"),
        marks=pytest.mark.slow,
    ),
    ("predicted_x0", ("--steps=5,10", "--count=9"), ["distances.png"], "one shot to image"),
    pytest.param(
        *(
            "oracle_table1",
            ("--steps=5,10", "--etas=0,hat", "--points=500", "--images=50", "--config.sample.tau=quadratic"),
            ["distances.png"],
            "data gaussian, eta 0",
        ),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("script, args, pictures, text", SCRIPTS)
def test_a_script_writes_its_table_and_its_pictures(tmp_path, script, args, pictures, text):
    out = tmp_path / "out"
    done = ok(run(f"experiments.{script}", *DIGITS, *args, "--out", out))
    assert text in done.stdout and text in (out / "table.md").read_text()
    assert rows(out) and json.loads((out / "table.json").read_text())["rows"]
    for name in [*pictures, *(["table.png"] if script != "fig6_interpolation" else [])]:
        assert np.asarray(Image.open(out / name)).std() > 1, name


@pytest.mark.slow
@pytest.mark.parametrize("script, args, pictures, text", SCRIPTS)
def test_a_repeated_script_computes_nothing_and_other_options_are_refused(tmp_path, script, args, pictures, text):
    out = tmp_path / "out"
    ok(run(f"experiments.{script}", *DIGITS, *args, "--out", out))
    table = (out / "table.csv").read_bytes()
    results = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    ok(run(f"experiments.{script}", *DIGITS, *args, "--out", out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == results
    assert (out / "table.csv").read_bytes() == table
    process = run(f"experiments.{script}", *DIGITS, *args, "--config.sample.tau=leading", "--out", out)
    error_line(process, str(out), "tau")


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("table2_reconstruction", ("--images=nope",), ("--images", "nope")),
        ("table2_reconstruction", ("--count=360",), ("--count", "1..359", "got 360")),
        ("table2_reconstruction", ("--config.sample.eta=1",), ("sampler", "'ddim'", "eta")),
        ("fig3_fig5_consistency", ("--count=1",), ("--count", "got 1")),
        ("fig3_fig5_consistency", ("--steps=10",), ("--steps", "two")),
        ("fig6_interpolation", ("--points=1",), ("--points", "got 1")),
        ("oracle_table1", ("--data=rings",), ("--data", "'rings'", "gaussian", "ring", "digits")),
        ("predicted_x0", ("--out=",), ("--out", "empty")),
        ("inpainting", ("--count=360",), ("--count", "359", "got 360")),
        ("parallel_sampling", ("--tolerances=-1",), ("--tolerances", "got -1")),
        ("parallel_sampling", ("--config.sample.sampler=ab2", "--steps=5"), ("sampler", "AdamsBashforth")),
        ("discrete_digits", ("--fractions=0,1.5",), ("--fractions", "got 1.5")),
    ],
)
def test_errors_in_the_other_scripts_name_their_cause(tmp_path, script, args, words):
    error_line(run(f"experiments.{script}", *DIGITS, "--out", tmp_path / "out", *args), *words)


@pytest.mark.slow
def test_training_and_a_table_in_one_command(tmp_path):
    """Training is stopped by time, and its state is evaluated. The repeated command trains and computes nothing."""
    out = tmp_path / "out"
    smoke = ("--config", "configs/smoke.py", "--config.train.num_steps=1000000", "--config.evaluate.num_images=20")
    table = ("--etas=0,1", "--steps=5", "--config.evaluate.metrics=fid", "--out", out)
    done = ok(run("experiments.from_scratch", *smoke, *table, "--minutes=1"))
    (folder,) = out.glob("step-*")
    report = (folder / "report.md").read_text()
    assert f"{int(folder.name[5:]):,} steps" in report and "matrix product" in report
    assert "| eta 1 |" in report and report.splitlines()[-2] in done.stdout
    for picture in (out / "loss.png", folder / "samples" / "grid.png", folder / "table1" / "table.png"):
        assert np.asarray(Image.open(picture)).std() > 1, picture
    speed = json.loads((out / "speed.json").read_text())
    assert 0 < speed["tflops"] < 2 * speed["ceiling_tflops"] and speed["gflop_per_image"] > 0
    before = (folder / "table1" / "table.csv").stat().st_mtime_ns
    ok(run("experiments.from_scratch", *smoke, *table, "--minutes=0"))
    assert list(out.glob("step-*")) == [folder] and (folder / "report.md").read_text() == report
    assert (folder / "samples" / "samples.npz").stat().st_mtime_ns < before


# --- the numbers, by hand ---


def test_consistency_by_hand():
    """Two pairs of black and white images. In one case one pair is exchanged."""
    black, white = np.zeros((4, 4, 1), np.uint8), np.full((4, 4, 1), 255, np.uint8)
    many = np.stack([black, white])
    same = fig3_fig5_consistency.consistency(many, many)
    assert same == {"twin": 0, "others": 1, "quotient": 0, "recognised": 1}
    other = fig3_fig5_consistency.consistency(np.stack([white, white]), many)
    assert other == {"twin": 0.5, "others": 0.5, "quotient": 1, "recognised": 0.5}


def test_the_linear_fit_of_times():
    line = fig4_wallclock.fit([10, 20, 50], [1.2, 2.2, 5.2])
    assert (line["per_step"], line["constant"], line["r_squared"]) == pytest.approx((0.1, 0.2, 1))
    bent = fig4_wallclock.fit([0, 1, 2], [0.0, 1.0, 0.0])  # the best line is constant, 1/3, and R^2 is 0
    assert (bent["per_step"], bent["constant"], bent["r_squared"]) == pytest.approx((0, 1 / 3, 0), abs=1e-12)
    assert bent["largest_residual"] == pytest.approx(2 / 3)


def test_the_sliced_distance_of_shifted_points():
    """Points shifted by v: the mean over directions u of (u . v)^2 is |v|^2 / d."""
    a = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    v = np.arange(8.0, dtype=np.float32)
    shifted = oracle_table1.sliced_wasserstein(a[::-1] + v, a)
    directions = np.random.default_rng(1).normal(size=(8, 100_000))
    directions /= np.linalg.norm(directions, axis=0)
    assert np.sqrt(((v @ directions) ** 2).mean()) == pytest.approx(np.linalg.norm(v) / 8**0.5, rel=0.01)
    assert shifted == pytest.approx(np.linalg.norm(v) / 8**0.5, rel=0.35)  # 32 directions
    assert oracle_table1.sliced_wasserstein(a[::-1], a) < 1e-6  # a matrix product rounds its last rows differently


@pytest.mark.parametrize(
    "eta, S, mean, std",
    [
        ("0", 10, 0.298155, 0.374128),
        ("0", 1000, 0.299050, 0.498495),
        ("0.5", 20, 0.299506, 0.425680),
        ("1", 50, 0.299996, 0.444123),
        ("hat", 10, 0.299980, 0.589025),
        ("hat", 100, 0.299996, 0.508490),
    ],
)
def test_the_exact_law_of_the_samples(eta, S, mean, std):
    """Against numbers that were computed in float64 with NumPy."""
    values = digits.get_config().to_dict()
    sampler = {"sampler": "ddpm_hat"} if eta == "hat" else {"eta": float(eta)}
    values["sample"].update(tau="official_uniform", steps=S, **sampler)
    process = grid.process_of(config_lib.parse(values))
    found = oracle_table1.law(process, oracle.gaussian(schedule.linear(), 0.3, 0.5))
    assert found == pytest.approx((mean, std), abs=2e-4 if S == 1000 else 2e-5)  # float32 over S steps


def test_pictures_in_rows_and_columns():
    cell = lambda value: np.full((10, 20, 1), value, np.uint8)
    picture = common.labelled([[cell(0), None], [cell(90), cell(200)]], ["first", "b"], ["S = 1", "S = 2"])
    left, top = picture.shape[1] - 40, picture.shape[0] - 20
    assert top > 10 and left > 20 and picture[:top].min() < 100 and picture[:, :left].min() < 100  # the labels
    assert (picture[top : top + 10, left : left + 20] == 0).all()
    assert (picture[top : top + 10, left + 20 :] == 255).all()
    assert (picture[top + 10 :, left : left + 20] == 90).all() and (picture[top + 10 :, left + 20 :] == 200).all()


def test_every_cell_has_its_own_folder():
    name = lambda **axes: common.folder_of(axes).name
    assert name(eta="0.5", S=10) == "eta=0.5_S=10"
    assert name(p="runs/a") != name(p="runs-a") and "/" not in name(p="runs/a")


# --- properties of DDIM on the digits ---


@pytest.fixture(scope="module")
def network():
    config = config_lib.parse(digits.get_config().to_dict())
    mesh = meshes()[0]
    return config, weights.find(config, None, mesh).params, mesh


def sampled(network, count, **fields):
    config, params, mesh = network
    sample = dataclasses.replace(config.sample, num_images=count, batch_size=250, **fields)
    config = dataclasses.replace(config, sample=sample)
    return np.concatenate(
        list(
            sampling.batches(
                config_lib.pipeline(config, params, mesh, grid.process_of(config)), config.sample.num_images
            )
        )
    )


@pytest.mark.slow
def test_the_reconstruction_error_falls_with_every_doubling_of_the_steps(network):
    config, params, mesh = network
    config = encode.deterministic(config)
    real = data.load("digits", split="test").images[:50]
    x_0 = data.scaling.to_unit(real)
    errors = []
    for S in (5, 10, 20, 50):
        process = grid.process_of(dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=S)))
        x_T = sampling.encode(config_lib.pipeline(config, params, mesh, process), x_0, None)
        decoded = sampling.decode(config_lib.pipeline(config, params, mesh, process), x_T, None)
        errors.append(float(np.square((decoded - x_0) / 2).mean()))
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 1e-3  # a difference of 3 % of a pixel's range


@pytest.mark.slow
def test_x_T_determines_the_image_for_eta_0_and_not_for_eta_1(network):
    ddim, many = (sampled(network, 40, steps=S) for S in (20, 100))
    found = fig3_fig5_consistency.consistency(ddim, many)
    assert found["quotient"] < 0.2 and found["recognised"] == 1
    ddpm = fig3_fig5_consistency.consistency(
        sampled(network, 40, steps=20, eta=1.0), sampled(network, 40, steps=100, eta=1.0)
    )
    assert ddpm["quotient"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("S", [10, pytest.param(20, marks=pytest.mark.slow)])
def test_few_steps_ddim_is_near_the_best_and_sigma_hat_the_worst(network, S):
    """1,000 images each. With fewer the standard error exceeds the differences between the best processes."""
    config, _, mesh = network
    features = features_lib.open_features("digits")
    reference = features_lib.extract(features, data.load("digits"), mesh, 500).moments
    distance = lambda **fields: frechet.distance(
        features_lib.extract(
            features, data.sources.ArraySource(sampled(network, 1000, steps=S, **fields)), mesh, 500
        ).moments,
        reference,
    )
    found = {eta: distance(eta=eta) for eta in (0.0, 0.5, 1.0)} | {"hat": distance(sampler="ddpm_hat")}
    assert found[0.0] < min(found.values()) + 3, found
    assert found["hat"] == max(found.values()), found


@pytest.mark.slow
def test_the_benchmarks_run_and_name_the_device(tmp_path):
    """The test does not depend on the speed."""
    parts = ["ceiling", "forward", "ddim", "training", "overhead", "memory"]
    small = ("--batches", "1,2", "--steps", "2", "--training_batch", "4", "--rounds", "1", "--nocompetitors")
    smoke = ("benchmarks.suite", "--config", "configs/smoke.py")
    ok(run(*smoke, "--what", ",".join(parts), *small, "--out", tmp_path / "suite"))
    found = json.loads((tmp_path / "suite.json").read_text())
    assert found["device"] == "cpu" and found["rounds"] == 1 and list(found["tables"]) == parts
    numbers = [
        value for rows in found["tables"].values() for row in rows for value in row.values() if value != row.get("what")
    ]
    assert len(numbers) > 50 and min(numbers) > 0
    assert "### overhead" in (tmp_path / "suite.md").read_text()
    error_line(run(*smoke, "--what", "forwards", "--out", tmp_path / "suite"), "--what", "forwards", "'forward'")
