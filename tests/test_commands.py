"""The commands as real processes: what they write, how they resume after kill -9, and their error messages."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
from conftest import once
from PIL import Image
from processes import ROOT, error_line, ok, run, start
from tiny import SMOKE

from ddim_jax import data
from ddim_jax.utils import compilation_cache


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a complete run. Tests copy it before they change it."""
    return once(tmp_path_factory, "smoke", lambda workdir: ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir)))


def leaves(workdir):
    """(the last step, {name: array}) of the checkpoints of a run."""
    folder, names = pathlib.Path(workdir).absolute() / "checkpoints", ("params", "ema_params", "optimizer")
    handlers = {name: ocp.StandardCheckpointHandler() for name in names}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        step = manager.latest_step()
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # the devices of the run may be others
        like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        saved = manager.item_metadata(step)
        trees = {name: jax.tree.map(like, saved[name].tree) for name in names}
        restore = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        items = manager.restore(step, args=ocp.args.Composite(**restore))
    return step, {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(dict(items))[0]
    }


def assert_same_run(a, b):
    (step_a, leaves_a), (step_b, leaves_b) = leaves(a), leaves(b)
    assert step_a == step_b and leaves_a.keys() == leaves_b.keys()
    for name in leaves_a:
        np.testing.assert_array_equal(leaves_a[name], leaves_b[name], err_msg=name)
    metrics = [
        [
            {k: v for k, v in json.loads(line).items() if not k.endswith("_per_second")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (a, b)
    ]
    assert metrics[0] == metrics[1]


# --- train ---


def test_training_writes_its_files(trained):
    assert sorted(path.name for path in (trained / "grids").iterdir()) == ["00000010.png", "00000020.png"]
    assert Image.open(trained / "grids" / "00000020.png").size == (8 * 50 + 2,) * 2
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["10", "15", "20"]  # keep = 3
    assert json.loads((trained / "config.json").read_text())["name"] == "smoke"
    assert any((trained / "tensorboard").iterdir())


def test_a_killed_run_ends_like_an_uninterrupted_one(trained, tmp_path):
    """kill -9 as soon as the second checkpoint exists, in the middle of a later step. Then the same command."""
    workdir = tmp_path / "run"
    process = start("ddim_jax.train", *SMOKE, "--workdir", workdir)
    deadline = time.time() + 200
    while not (workdir / "checkpoints" / "10").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    resumed = ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir))
    assert re.search(rf"from step (10|15) of {re.escape(str(workdir))}", resumed.stdout)
    assert_same_run(trained, workdir)


def test_a_longer_run_is_a_shorter_one_continued(trained, tmp_path):
    """Step 7 is between two checkpoints, and between two lines of metrics.jsonl."""
    workdir = tmp_path / "run"
    ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.train.num_steps=7"))
    ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir))
    assert_same_run(trained, workdir)


def test_a_finished_run_is_not_changed(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    repeated = ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir))
    assert f"from step 20 of {workdir}" in repeated.stdout and "20 steps" in repeated.stdout
    assert_same_run(trained, workdir)


def test_a_run_is_not_continued_with_another_config_or_network(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    train = lambda option: run("ddim_jax.train", *SMOKE, "--workdir", workdir, option)
    error_line(train("--config.train.batch_size=32"), "config.train.batch_size", "32", "16")
    error_line(train("--config.train.warmup=0"), "config.train.warmup", "0", "5")
    error_line(train("--config.model.channels=16"), "config.model", "conv_in/bias", "(8,)", "(16,)")
    assert_same_run(trained, workdir)


def test_a_broken_image_stops_training_with_its_name(tmp_path):
    for i in range(8):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:40])
    folder = ("--config.data.name=folder", f"--config.data.path={tmp_path}")
    process = run("ddim_jax.train", *SMOKE, "--workdir", tmp_path / "run", *folder)
    error_line(process, "config.data", "7.png")


def test_training_on_a_folder_of_images_of_mixed_sizes(tmp_path):
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(12, 20), (9, 9), (31, 8), (8, 10)] * 4):
        image = np.random.default_rng(i).integers(0, 256, size, np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{i:02d}.png")
    folder = ("--config.data.name=folder", f"--config.data.path={tmp_path / 'images'}")
    train = ("ddim_jax.train", *SMOKE, *folder, "--config.train.num_steps=5", "--config.train.grid_every=0")
    ok(run(*train, "--config.data.options.image_size=8", "--workdir", tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["options"] == {"image_size": 8}
    error_line(run(*train, "--workdir", tmp_path / "other"), "config.model.image_size", "12x20x1")


# --- sample ---


def test_the_shipped_weights_are_sampled_by_one_command(tmp_path):
    sample = ("ddim_jax.sample", "--config", "configs/digits.py", "--out", tmp_path / "out")
    done = ok(run(*sample, "--config.sample.num_images=9", "--config.sample.steps=10", "--film", "--png"))
    for name in ("samples.npz", "grid.png", "film.png", "film.gif", "png"):
        assert str(tmp_path / "out" / name) in done.stdout
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as file:
        drawn = file["arr_0"]
    assert drawn.shape == (9, 8, 8, 1) and drawn.dtype == np.uint8 and len(np.unique(drawn, axis=0)) == 9
    pngs = sorted((tmp_path / "out" / "png").iterdir())
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(9)]
    np.testing.assert_array_equal(np.asarray(Image.open(pngs[4])), drawn[4, ..., 0])
    assert Image.open(tmp_path / "out" / "film.gif").n_frames == 11
    film = np.asarray(Image.open(tmp_path / "out" / "film.png"))
    np.testing.assert_array_equal(film[2:50:6, -50:-2:6], drawn[0, ..., 0])  # the last frame is the image


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch, mode, kept", [((), 0o700, True), ((), 0o777, False), (("--nocompilation_cache",), 0o700, False)]
)
def test_compiled_programs_are_kept_in_a_folder_that_only_the_user_can_write(switch, mode, kept, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "programs" / compilation_cache.processor()
    folder.mkdir(parents=True)
    folder.chmod(mode)
    one = ("--config.sample.num_images=1", "--config.sample.steps=1", "--out", tmp_path / "out")
    process = start("ddim_jax.sample", "--config", "configs/digits.py", *one, *switch)
    _, output = process.communicate()
    assert process.returncode == 0, output
    assert any(folder.glob("jit_*-cache")) == kept


@pytest.mark.slow
def test_a_run_is_sampled_the_same_on_eight_devices(trained, tmp_path):
    sample = ("ddim_jax.sample", *SMOKE, "--workdir", trained, "--config.sample.eta=0.5")
    for devices in (1, 8):
        ok(run(*sample, "--out", tmp_path / str(devices), devices=devices))
    one, eight = (np.load(tmp_path / str(devices) / "samples.npz")["arr_0"].astype(int) for devices in (1, 8))
    assert abs(one - eight).max() <= 1 and one.std() > 10


@pytest.mark.slow
def test_an_interrupted_run_draws_no_batch_twice(trained, tmp_path):
    """kill -9 when two parts exist. The second process does not change them, and ends with the same images."""
    batches = ("--config.sample.num_images=400", "--config.sample.batch_size=4")
    process = ("--config.sample.eta=1", "--config.sample.steps=50")
    args = ("ddim_jax.sample", *SMOKE, "--workdir", trained, *batches, *process)
    ok(run(*args, "--out", tmp_path / "whole"))
    process = start(*args, "--out", tmp_path / "cut")
    parts = tmp_path / "cut" / "samples.parts"
    while not (parts / "00000004.npz").exists() and process.poll() is None:
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert 2 <= len(kept) < 100
    resumed = start(*args, "--out", tmp_path / "cut")
    while resumed.poll() is None and parts.exists():
        try:
            assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
        except FileNotFoundError:  # the parts were joined into samples.npz
            break
        time.sleep(0.05)
    assert resumed.wait() == 0
    whole, cut = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole, cut)
    assert whole.shape == (400, 8, 8, 1) and not parts.exists()
    before = (tmp_path / "cut" / "samples.npz").stat().st_mtime_ns
    ok(run(*args, "--out", tmp_path / "cut"))  # now there is nothing to draw
    assert (tmp_path / "cut" / "samples.npz").stat().st_mtime_ns == before


def test_nothing_is_overwritten_without_the_option(trained, tmp_path):
    args = ("ddim_jax.sample", *SMOKE, "--workdir", trained, "--out", tmp_path / "out")
    ok(run(*args, "--png"))
    first = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    error_line(run(*args, "--config.sample.seed=1"), "sample.seed", "0", "1")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], first)
    for name in ("notes.txt", "png/notes.txt"):
        (tmp_path / "out" / name).write_text("of the user")
    ok(run(*args, "--config.sample.seed=1", "--overwrite"))
    assert (np.load(tmp_path / "out" / "samples.npz")["arr_0"] != first).any()
    assert sorted(path.name for path in (tmp_path / "out" / "png").iterdir()) == ["notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "of the user"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "grid.png").write_text("another image")
    error_line(run("ddim_jax.sample", *SMOKE, "--workdir", trained, "--out", foreign), str(foreign), "grid.png")
    assert (foreign / "grid.png").read_text() == "another image"


@pytest.mark.slow
def test_different_options_have_different_default_folders(trained, tmp_path):
    """Sampling with several options, one of them twice, and after more training: no error, and no images of others."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    sample = ("ddim_jax.sample", *SMOKE, "--workdir", workdir)
    found = {}
    for args in ((), ("--config.sample.eta=1",), ("--config.sample.seed=1",), ("--png",), ()):
        output = ok(run(*sample, *args)).stdout
        (npz,) = (line for line in output.splitlines() if line.endswith("samples.npz"))
        found.setdefault(npz, np.load(npz)["arr_0"])
    assert len(found) == 3 and len({drawn.tobytes() for drawn in found.values()}) == 3
    ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.train.num_steps=25"))
    ok(run(*sample))
    folders = sorted(path.name for path in (workdir / "samples").iterdir())
    assert len(folders) == 4 and sum("step20" in name for name in folders) == 3
    assert any("step25" in name for name in folders)


def test_raw_parameters_differ_from_their_average(trained, tmp_path):
    args = ("ddim_jax.sample", *SMOKE, "--workdir", trained)
    for ema in (True, False):
        ok(run(*args, "--out", tmp_path / str(ema), f"--config.sample.ema={ema}"))
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("True", "False"))
    assert (a != b).any()


def test_a_converted_run_has_the_averaged_parameters(trained, tmp_path):
    done = ok(run("ddim_jax.convert", "--from", trained, "--to", tmp_path / "w.safetensors"))
    assert "step 20" in done.stdout
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["config"])["name"] == "smoke" and file.metadata()["step"] == "20"
        saved = leaves(trained)[1]
        for name in ("conv_in", "conv_out"):
            np.testing.assert_array_equal(
                file.get_tensor(f"{name}/kernel"), saved[f"['ema_params']['{name}']['kernel']"]
            )
    written = (tmp_path / "w.safetensors").read_bytes()
    repeated = run("ddim_jax.convert", "--from", trained, "--to", tmp_path / "w.safetensors")
    error_line(repeated, "--to", "w.safetensors", "--overwrite")
    assert (tmp_path / "w.safetensors").read_bytes() == written


# --- errors ---

DIGITS = ("--config", "configs/digits.py")
NEW = ("--workdir", "/tmp/never")


@pytest.mark.parametrize(
    "module, args, words",
    [
        ("sample", (), ("--config",)),
        ("sample", ("--config", "configs/nope.py"), ("configs/nope.py",)),
        ("sample", (*SMOKE, "--config.sample.etaa=1"), ("config.sample", "etaa", "'eta'")),
        ("sample", (*SMOKE, "--config.sampl.eta=1"), ("config", "sampl", "'sample'")),
        ("sample", (*SMOKE, "--config.sample.eta=much"), ("config.sample.eta", "'much'")),
        ("sample", (*SMOKE, "--overwrit"), ("--overwrit", "--overwrite")),
        ("sample", (*SMOKE, "now"), ("'now'",)),
        ("sample", (*SMOKE, "--config.sample.steps=101"), ("config.sample.steps", "1..100", "got 101")),
        ("sample", (*SMOKE, "--config.sample.sampler=ddpn"), ("config.sample.sampler", "'ddpn'", "'ddpm'")),
        ("sample", SMOKE, ("config.name", "'smoke'", "digits", "digits_conditional")),
        ("sample", (*SMOKE, "--workdir", "/nowhere"), ("/nowhere",)),
        ("sample", (*DIGITS, "--out", "README.md/x"), ("README.md/x",)),
        (
            "sample",
            (*DIGITS, "--config.model.channels=64"),
            ("config.model.channels", "64", "32", "digits.safetensors"),
        ),
        ("sample", (*DIGITS, "--config.schedule.name=cosine"), ("config.schedule.name", "'cosine'", "'linear'")),
        ("sample", (*DIGITS, "--config.sample.ema=False"), ("config.sample.ema", "digits.safetensors")),
        ("train", SMOKE, ("--workdir",)),
        ("train", (*SMOKE, "--workdir", "README.md/x"), ("README.md/x",)),
        ("train", (*SMOKE, *NEW, "--config.data.name=digit"), ("config.data.name", "'digit'", "'digits'")),
        (
            "train",
            (
                *SMOKE,
                *NEW,
                "--config.data.name=folder",
                "--config.data.path=docs",
                "--config.data.options.image_sise=8",
            ),
            ("config.data", "image_sise", "'image_size'"),
        ),
        (
            "train",
            ("--config", "configs/smoke.py", *NEW, "--config.model.image_size=9"),
            ("config.model", "image_size", "9"),
        ),
        ("train", (*SMOKE, *NEW, "--config.model.image_size=16"), ("16x16x1", "'digits'", "8x8x1")),
        (
            "train",
            ("--config", "configs/cifar10.py", *NEW, "--config.data.name=npz"),
            ("config.data.path", "'npz'", "got ''"),
        ),
        ("convert", ("--from", "/nowhere", "--to", "x.safetensors"), ("/nowhere",)),
    ],
)
def test_an_error_is_one_line_that_names_its_cause(module, args, words):
    error_line(run(f"ddim_jax.{module}", *args), *words)
    assert not pathlib.Path("/tmp/never").exists() and not (ROOT / "x.safetensors").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    args = (*SMOKE, "--workdir", tmp_path / "run", "--config.train.batch_size=12")
    error_line(run("ddim_jax.train", *args, devices=8), "config.train.batch_size", "8", "got 12")


def test_two_trainers_do_not_share_a_workdir(tmp_path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        error_line(run("ddim_jax.train", *SMOKE, "--workdir", tmp_path), "process", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_empty_and_a_damaged_checkpoint_are_named(trained, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    error_line(run("ddim_jax.sample", *SMOKE, "--workdir", tmp_path / "empty"), str(tmp_path / "empty"))
    shutil.copytree(trained, tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / "checkpoints" / "20" / "ema_params" / "d")
    for command in ("ddim_jax.sample", "ddim_jax.train"):
        error_line(run(command, *SMOKE, "--workdir", tmp_path / "damaged"), "checkpoints/20")


# --- the READMEs ---


def test_the_commands_and_files_that_the_texts_name_exist():
    for text in (
        ROOT / "README.md",
        ROOT / "experiments" / "README.md",
        ROOT / "benchmarks" / "README.md",
        ROOT / "ddim_jax" / "checkpoints" / "README.md",
    ):
        words = text.read_text()
        for module in re.findall(r"python -m ((?:ddim_jax|experiments|benchmarks)\.\w+)", words):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), (text, module)
        for path in re.findall(r"(?:configs|ddim_jax|experiments|docs|tests|benchmarks)/[\w/]+\.\w+", words):
            assert "NAME" in path or (ROOT / path).exists(), (text, path)
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    scope = {}
    for block in blocks:  # in their order, in one namespace
        exec(compile(block, "README.md", "exec"), scope)


# --- encode ---

ENCODE = ("ddim_jax.encode", "--config", "configs/digits.py")


def test_encoding_and_decoding_returns_the_images(tmp_path):
    """The held-out digits with the shipped weights. The error falls with S, and equals that of the written images."""
    real = data.load("digits", split="test")[np.arange(24)].images
    errors = []
    for steps in (5, 20):
        out = tmp_path / str(steps)
        ok(run(*ENCODE, f"--config.sample.steps={steps}", "--count=24", "--out", out))
        report = json.loads((out / "report.json").read_text())
        with np.load(out / "reconstructions.npz") as file:
            decoded, error = file["arr_0"], file["error"]
        assert decoded.shape == (24, 8, 8, 1) and decoded.dtype == np.uint8
        squares = np.square((decoded.astype(float) - real) / 255).mean((1, 2, 3))
        np.testing.assert_allclose(squares, error, atol=0.003)  # the images are rounded to 8 bits, and clipped
        assert report["error_mean"] == pytest.approx(error.mean()) and report["steps"] == steps
        errors.append(report["error_mean"])
        assert Image.open(out / "pairs.png").size[0] > 20 * 8
    assert errors[0] > 4 * errors[1]
    with np.load(tmp_path / "20" / "latents.npz") as file:
        assert file["latents"].shape == (24, 8, 8, 1) and file["latents"].dtype == np.float32
        assert 0.4 < file["latents"].std() < 1.2


@pytest.mark.slow
def test_encoding_resumes_with_its_own_parts_only(tmp_path):
    """The batch size does not matter. A part of another program is named, and replaced only with --overwrite."""
    args = (*ENCODE, "--config.sample.steps=5", "--count=7")
    ok(run(*args, "--out", tmp_path / "whole"))
    cut = tmp_path / "cut"
    ok(run(*args, "--out", cut, "--config.sample.batch_size=3"))
    whole = np.load(tmp_path / "whole" / "latents.npz")["latents"]
    np.testing.assert_allclose(whole, np.load(cut / "latents.npz")["latents"], atol=1e-4)
    (cut / "latents.npz").unlink()
    (cut / "latents.parts").mkdir()
    np.savez(cut / "latents.parts" / "00000000.npz", latents=np.zeros((3, 8, 8, 1), np.float32))
    error_line(run(*args, "--out", cut), "latents.parts/00000000.npz", "--overwrite")
    ok(run(*args, "--out", cut, "--config.sample.batch_size=2", "--overwrite"))
    np.testing.assert_allclose(np.load(cut / "latents.npz")["latents"], whole, atol=1e-4)
    assert not list(cut.glob("*.parts"))


def test_a_folder_of_images_is_encoded_by_any_checkpoint(trained, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    checkpoint = ("--config", "configs/default.py", f"--config.pretrained={trained}", "--config.sample.steps=4")
    args = ("ddim_jax.encode", *checkpoint, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert "3 images" in ok(run(*args)).stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 4
    assert np.load(tmp_path / "out" / "latents.npz")["latents"].shape == (3, 8, 8, 1)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "in" / "1.png")
    error_line(run(*args), str(tmp_path / "out"), "images", "--overwrite")
    (tmp_path / "in" / "2.png").write_bytes(b"broken")
    error_line(run(*args, "--overwrite"), "--images", "2.png")


@pytest.mark.parametrize(
    "args, words",
    [
        ((), ("--out",)),
        (("--config.sample.eta=0.5",), ("sampler", "'ddim'", "eta", "0.5")),
        (("--config.sample.sampler=ddpm",), ("sampler", "'ddim'", "'ddpm'")),
        (("--images", "/nowhere"), ("--images", "/nowhere")),
        (("--images", "docs"), ("--images", "8x8x1")),
        (("--images", "README.md"), ("--images", "README.md")),
        (("--count", "360"), ("--count", "1..359", "got 360")),
        (("--count", "few"), ("--count", "1..359", "few")),
    ],
)
def test_an_error_in_encoding_is_one_line_that_names_its_cause(args, words, tmp_path):
    error_line(run(*ENCODE, *args, *(("--out", tmp_path) if args else ())), *words)
