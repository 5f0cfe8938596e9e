"""Training that is preempted or killed, on a full disk, with damaged checkpoints, and in several processes."""

import contextlib
import json
import os
import re
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
from messages import missing, raises
from PIL import Image
from processes import ROOT, error_line, ok, run, start, xla_flags
from test_commands import assert_same_run, leaves
from test_prepared import break_a_record, prepared_digits
from tiny import SMOKE

from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import DamagedError

OFTEN = (*SMOKE, "--config.train.checkpoint_every=5", "--config.train.grid_every=0", "--config.train.keep=50")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of an uninterrupted run, with all its checkpoints. Tests copy it."""
    return once(tmp_path_factory, "whole", lambda workdir: ok(run("ddim_jax.train", *OFTEN, "--workdir", workdir)))


def wait_for(path, process):
    deadline = time.time() + 200
    while not path.exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)


def resumed_from(process, step, workdir):
    """Whether training printed that it resumes from this step."""
    return not missing(ok(process).stdout, f"from step {step} of {workdir}")


def test_sigterm_saves_the_step(tmp_path):
    stopped_by_sigterm(tmp_path / "run")


@pytest.mark.slow
def test_a_stopped_run_ends_like_an_uninterrupted_one(tmp_path):
    workdir = tmp_path / "run"
    step = stopped_by_sigterm(workdir)
    more = f"--config.train.num_steps={step + 3}"
    assert resumed_from(run("ddim_jax.train", *OFTEN, more, "--workdir", workdir), step, workdir)
    ok(run("ddim_jax.train", *OFTEN, more, "--workdir", tmp_path / "other"))
    (_, resumed), (_, whole) = leaves(workdir), leaves(tmp_path / "other")
    assert resumed.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)


def stopped_by_sigterm(workdir):
    """Stops a long run by SIGTERM, and returns its step."""
    many = [*OFTEN, "--config.train.num_steps=100000"]
    process = start("ddim_jax.train", *many, "--workdir", workdir)
    wait_for(workdir / "checkpoints" / "5", process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[1]
    step, _ = leaves(workdir)
    assert process.returncode == os.EX_TEMPFAIL and not missing(output, f"step {step}"), output
    return step


def largest(folder):
    return max((path for path in folder.rglob("d/*")), key=lambda path: path.stat().st_size)


def flip_bits(path, positions):
    content = bytearray(path.read_bytes())
    for i in positions(len(content)):
        content[i] ^= 4
    path.write_bytes(content)


def flip_a_bit(path):
    flip_bits(path, lambda size: [size // 2])


def flip_many_bits(path):
    """In a small file, a single bit can be in a part that is never read."""
    flip_bits(path, lambda size: range(size // 100, size, 50))


@pytest.mark.parametrize("item", ["params", "ema_params", "optimizer"])
def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path, item):
    """An undamaged checkpoint is restored bit for bit, also bfloat16. Written on eight devices, read on one."""
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
    with Checkpoints(tmp_path) as checkpoints, raises(DamagedError, str(tmp_path / "checkpoints" / "7"), item, "a"):
        checkpoints.restore(7, like)


DAMAGES = {
    "bits": lambda step: flip_many_bits(largest(step / "params")),
    "bits of the optimizer": lambda step: flip_many_bits(largest(step / "optimizer")),
    "half a file": lambda step: os.truncate(largest(step / "ema_params"), 1000),
    "a file": lambda step: largest(step / "params").unlink(),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, whole, damage):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    DAMAGES[damage](workdir / "checkpoints" / "20")
    error_line(run("ddim_jax.train", *OFTEN, "--workdir", workdir), "checkpoints/20", "--skip_damaged")
    resumed = run("ddim_jax.train", *OFTEN, "--workdir", workdir, "--skip_damaged")
    assert resumed_from(resumed, 15, workdir) and not missing(resumed.stdout, f"{workdir}/damaged/20")
    assert (workdir / "damaged" / "20").is_dir()
    assert "--skip_damaged" not in resumed.stdout.splitlines()[-1]  # the command that samples the run
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_sampling_finds_a_damaged_checkpoint(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    flip_many_bits(largest(workdir / "checkpoints" / "20" / "ema_params"))
    process = run("ddim_jax.sample", *SMOKE, "--workdir", workdir, "--out", tmp_path / "out")
    error_line(process, "checkpoints/20", "ema_params")


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_not_used(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "checkpoints" / "20").rename(workdir / "checkpoints" / "20.orbax-checkpoint-tmp")
    assert resumed_from(run("ddim_jax.train", *OFTEN, "--workdir", workdir), 15, workdir)
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    args = (*OFTEN, "--config.data.name=npz", f"--config.data.path={tmp_path / 'set.npz'}", "--workdir", tmp_path / "r")
    np.savez(tmp_path / "set.npz", images=images)
    ok(run("ddim_jax.train", *args, "--config.train.num_steps=5"))
    np.savez(tmp_path / "set.npz", images=images[::-1])
    error_line(run("ddim_jax.train", *args), "config.data", str(tmp_path / "r"))
    np.savez(tmp_path / "set.npz", images=images)
    ok(run("ddim_jax.train", *args, "--config.train.num_steps=6"))


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped(tmp_path):
    """With a learning rate at which every loss after the first update is infinite."""
    workdir = tmp_path / "run"
    diverging = ("--config.train.learning_rate=1e15", "--config.train.warmup=0", "--config.train.max_skipped=7")
    process = run("ddim_jax.train", *OFTEN, *diverging, "--workdir", workdir)
    error_line(process, "finite", "7", "steps 2 to 8")
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
    """The error is one line, and the last checkpoint is complete. Another program fills the disk during training; the
    space that training needs is free at its start.
    """
    workdir = small_disk / "run"
    many = (*OFTEN, "--config.train.keep=1", "--config.train.num_steps=100000")
    process = start("ddim_jax.train", *many, "--workdir", workdir)
    wait_for(workdir / "checkpoints" / "5", process)
    with open(small_disk / "others", "wb", buffering=0) as file:
        while process.poll() is None:  # also the space of checkpoints that training removes
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            time.sleep(0.01)
    err = process.communicate()[1]
    message = error_line(subprocess.CompletedProcess(process.args, process.returncode, "", err))
    assert "the disk is full" in message or "No space left on device" in message
    step, values = leaves(workdir)
    assert step >= 5 and all(np.isfinite(leaf).all() for leaf in values.values())
    if not missing(message, str(workdir / "checkpoints")):
        assert not missing(message, f"step {step}")
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
    output = process.communicate(timeout=200)[1]
    assert process.returncode == 2, output[-2000:]
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert not missing(line, "config.data", "process"), line


# --- evaluations and logs of training ---

EVALUATED = (
    *OFTEN,
    "--config.train.evaluate_every=10",
    "--config.train.evaluate_images=50",
    "--config.evaluate.metrics=fid",
)


@pytest.mark.slow
def test_evaluations_during_training_do_not_change_it(tmp_path, whole):
    """Also where the run stopped between a checkpoint and its evaluation."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    shutil.rmtree(workdir / "checkpoints" / "15")
    (workdir / "evaluations.jsonl").write_text('{"step": 20, "fid": 1}\n')  # of a step without a checkpoint
    assert resumed_from(run("ddim_jax.train", *EVALUATED, "--workdir", workdir), 10, workdir)
    assert_same_run(workdir, whole)
    evaluations = (workdir / "evaluations.jsonl").read_text()
    lines = [json.loads(line) for line in evaluations.splitlines()]
    assert [line["step"] for line in lines] == [10, 20] and all(line["fid"] > 100 for line in lines)
    assert resumed_from(run("ddim_jax.train", *EVALUATED, "--workdir", workdir), 20, workdir)
    assert (workdir / "evaluations.jsonl").read_text() == evaluations


def test_an_impossible_evaluation_is_refused_before_training(tmp_path):
    args = (*EVALUATED, "--config.evaluate.features=inception", "--workdir", tmp_path / "run")
    process = run("ddim_jax.train", *args, "--config.evaluate.weights=nowhere.pth")
    error_line(process, "config.evaluate.weights", "nowhere.pth")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_weights_and_biases(tmp_path, monkeypatch):
    """Offline. A resumed run has the same name."""
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
    error_line(process, "config.train.wandb", "'ddim-jax[wandb]'")


def run_with_path(path, module, *args):
    """Runs a command with this path first in PYTHONPATH."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{path}:{os.environ.get('PYTHONPATH', '')}", "XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_damaged_record_ends_training_with_its_number(tmp_path, monkeypatch):
    """The record is not read before the first step."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    number = break_a_record(prepared_digits(tmp_path, 300), 101)
    args = ("--config.data.name=tfds", "--config.data.path=mine", "--config.train.checkpoint_every=5")
    process = run("ddim_jax.train", *SMOKE, *args, "--workdir", tmp_path / "run")
    error_line(process, "config.data", "mine, train", f"number {number}")
    assert (tmp_path / "run" / "checkpoints").is_dir()  # training had started


# --- several processes ---


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_processes(*args, module="ddim_jax.train", timeout=280):
    """The outputs of one command in two processes with two devices each."""
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
    outputs = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # Gloo prints lines of its own, from several threads: one line can be in the middle of another.
    gloo = r"\[Gloo\] Rank \d+ is connected to \d+| peer ranks\. |Expected number of connected peer ranks is : \d+"
    return [re.sub(gloo, "", out) for out, _ in outputs]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_a_step_of_both(tmp_path):
    """Both processes stop at the same step."""
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
    outputs = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [os.EX_TEMPFAIL] * 2, outputs
    step, _ = leaves(tmp_path / "run")
    assert not any(missing(output, f"step {step}") for output in outputs), outputs


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_processes_train_as_one_and_share_checkpoints(tmp_path, whole, fsdp):
    """Ten steps in two processes, with divided or replicated parameters, ten in one process on four devices."""
    workdir = tmp_path / "run"
    divided = f"--config.mesh.fsdp={fsdp}"
    first, second = two_processes(*OFTEN, divided, "--config.train.num_steps=10", "--workdir", workdir)
    assert "10 steps" in first and not second.strip()
    assert resumed_from(run("ddim_jax.train", *OFTEN, "--workdir", workdir, devices=4), 10, workdir)
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_resume_the_run_of_one(tmp_path, whole):
    workdir = tmp_path / "run"
    ok(run("ddim_jax.train", *OFTEN, "--config.train.num_steps=10", "--workdir", workdir))
    first, _ = two_processes(*OFTEN, "--workdir", workdir)
    assert not missing(first, f"from step 10 of {workdir}")
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_sample_encode_and_evaluate_as_one(tmp_path, whole):
    """Only the main process writes files and prints."""
    draw = (*SMOKE, "--workdir", whole, "--config.sample.num_images=10", "--film", "--out")
    first, second = two_processes(*draw, tmp_path / "two", module="ddim_jax.sample")
    ok(run("ddim_jax.sample", *draw, tmp_path / "one"))
    assert "samples.npz" in first and not second.strip()
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1

    encode = (*SMOKE, "--workdir", whole, "--count=10", "--out")
    first, second = two_processes(*encode, tmp_path / "two latents", module="ddim_jax.encode")
    ok(run("ddim_jax.encode", *encode, tmp_path / "one latents"))
    assert "report.json" in first and not second.strip()
    one, two = (np.load(tmp_path / f"{name} latents" / "latents.npz")["latents"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-4)

    evaluate = (*SMOKE, "--config.evaluate.num_images=10", "--config.evaluate.metrics=fid", "--samples")
    first, second = two_processes(*evaluate, tmp_path / "two" / "samples.npz", module="ddim_jax.evaluate")
    single = ok(run("ddim_jax.evaluate", *evaluate, tmp_path / "two" / "samples.npz")).stdout
    assert float(first.split()[1]) == pytest.approx(float(single.split()[1]), rel=1e-4) and not second.strip()


def test_distributed_without_its_environment(tmp_path):
    error_line(run("ddim_jax.train", *OFTEN, "--distributed", "--workdir", tmp_path), "--distributed", "environment")


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """kill -9 at random moments of a run that saves every 5 steps. Its parameters and all its losses equal those of an
    uninterrupted run: no batch is used twice or skipped.
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
            shutil.rmtree(workdir / "checkpoints" / "300")  # it was complete: back to the previous checkpoint
    ok(run("ddim_jax.train", *args, "--workdir", workdir))
    assert_same_run(workdir, tmp_path / "whole")
