"""The commands as a user runs them: real processes, killed and started again; one line for every mistake."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import safetensors
from conftest import once
from PIL import Image
from processes import ROOT, error_line, ok, run, start

from ddim_jax.utils import compilation_cache

SMOKE = ("--config", "configs/smoke.py", "--config.model.channel_mult=(1,)", "--config.model.attention_resolutions=()")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The workdir of a complete run. Tests copy it before they change it."""
    return once(tmp_path_factory, "smoke", lambda workdir: ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir)))


def leaves(workdir):
    from pathlib import Path

    import orbax.checkpoint as ocp

    folder = Path(workdir).absolute() / "checkpoints"
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        restore = {name: ocp.args.StandardRestore() for name in ("params", "ema_params", "optimizer")}
        items = manager.restore(step, args=ocp.args.Composite(**restore))
    import jax

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


def test_training_leaves_what_it_says(trained):
    assert sorted(path.name for path in (trained / "grids").iterdir()) == ["00000010.png", "00000020.png"]
    assert Image.open(trained / "grids" / "00000020.png").size == (8 * 50 + 2,) * 2
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["10", "15", "20"]  # keep = 3
    assert json.loads((trained / "config.json").read_text())["name"] == "smoke"
    assert any((trained / "tensorboard").iterdir())


def test_a_killed_run_ends_like_one_that_was_not(trained, tmp_path):
    """kill -9 as soon as the second checkpoint is there, which is in the middle of a later step; then the same
    command.
    """
    workdir = tmp_path / "run"
    process = start("ddim_jax.train", *SMOKE, "--workdir", workdir)
    deadline = time.time() + 200
    while not (workdir / "checkpoints" / "10").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    again = ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir))
    assert re.search(r"goes on from step (10|15) of", again.stdout)
    assert_same_run(trained, workdir)


@pytest.mark.slow
def test_a_longer_run_is_a_shorter_one_continued(trained, tmp_path):
    workdir = tmp_path / "run"
    ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.train.num_steps=7"))  # 7: between two checkpoints
    ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir))
    (step, ours), (_, theirs) = leaves(workdir), leaves(trained)
    assert step == 20
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_finished_run_is_left_alone(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    again = ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir))
    assert "goes on from step 20" in again.stdout and "20 steps are done" in again.stdout
    assert_same_run(trained, workdir)


def test_a_run_is_not_continued_with_another_config_or_network(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    said = error_line(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.train.batch_size=32"))
    assert "config.train.batch_size is 32" in said and "16" in said
    said = error_line(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.train.warmup=0"))
    assert "config.train.warmup is 0" in said and "5" in said
    said = error_line(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.model.channels=16"))
    assert "of another network: conv_in/bias has shape (8,), config.model expects (16,)" in said
    assert_same_run(trained, workdir)


def test_a_broken_image_stops_training_with_its_name(tmp_path):
    for i in range(8):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:40])
    said = error_line(
        run(
            "ddim_jax.train",
            *SMOKE,
            "--workdir",
            tmp_path / "run",
            "--config.data.name=folder",
            f"--config.data.path={tmp_path}",
        )
    )
    assert "config.data:" in said and "7.png cannot be read" in said


# --- sample ---


def test_the_shipped_weights_are_sampled_by_one_command(tmp_path):
    """From another folder than the repository's, into the default output folder."""
    done = ok(
        run(
            "ddim_jax.sample",
            "--config",
            "configs/digits.py",
            "--out",
            tmp_path / "out",
            "--config.sample.num_images=9",
            "--film",
            "--png",
            "--config.sample.steps=10",
        )
    )
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
    np.testing.assert_array_equal(film[2:50:6, -50:-2:6], drawn[0, ..., 0])  # the strip ends with the image


@pytest.mark.slow
@pytest.mark.parametrize(
    "switch, mode, kept", [((), 0o700, True), ((), 0o777, False), (("--nocompilation_cache",), 0o700, False)]
)
def test_compiled_programs_are_kept_where_nobody_else_can_write(switch, mode, kept, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "programs" / compilation_cache.processor()
    folder.mkdir(parents=True)
    folder.chmod(mode)
    one = ("--config.sample.num_images=1", "--config.sample.steps=1", "--out", tmp_path / "out")
    process = start("ddim_jax.sample", "--config", "configs/digits.py", *one, *switch)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert any(folder.glob("jit__scan-*-cache")) == kept


@pytest.mark.slow
def test_a_run_s_own_checkpoint_is_sampled_the_same_on_eight_devices(trained, tmp_path):
    for devices in (1, 8):
        ok(
            run(
                "ddim_jax.sample",
                *SMOKE,
                "--workdir",
                trained,
                "--out",
                tmp_path / str(devices),
                "--config.sample.eta=0.5",
                devices=devices,
            )
        )
    one, eight = (np.load(tmp_path / str(devices) / "samples.npz")["arr_0"].astype(int) for devices in (1, 8))
    assert abs(one - eight).max() <= 1 and one.std() > 10


@pytest.mark.slow
def test_a_run_that_was_interrupted_draws_no_batch_twice(trained, tmp_path):
    """kill -9 when two parts are there; the second process leaves them as they are and ends with the same images."""
    args = (
        "ddim_jax.sample",
        *SMOKE,
        "--workdir",
        trained,
        "--config.sample.num_images=400",
        "--config.sample.batch_size=4",
        "--config.sample.eta=1",
        "--config.sample.steps=50",
    )
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
    again = start(*args, "--out", tmp_path / "cut")
    while again.poll() is None and parts.exists():
        try:
            assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
        except FileNotFoundError:  # the parts were joined into samples.npz
            break
        time.sleep(0.05)
    assert again.wait() == 0
    whole, cut = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole, cut)
    assert whole.shape == (400, 8, 8, 1) and not parts.exists()
    before = (tmp_path / "cut" / "samples.npz").stat().st_mtime_ns
    ok(run(*args, "--out", tmp_path / "cut"))  # a third time there is nothing to draw
    assert (tmp_path / "cut" / "samples.npz").stat().st_mtime_ns == before


def test_nothing_is_overwritten_without_being_asked_to(trained, tmp_path):
    args = ("ddim_jax.sample", *SMOKE, "--workdir", trained, "--out", tmp_path / "out")
    ok(run(*args, "--png"))
    first = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    assert "sample.seed is 0 there, 1 here" in error_line(run(*args, "--config.sample.seed=1"))
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], first)
    for mine in ("notes.txt", "png/notes.txt"):
        (tmp_path / "out" / mine).write_text("mine")
    ok(run(*args, "--config.sample.seed=1", "--overwrite"))
    assert (np.load(tmp_path / "out" / "samples.npz")["arr_0"] != first).any()
    assert sorted(path.name for path in (tmp_path / "out" / "png").iterdir()) == ["notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "grid.png").write_text("a picture of somebody")
    assert "already holds grid.png" in error_line(
        run("ddim_jax.sample", *SMOKE, "--workdir", trained, "--out", foreign)
    )


@pytest.mark.slow
def test_every_way_to_sample_has_a_default_folder_and_finds_it_again(trained, tmp_path):
    """Sample, another option, sample; train on, sample again: no mistake, and no image of another command."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    sample = ("ddim_jax.sample", *SMOKE, "--workdir", workdir)
    found = {}
    for args in ((), ("--config.sample.eta=1",), ("--config.sample.seed=1",), ("--png",), ()):
        said = ok(run(*sample, *args)).stdout
        (npz,) = (line for line in said.splitlines() if line.endswith("samples.npz"))
        found.setdefault(npz, np.load(npz)["arr_0"])
    assert len(found) == 3 and len({drawn.tobytes() for drawn in found.values()}) == 3
    ok(run("ddim_jax.train", *SMOKE, "--workdir", workdir, "--config.train.num_steps=25"))
    ok(run(*sample))
    folders = sorted(path.name for path in (workdir / "samples").iterdir())
    assert len(folders) == 4 and sum("step20" in name for name in folders) == 3
    assert any("step25" in name for name in folders)


def test_raw_parameters_are_not_their_average(trained, tmp_path):
    args = ("ddim_jax.sample", *SMOKE, "--workdir", trained)
    for ema in (True, False):
        ok(run(*args, "--out", tmp_path / str(ema), f"--config.sample.ema={ema}"))
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("True", "False"))
    assert (a != b).any()


def test_weights_in_one_file_are_those_of_the_run(trained, tmp_path):
    done = ok(run("ddim_jax.convert", "--from", trained, "--to", tmp_path / "w.safetensors"))
    assert "step 20" in done.stdout
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["config"])["name"] == "smoke" and file.metadata()["step"] == "20"
        saved = leaves(trained)[1]
        for name in ("conv_in", "conv_out"):
            np.testing.assert_array_equal(
                file.get_tensor(f"{name}/kernel"), saved[f"['ema_params']['{name}']['kernel']"]
            )
    assert "is there already" in error_line(
        run("ddim_jax.convert", "--from", trained, "--to", tmp_path / "w.safetensors")
    )


# --- mistakes ---


@pytest.mark.parametrize(
    "module, args, said",
    [
        ("sample", (), "--config is missing"),
        ("sample", ("--config", "configs/nope.py"), "configs/nope.py"),
        ("sample", (*SMOKE, "--config.sample.etaa=1"), "config.sample has no field 'etaa' (did you mean 'eta'?)"),
        ("sample", (*SMOKE, "--config.sampl.eta=1"), "config has no field 'sampl' (did you mean 'sample'?)"),
        ("sample", (*SMOKE, "--config.sample.eta=much"), "could not convert string to float: 'much'"),
        ("sample", (*SMOKE, "--overwrit"), "unknown option --overwrit (did you mean --overwrite?)"),
        ("sample", (*SMOKE, "now"), "unexpected argument 'now'"),
        ("sample", (*SMOKE, "--config.sample.steps=101"), "must be in 1..100, got 101"),
        ("sample", (*SMOKE, "--config.sample.sampler=ddpn"), "did you mean 'ddpm'?"),
        (
            "sample",
            SMOKE,
            "no weights for config.name 'smoke' ship with ddim_jax (those that do: digits, digits_conditional)",
        ),
        ("sample", (*SMOKE, "--workdir", "/nowhere"), "/nowhere holds no checkpoints"),
        ("sample", ("--config", "configs/digits.py", "--out", "README.md/x"), "cannot write to the folder README.md/x"),
        (
            "sample",
            ("--config", "configs/digits.py", "--config.model.channels=64"),
            "config.model.channels is 64, but weights shipped with ddim_jax (digits.safetensors) was made with 32",
        ),
        (
            "sample",
            ("--config", "configs/digits.py", "--config.schedule.name=cosine"),
            "config.schedule.name is 'cosine'",
        ),
        ("sample", ("--config", "configs/digits.py", "--config.sample.ema=False"), "holds one set of parameters"),
        ("train", SMOKE, "--workdir is missing"),
        ("train", (*SMOKE, "--workdir", "README.md/x"), "cannot write to the folder README.md/x"),
        ("train", (*SMOKE, "--workdir", "/tmp/never", "--config.data.name=digit"), "did you mean 'digits'?"),
        (
            "train",
            ("--config", "configs/smoke.py", "--workdir", "/tmp/never", "--config.model.image_size=9"),
            "image_size 9 cannot be halved 1 times",
        ),
        (
            "train",
            (
                *SMOKE,
                "--workdir",
                "/tmp/never",
                "--config.model.image_size=16",
            ),
            "the network takes 16x16x1, the images of data set 'digits' are 8x8x1",
        ),
        (
            "train",
            ("--config", "configs/cifar10.py", "--workdir", "/tmp/never", "--config.data.name=npz"),
            "data set 'npz' needs a file in config.data.path, got ''",
        ),
        (
            "convert",
            ("--from", "/nowhere", "--to", "x.safetensors"),
            "there is no file or folder /nowhere; supported: a diffusers",
        ),
    ],
)
def test_a_mistake_is_one_line(module, args, said):
    assert said in error_line(run(f"ddim_jax.{module}", *args))


@pytest.mark.slow
def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    said = error_line(
        run("ddim_jax.train", *SMOKE, "--workdir", tmp_path / "run", "--config.train.batch_size=12", devices=8)
    )
    assert "must divide over the 8 devices, got 12" in said


def test_two_trainers_do_not_share_a_workdir(tmp_path):
    import fcntl

    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is training in" in error_line(run("ddim_jax.train", *SMOKE, "--workdir", tmp_path))


def test_an_empty_and_a_damaged_checkpoint_are_named(trained, tmp_path):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "holds no complete checkpoint" in error_line(run("ddim_jax.sample", *SMOKE, "--workdir", tmp_path / "empty"))
    shutil.copytree(trained, tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / "checkpoints" / "20" / "ema_params" / "d")
    for command in ("ddim_jax.sample", "ddim_jax.train"):
        assert "checkpoints/20 cannot be read" in error_line(run(command, *SMOKE, "--workdir", tmp_path / "damaged"))


# --- what the README promises ---


def test_the_commands_and_files_that_the_texts_name_are_there():
    for text in (
        ROOT / "README.md",
        ROOT / "experiments" / "README.md",
        ROOT / "benchmarks" / "README.md",
        ROOT / "ddim_jax" / "pretrained" / "README.md",
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
    for block in blocks:  # they run, in their order
        exec(compile(block, "README.md", "exec"), scope)


# --- encode ---

ENCODE = ("ddim_jax.encode", "--config", "configs/digits.py")


def test_encoding_and_decoding_returns_the_images(tmp_path):
    """The held-out digits, with the weights that ship: the error falls with S, and is that of the files written."""
    from PIL import Image as PILImage

    from ddim_jax import data

    real = data.load("digits", split="test")[np.arange(24)].images
    errors = []
    for steps in (5, 20):
        out = tmp_path / str(steps)
        ok(run(*ENCODE, f"--config.sample.steps={steps}", "--count=24", "--out", out))
        report = json.loads((out / "report.json").read_text())
        with np.load(out / "reconstructions.npz") as file:
            again, error = file["arr_0"], file["error"]
        assert again.shape == (24, 8, 8, 1) and again.dtype == np.uint8
        squares = np.square((again.astype(float) - real) / 255).mean((1, 2, 3))
        np.testing.assert_allclose(squares, error, atol=0.003)  # they are rounded to 8 bits, and clipped
        assert report["error_mean"] == pytest.approx(error.mean()) and report["steps"] == steps
        errors.append(report["error_mean"])
        assert PILImage.open(out / "pairs.png").size[0] > 20 * 8
    assert errors[0] > 4 * errors[1]
    with np.load(tmp_path / "20" / "latents.npz") as file:
        assert file["latents"].shape == (24, 8, 8, 1) and file["latents"].dtype == np.float32
        assert 0.4 < file["latents"].std() < 1.2


@pytest.mark.slow
def test_encoding_resumes_with_what_is_its_own(tmp_path):
    """The size of batches does not matter; a part that somebody left is named, and only replaced when asked to."""
    args = (*ENCODE, "--config.sample.steps=5", "--count=7")
    ok(run(*args, "--out", tmp_path / "whole"))
    cut = tmp_path / "cut"
    ok(run(*args, "--out", cut, "--config.sample.batch_size=3"))
    whole = np.load(tmp_path / "whole" / "latents.npz")["latents"]
    np.testing.assert_allclose(whole, np.load(cut / "latents.npz")["latents"], atol=1e-4)
    (cut / "latents.npz").unlink()
    (cut / "latents.parts").mkdir()
    np.savez(cut / "latents.parts" / "00000000.npz", latents=np.zeros((3, 8, 8, 1), np.float32))
    said = error_line(run(*args, "--out", cut))
    assert "latents.parts/00000000.npz is not what this run wrote" in said and "--overwrite" in said
    ok(run(*args, "--out", cut, "--config.sample.batch_size=2", "--overwrite"))
    np.testing.assert_allclose(np.load(cut / "latents.npz")["latents"], whole, atol=1e-4)
    assert not list(cut.glob("*.parts"))


def test_a_folder_of_images_is_encoded_by_any_checkpoint(trained, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    args = (
        "ddim_jax.encode",
        "--config",
        "configs/default.py",
        f"--config.pretrained={trained}",
        "--out",
        tmp_path / "out",
    )
    done = ok(run(*args, "--images", tmp_path / "in", "--config.sample.steps=4"))
    assert "3 images, 4 steps up and as many down" in done.stdout
    assert np.load(tmp_path / "out" / "latents.npz")["latents"].shape == (3, 8, 8, 1)
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "in" / "1.png")
    said = error_line(run(*args, "--images", tmp_path / "in", "--config.sample.steps=4"))
    assert "holds what another run made (images is" in said
    (tmp_path / "in" / "2.png").write_bytes(b"broken")
    said = error_line(run(*args, "--images", tmp_path / "in", "--config.sample.steps=4", "--overwrite"))
    assert "--images:" in said and "2.png cannot be read as an image" in said


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "--out is missing"),
        (
            ("--config.sample.eta=0.5",),
            "encoding is deterministic, sampler must be 'ddim' and eta 0; got 'ddim' and 0.5",
        ),
        (("--config.sample.sampler=ddpm",), "sampler must be 'ddim' and eta 0; got 'ddpm'"),
        (("--images", "/nowhere"), "--images: there is no file or folder /nowhere"),
        (("--images", "docs"), "--images: the network takes 8x8x1, these are"),
        (("--images", "README.md"), "--images: README.md cannot be read as an .npz"),
        (("--count", "360"), "--count must be in 1..359, the number of images, got 360"),
        (("--count", "few"), "--count must be in 1..359"),
    ],
)
def test_a_mistake_in_encoding_is_one_line(args, said, tmp_path):
    assert said in error_line(run(*ENCODE, *args, *(("--out", tmp_path) if args else ())))
