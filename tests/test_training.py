"""Training that loses no work: preempted, killed, on a full disk, with damaged checkpoints, in several processes."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import once
from PIL import Image
from processes import ROOT, error_line, ok, run, start, xla_flags
from test_commands import SMOKE, assert_same_run, leaves

from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import DamagedError

OFTEN = (*SMOKE, "--config.train.checkpoint_every=5", "--config.train.grid_every=0", "--config.train.keep=50")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that was never disturbed; all its checkpoints are there. Tests copy it."""
    return once(tmp_path_factory, "whole", lambda workdir: ok(run("ddim_jax.train", *OFTEN, "--workdir", workdir)))


def wait_for(path, process):
    deadline = time.time() + 200
    while not path.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)


def test_sigterm_saves_the_step_and_asks_to_be_run_again(tmp_path):
    """Wherever it comes: that nothing is lost is the next test's."""
    workdir = tmp_path / "run"
    stopped_by_sigterm(workdir)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path):
    workdir = tmp_path / "run"
    step = stopped_by_sigterm(workdir)
    more = f"--config.train.num_steps={step + 3}"
    assert f"goes on from step {step}" in ok(run("ddim_jax.train", *OFTEN, more, "--workdir", workdir)).stdout
    ok(run("ddim_jax.train", *OFTEN, more, "--workdir", tmp_path / "other"))
    (_, ours), (_, theirs) = leaves(workdir), leaves(tmp_path / "other")
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def stopped_by_sigterm(workdir):
    """The step at which a run of many steps was."""
    many = [*OFTEN, "--config.train.num_steps=100000"]
    process = start("ddim_jax.train", *many, "--workdir", workdir)
    wait_for(workdir / "checkpoints" / "5", process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 75 and "which is saved; the same command goes on" in said
    step, _ = leaves(workdir)
    assert f"stopped at step {step}" in said
    return step


def largest(folder):
    return max((path for path in folder.rglob("d/*")), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("item", ["params", "ema_params", "optimizer"])
def test_a_bit_that_changed_on_the_disk_is_found(tmp_path, item):
    """And what is whole comes back as it was, bfloat16 too; written from eight devices, read on one."""
    values = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    tree = {"a": sharding.split_batch(sharding.data_mesh(), values), "b": jnp.ones(3, jnp.bfloat16)}
    state = TrainState(jnp.int32(7), tree, tree, {"mu": tree}, jnp.int32(0))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, {"name": "x"}, "the data")
        checkpoints.wait()
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state)
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(7, like), state)
        assert checkpoints.data(7) == "the data"
        flip_a_bit(largest(tmp_path / "checkpoints" / "7" / item))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DamagedError, match=rf"7 is damaged: {item}/.*a is not"):
        checkpoints.restore(7, like)


DAMAGES = {
    "a bit": lambda step: flip_a_bit(largest(step / "params")),
    "a bit of the optimizer": lambda step: flip_a_bit(largest(step / "optimizer")),
    "half a file": lambda step: os.truncate(largest(step / "ema_params"), 1000),
    "a file": lambda step: largest(step / "params").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, whole, damage):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    DAMAGES[damage](workdir / "checkpoints" / "20")
    said = error_line(run("ddim_jax.train", *OFTEN, "--workdir", workdir))
    assert "checkpoints/20" in said and "--skip_damaged goes on from the checkpoint before it" in said
    again = ok(run("ddim_jax.train", *OFTEN, "--workdir", workdir, "--skip_damaged"))
    assert f"it is now {workdir}/damaged/20" in again.stdout and "goes on from step 15" in again.stdout
    assert "--skip_damaged" not in again.stdout.splitlines()[-1]  # the command that samples it
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_damage_is_seen_by_the_sampler_too(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    flip_a_bit(largest(workdir / "checkpoints" / "20" / "ema_params"))
    said = error_line(run("ddim_jax.sample", *SMOKE, "--workdir", workdir, "--out", tmp_path / "out"))
    assert "is damaged: ema_params/" in said and "is not what was saved" in said


@pytest.mark.slow
def test_a_checkpoint_that_was_being_written_is_never_taken(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "checkpoints" / "20").rename(workdir / "checkpoints" / "20.orbax-checkpoint-tmp")
    again = ok(run("ddim_jax.train", *OFTEN, "--workdir", workdir))
    assert "goes on from step 15" in again.stdout
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_other_images_are_not_trained_on_by_mistake(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    args = (*OFTEN, "--config.data.name=npz", f"--config.data.path={tmp_path / 'set.npz'}", "--workdir", tmp_path / "r")
    np.savez(tmp_path / "set.npz", images=images)
    ok(run("ddim_jax.train", *args, "--config.train.num_steps=5"))
    np.savez(tmp_path / "set.npz", images=images[::-1])
    assert "config.data: the run in" in (said := error_line(run("ddim_jax.train", *args))) and "other images" in said
    np.savez(tmp_path / "set.npz", images=images)
    ok(run("ddim_jax.train", *args, "--config.train.num_steps=6"))


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped(tmp_path):
    """A learning rate at which the first update makes every later loss infinite."""
    workdir = tmp_path / "run"
    process = run(
        "ddim_jax.train",
        *OFTEN,
        "--config.train.learning_rate=1e15",
        "--config.train.warmup=0",
        "--config.train.max_skipped=7",
        "--workdir",
        workdir,
    )
    said = error_line(process)
    assert "not finite in 7 updates in a row, steps 2 to 8" in said
    (line,) = (workdir / "metrics.jsonl").read_text().splitlines()[:1]
    line = json.loads(line)
    assert line["step"] == 5 and line["skipped"] == 4 and line["loss"] == pytest.approx(1, abs=0.3)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]).returncode:
        pytest.skip("only root can make a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk):
    """One line, and the last checkpoint is whole. The disk is filled by another program while training runs: what
    training itself needs is free when it begins.
    """
    workdir = small_disk / "run"
    many = (*OFTEN, "--config.train.keep=1", "--config.train.num_steps=100000")
    process = start("ddim_jax.train", *many, "--workdir", workdir)
    wait_for(workdir / "checkpoints" / "5", process)
    with open(small_disk / "others", "wb", buffering=0) as file:
        while process.poll() is None:  # also what a checkpoint that is removed has freed
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            time.sleep(0.01)
    err = process.communicate()[1]
    said = error_line(subprocess.CompletedProcess(process.args, process.returncode, "", err))
    assert "the disk is full" in said or "No space left on device" in said
    step, values = leaves(workdir)
    assert step >= 5 and all(np.isfinite(leaf).all() for leaf in values.values())
    if "a checkpoint cannot be written" in said:
        assert said.endswith(f"the last complete one is step {step}")
        assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_data_worker_that_is_killed(tmp_path):
    for i in range(60):
        Image.fromarray(np.full((8, 8), 4 * i, np.uint8)).save(tmp_path / f"{i}.png")
    args = ("--config.data.name=folder", f"--config.data.path={tmp_path}", "--config.data.workers=1")
    process = start("ddim_jax.train", *OFTEN, *args, "--config.train.num_steps=100000", "--workdir", tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "5", process)
    worker = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "spawn_main"], capture_output=True, text=True)
    os.kill(int(worker.stdout), signal.SIGKILL)
    said = process.communicate(timeout=200)[1]
    assert process.returncode == 2, said[-2000:]
    assert "error: config.data: a process that reads images has died" in said, said[-2000:]


# --- what is said while it trains ---

JUDGED = (
    *OFTEN,
    "--config.train.evaluate_every=10",
    "--config.train.evaluate_images=50",
    "--config.evaluate.metrics=fid",
)


@pytest.mark.slow
def test_evaluations_on_the_way_are_those_of_an_undisturbed_run(tmp_path, whole):
    """Also where the run stopped between a checkpoint and its evaluation; they change nothing of the training."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    shutil.rmtree(workdir / "checkpoints" / "15")
    (workdir / "evaluations.jsonl").write_text('{"step": 20, "fid": 1}\n')  # of a step that is not there yet
    again = ok(run("ddim_jax.train", *JUDGED, "--workdir", workdir))
    assert "goes on from step 10" in again.stdout
    assert_same_run(workdir, whole)
    evaluations = (workdir / "evaluations.jsonl").read_text()
    lines = [json.loads(line) for line in evaluations.splitlines()]
    assert [line["step"] for line in lines] == [10, 20] and all(line["fid"] > 100 for line in lines)
    again = ok(run("ddim_jax.train", *JUDGED, "--workdir", workdir))
    assert "goes on from step 20" in again.stdout and (workdir / "evaluations.jsonl").read_text() == evaluations


def test_an_evaluation_that_cannot_be_is_refused_before_training(tmp_path):
    args = (*JUDGED, "--config.evaluate.features=inception", "--workdir", tmp_path / "run")
    said = error_line(run("ddim_jax.train", *args, "--config.evaluate.weights=nowhere.pth"))
    assert "config.evaluate.weights" in said and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_weights_and_biases(tmp_path, monkeypatch):
    """Offline; the run goes on under the same name. Without the package one line says what to install."""
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    args = (*OFTEN, "--config.train.wandb=trial", "--workdir", tmp_path / "run")
    for steps in 5, 10:
        ok(run("ddim_jax.train", *args, f"--config.train.num_steps={steps}"))
    name = (tmp_path / "run" / "wandb_id").read_text()
    runs = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(one.endswith(name) for one in runs)


def test_without_weights_and_biases(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('not here')")
    process = run_with_path(
        tmp_path, "ddim_jax.train", *OFTEN, "--config.train.wandb=trial", "--workdir", tmp_path / "r"
    )
    assert "config.train.wandb: Weights & Biases: pip install 'ddim-jax[wandb]'" in error_line(process)


def run_with_path(path, module, *args):
    """In a process that looks for packages there first."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}", "XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_record_that_is_broken_ends_training_with_its_number(tmp_path, monkeypatch):
    """Not one of those that are read before the first step."""
    from test_prepared import break_a_record, prepared_digits

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    number = break_a_record(prepared_digits(tmp_path, 300), 101)
    args = ("--config.data.name=tfds", "--config.data.path=mine", "--config.train.checkpoint_every=5")
    said = error_line(run("ddim_jax.train", *SMOKE, *args, "--workdir", tmp_path / "run"))
    assert f"error: config.data: a record of mine, train cannot be read (number {number})" in said
    assert (tmp_path / "run" / "checkpoints").is_dir()  # it had begun


# --- several processes ---


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_processes(*args, module="ddim_jax.train", timeout=280):
    """Both ends of one run of two processes with two devices each; their outputs."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args), "--distributed"],
            cwd=ROOT,
            env={
                **os.environ,
                "XLA_FLAGS": xla_flags(2),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return ["\n".join(line for line in out.splitlines() if not line.startswith("[Gloo]")) for out, _ in said]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_a_step_of_both(tmp_path):
    """JAX's own handler passes it on; it was replaced, and the other process waited for ever."""
    many = (*OFTEN, "--config.train.num_steps=100000", "--workdir", tmp_path / "run", "--distributed")
    port = free_port()
    processes = []
    for i in range(2):
        env = {
            **os.environ,
            "XLA_FLAGS": xla_flags(2),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(i),
        }
        command = [sys.executable, "-m", "ddim_jax.train", *map(str, many)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    wait_for(tmp_path / "run" / "checkpoints" / "5", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], said
    step, _ = leaves(tmp_path / "run")
    assert all(f"stopped at step {step}, which is saved" in err for err in said)


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_train_as_one_and_share_checkpoints(tmp_path, whole, fsdp):
    """Ten steps in two processes, with divided parameters or not, the other ten in one on four devices."""
    workdir = tmp_path / "run"
    divided = f"--config.mesh.fsdp={fsdp}"
    first, second = two_processes(*OFTEN, divided, "--config.train.num_steps=10", "--workdir", workdir)
    assert "10 steps are done" in first and not second.strip()
    again = ok(run("ddim_jax.train", *OFTEN, "--workdir", workdir, devices=4))
    assert "goes on from step 10" in again.stdout
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_from_one(tmp_path, whole):
    workdir = tmp_path / "run"
    ok(run("ddim_jax.train", *OFTEN, "--config.train.num_steps=10", "--workdir", workdir))
    first, _ = two_processes(*OFTEN, "--workdir", workdir)
    assert "goes on from step 10" in first
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_sample_encode_and_evaluate_as_one(tmp_path, whole):
    """Only the first of them writes, and says something."""
    draw = (*SMOKE, "--workdir", whole, "--config.sample.num_images=10", "--film", "--out")
    first, second = two_processes(*draw, tmp_path / "two", module="ddim_jax.sample")
    ok(run("ddim_jax.sample", *draw, tmp_path / "one"))
    assert "samples.npz" in first and not second.strip()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    ours, theirs = (np.load(tmp_path / place / "samples.npz")["arr_0"] for place in ("one", "two"))
    assert np.abs(ours.astype(int) - theirs).max() <= 1

    encode = (*SMOKE, "--workdir", whole, "--count=10", "--out")
    first, second = two_processes(*encode, tmp_path / "two latents", module="ddim_jax.encode")
    ok(run("ddim_jax.encode", *encode, tmp_path / "one latents"))
    assert "report.json" in first and not second.strip()
    ours, theirs = (np.load(tmp_path / f"{place} latents" / "latents.npz")["latents"] for place in ("one", "two"))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

    judge = (*SMOKE, "--config.evaluate.num_images=10", "--config.evaluate.metrics=fid", "--samples")
    first, second = two_processes(*judge, tmp_path / "two" / "samples.npz", module="ddim_jax.evaluate")
    alone = ok(run("ddim_jax.evaluate", *judge, tmp_path / "two" / "samples.npz")).stdout
    assert float(first.split()[1]) == pytest.approx(float(alone.split()[1]), rel=1e-4) and not second.strip()


def test_one_of_several_without_a_word_of_which(tmp_path):
    said = error_line(run("ddim_jax.train", *OFTEN, "--distributed", "--workdir", tmp_path))
    assert "--distributed: the environment does not say which process of how many this is" in said


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """kill -9 at random moments of a run that saves every 5 steps: it ends as an undisturbed one, bit for bit, and
    each step had the loss that it has there: no batch came twice or was left out.
    """
    args = (*OFTEN, "--config.train.num_steps=300", "--config.train.keep=3", "--config.train.log_every=1")
    ok(run("ddim_jax.train", *args, "--workdir", tmp_path / "whole"))
    rng, workdir, killed = np.random.default_rng(0), tmp_path / "run", 0
    while killed < 30:
        process = start("ddim_jax.train", *args, "--workdir", workdir)
        time.sleep(rng.uniform(2, 8))
        killed += process.poll() is None
        process.kill()
        process.wait()
        if (workdir / "checkpoints" / "300").exists():
            shutil.rmtree(workdir / "checkpoints" / "300")  # it was done: back to the checkpoint before
    ok(run("ddim_jax.train", *args, "--workdir", workdir))
    assert_same_run(workdir, tmp_path / "whole")
