"""Files of an earlier version, with config.train.gamma, one network and one optimizer, can be read: a workdir, a
.safetensors file, statistics of real images, an output folder with its run.json. They are in
`tests/data/written_before.tar.gz`.
"""

import json
import tarfile

import numpy as np
import pytest
from processes import ROOT, ok, run
from tiny import SMOKE as ONE_LEVEL

from ddim_jax.config import weights

SMOKE = (*ONE_LEVEL, "--config.train.grid_every=0", "--config.train.keep=1")
FOUR = ("--config.sample.num_images=4",)


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ROOT / "tests" / "data" / "written_before.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def pixels(folder):
    return np.load(folder / "samples.npz")["arr_0"].astype(int)


def test_a_workdir_is_sampled_and_resumed(old):
    ok(run("ddim_jax.sample", *SMOKE, *FOUR, "--workdir", old / "run", "--out", old / "new"))
    assert np.abs(pixels(old / "new") - pixels(old / "samples")).max() <= 1
    done = ok(run("ddim_jax.train", *SMOKE, "--config.train.num_steps=12", "--workdir", old / "run"))
    assert "step 10" in done.stdout and (old / "run" / "checkpoints" / "12").is_dir()
    assert json.loads((old / "run" / "config.json").read_text())["train"]["objective"]["weight"] == "one"


def test_an_output_folder_is_complete(old):
    """Its images are neither refused nor drawn again."""
    before = {path.name: path.stat().st_mtime_ns for path in (old / "samples").iterdir()}
    ok(run("ddim_jax.sample", *SMOKE, *FOUR, "--workdir", old / "run", "--out", old / "samples"))
    assert {
        path.name: path.stat().st_mtime_ns for path in (old / "samples").glob("samples.npz")
    }.items() <= before.items()


def test_a_file_of_weights_and_statistics(old):
    file = old / "network.safetensors"
    info = weights.read_info(str(file))
    assert info.model.name == "unet" and info.config["train"]["objective"]["time"] == "uniform"
    few = ("--config.sample.steps=5", "--config.sample.num_images=32", "--config.sample.batch_size=32")
    ok(
        run(
            "ddim_jax.sample", "--config", "configs/smoke.py", f"--config.pretrained={file}", *few, "--out", old / "out"
        )
    )
    statistics = (f"--config.evaluate.reference={old / 'reference.npz'}", "--config.evaluate.num_images=32")
    metrics = ("--config.evaluate.features=digits", "--config.evaluate.metrics=fid", *statistics)
    ok(run("ddim_jax.evaluate", *SMOKE, *metrics, "--samples", old / "out", "--out", old / "numbers.json"))
    assert json.loads((old / "numbers.json").read_text())["fid"] > 0
