"""Training that loses no work: preempted, killed, on a full disk, with damaged checkpoints, in several processes."""

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
from conftest import ROOT, error_line, ok, run, start, xla_flags
from PIL import Image
from test_commands import SMOKE, assert_same_run, leaves

from ddim_jax import sharding
from ddim_jax.checkpoint import Checkpoints, DamagedError
from ddim_jax.train_state import TrainState

OFTEN = (*SMOKE, "--config.train.checkpoint_every=5", "--config.train.grid_every=0", "--config.train.keep=50")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that was never disturbed; all its checkpoints are there. Tests copy it."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    ok(run("ddim_jax.train", *OFTEN, "--workdir", workdir))
    return workdir


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


def test_a_run_that_diverges_is_stopped(tmp_path):
    """A learning rate at which the first update makes every later loss infinite."""
    workdir = tmp_path / "run"
    process = run(
        "ddim_jax.train",
        *OFTEN,
        "--config.train.learning_rate=1e30",
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
    """A file system of 3 MB."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path]).returncode:
        pytest.skip("only root can make a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_full_disk(small_disk):
    """One line, and the last checkpoint is whole and goes on elsewhere."""
    workdir = small_disk / "run"
    said = error_line(run("ddim_jax.train", *OFTEN, "--config.train.num_steps=100", "--workdir", workdir))
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


# --- several processes ---


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_processes(*args, timeout=280):
    """Both ends of one run of two processes with two devices each; their outputs."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "ddim_jax.train", *map(str, args), "--distributed"],
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
    return [out for out, _ in said]


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one_and_share_checkpoints(tmp_path, whole):
    """Ten steps in two processes with divided parameters, the other ten in one on four devices."""
    workdir = tmp_path / "run"
    divided = "--config.mesh.fsdp=2"
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


def test_one_of_several_without_a_word_of_which(tmp_path):
    said = error_line(run("ddim_jax.train", *OFTEN, "--distributed", "--workdir", tmp_path))
    assert "--distributed: the environment does not say which process of how many this is" in said


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """kill -9 at random moments of a run that saves every 5 steps: it ends as an undisturbed one, bit for bit."""
    args = (*OFTEN, "--config.train.num_steps=300", "--config.train.keep=3")
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
