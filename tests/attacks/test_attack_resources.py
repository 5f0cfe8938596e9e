"""Full disks and too little memory: an error of one line, before the work starts where possible. No result is lost."""

import dataclasses
import errno
import os
import resource
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacking import holds, refused, refuses
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT, ok, run
from test_commands import trained  # noqa: F401, a fixture
from tiny import SMOKE

from configs import smoke
from ddim_jax import config as config_lib
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.training import loop, memory, workdir
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError

CONFIG = config_lib.parse(smoke.get_config().to_dict())
RECIPE = config_lib.recipe(CONFIG)


def with_train(**fields):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **fields))


# --- errors of the system ---

COMMAND = """
import errno, os, sys, threading
from ddim_jax import cli
import jax

def fail(number, *file):
    throw(OSError(number, os.strerror(number), *file))

def throw(error):
    raise error

class Unwritten:
    def __del__(self):
        fail(errno.EFBIG)

def thread():
    one = threading.Thread(target=fail, args=(errno.EDQUOT,))
    one.start()
    one.join()

def main(options):
    {
        "full": lambda: fail(errno.ENOSPC),
        "named": lambda: fail(errno.EROFS, "/a/file"),
        "broken": lambda: fail(errno.EIO),
        "library": lambda: throw(OSError("encoder error -2")),  # as Pillow raises it
        "thread": thread,
        "destructor": lambda: [Unwritten()].clear(),
        "memory": lambda: throw(MemoryError("64 TiB")),
        "device": lambda: throw(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\\n more")),
        "text": lambda: cli.fail("a name \\x1b[31m of \\x9b a file \\udcff"),
        "stdout": lambda: print("x" * 100000),
    }[options.how]()

cli.start(main, {"how": ("", "")}, config=False)
"""


@pytest.mark.parametrize(
    "how, reason",
    {
        "full": os.strerror(errno.ENOSPC),
        "named": f"/a/file: {os.strerror(errno.EROFS)}",
        "broken": os.strerror(errno.EIO),
        "library": "encoder error -2",
        "thread": os.strerror(errno.EDQUOT),
        "destructor": os.strerror(errno.EFBIG),
        "memory": "64 TiB",
        "device": "RESOURCE_EXHAUSTED: Out of memory",
        "text": r"a name \x1b[31m of \x9b a file \udcff",
    }.items(),
)
def test_an_error_of_the_system_is_one_line(how, reason, tmp_path):
    (tmp_path / "one_command.py").write_text(COMMAND)
    refused(run("one_command", f"--how={how}", cwd=tmp_path), reason)


@pytest.mark.slow
def test_an_output_that_cannot_be_printed_is_an_error(tmp_path):
    """stdout is a full device, or a closed pipe."""
    (tmp_path / "one_command.py").write_text(COMMAND)
    for stdout in ("/dev/full", subprocess.PIPE):
        process = subprocess.Popen(
            [sys.executable, "-m", "one_command", "--how=stdout"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=open(stdout, "w") if stdout == "/dev/full" else stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        if process.stdout:
            process.stdout.close()
        err = process.stderr.read()
        refused(subprocess.CompletedProcess(process.args, process.wait(), "", err))


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, file_bytes, name",
    [
        ("sample", 3000, "samples.parts"),
        pytest.param("train", 20_000, "checkpoints", marks=pytest.mark.slow),
        pytest.param("train", 300, "config.json", marks=pytest.mark.slow),
        pytest.param("train", 4000, "grids", marks=pytest.mark.slow),
        pytest.param("sample", 300, "", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_grows_too_long_is_named(module, file_bytes, name, tmp_path):
    """With a larger limit the same command then succeeds."""
    args = (
        (*SMOKE, "--config.train.num_steps=5", "--workdir")
        if module == "train"
        else ("--config", "configs/digits.py", "--out")
    )
    words = (str(tmp_path / "out" / name), os.strerror(errno.EFBIG))
    refused(run(f"ddim_jax.{module}", *args, tmp_path / "out", file_bytes=file_bytes), *words)
    holds(not [path for path in (tmp_path / "out").rglob("*tmp*") if path.exists()])
    ok(run(f"ddim_jax.{module}", *args, tmp_path / "out"))


@pytest.mark.parametrize("ends", ["by waiting", "by leaving", "by another error"])
def test_a_checkpoint_that_grows_too_long(ends, tmp_path):
    """The error names the folder and the reason. An earlier error takes precedence. No file remains."""
    tree = {"a": np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)}
    state = TrainState(jnp.int32(5), *jax.tree.map(jnp.array, (tree, tree, tree)), jnp.int32(0))

    def save():
        with Checkpoints(tmp_path, keep=3) as checkpoints:
            checkpoints.save(state, {"name": "x"})
            if ends == "by another error":
                raise ConfigError("the first")
            if ends == "by waiting":
                checkpoints.wait()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["the first"] if ends == "by another error" else [str(tmp_path), os.strerror(errno.EFBIG)]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        refuses(save, *words, errors=(ConfigError, CheckpointError))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    holds(not list((tmp_path / "checkpoints").iterdir()))


# --- checks before the work starts ---


@given(
    st.integers(1, 60),
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(0, 12),
    st.lists(st.integers(0, 59), max_size=6, unique=True),
)
def test_the_number_of_checkpoints_to_come(num_steps, every, keep, keep_every, existing):
    """Compared with the checkpoints that exist at once if they are written and removed as in Orbax."""
    existing = sorted(step for step in existing if step < num_steps)
    begin, kept, most = max(existing, default=0), list(existing), 0
    for step in range(begin + 1, num_steps + 1):
        if step % every == 0 or step == num_steps:
            kept.append(step)
            most = max(most, len(kept))
            kept = [old for old in kept if old in kept[-keep:] or (keep_every and old % keep_every == 0)]
    recipe = RECIPE._replace(num_steps=num_steps, checkpoint_every=every, keep=keep, keep_every=keep_every)
    holds(workdir.checkpoints_to_come(recipe, begin, existing) == most - len(existing))


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=4 * 400 * 1000 - 1))
    state = {"params": np.zeros(100_000, np.float32)}
    words = ("config.train.keep", "1.526 MiB", str(tmp_path))  # the size of four checkpoints
    recipe = RECIPE._replace(num_steps=10**12, checkpoint_every=10, keep=3, keep_every=0)
    refuses(lambda: workdir.check_disk(recipe, tmp_path, state, 0, []), *words)
    workdir.check_disk(recipe, tmp_path, state, 10, [10])


def check_memory(config, mesh):
    recipe = config_lib.recipe(config)
    memory.check_training(recipe.network, recipe.optimizer, mesh, recipe.batch_size, recipe.accumulate)


@pytest.mark.parametrize("fields", [{"batch_size": 1 << 24}, {"batch_size": 1 << 26, "accumulate": 4}])
def test_a_batch_larger_than_the_memory(fields, mesh, monkeypatch):
    monkeypatch.setattr(sharding, "device_memory", lambda: 1 << 33)
    config = with_train(**fields)
    words = ("config.model", "config.train.batch_size", "8 GiB", str(1 << 24), "DDIM_JAX_NO_MEMORY_CHECK=1")
    refuses(lambda: check_memory(config, mesh), *words)
    check_memory(with_train(batch_size=16), mesh)
    monkeypatch.setenv("DDIM_JAX_NO_MEMORY_CHECK", "1")
    check_memory(config, mesh)
    monkeypatch.delenv("DDIM_JAX_NO_MEMORY_CHECK")
    monkeypatch.setattr(sharding, "device_memory", lambda: None)
    check_memory(config, mesh)


def test_a_network_larger_than_the_memory(tmp_path):
    """The error comes before the data is read and before the folder is created."""
    huge = ("--config.model.channels=4096", "--config.model.channel_mult=(64,)")
    huge += ("--config.data.name=npz", "--config.data.path=nowhere.npz")
    process = run("ddim_jax.train", *SMOKE, *huge, "--workdir", tmp_path / "run")
    refused(process, "config.model", "DDIM_JAX_NO_MEMORY_CHECK")
    holds(not (tmp_path / "run").exists())


def test_the_memory_of_a_cpu_device_is_part_of_the_memory_of_the_machine():
    count, machine = len(jax.local_devices()), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    holds(0 < sharding.device_memory() <= machine // count)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"batch_size": 512}, {"batch_size": 512, "accumulate": 4}])
def test_the_estimate_is_a_lower_bound(fields, mesh, monkeypatch):
    """XLA needs more for the update."""
    config = with_train(**fields)
    recipe = config_lib.recipe(config)
    state, key = loop.first_state(recipe, mesh)
    analysis = loop.compiled_update(recipe, mesh, state, key, (8, 8, 1))[0].memory_analysis()
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    monkeypatch.setattr(sharding, "device_memory", lambda: needed)
    check_memory(config, mesh)


def test_human_size():
    for count, text in {
        0: "0 bytes",
        1023: "1023 bytes",
        1024: "1 KiB",
        3 << 40: "3 TiB",
        1 << 75: "3.277e+04 EiB",
    }.items():
        holds(files.human_size(count) == text, files.human_size(count))


# --- the workdir ---


@pytest.mark.parametrize("name", ["workdir"])
def test_an_empty_path_is_not_the_current_folder(name, tmp_path):
    refused(run("ddim_jax.train", "--config", str(ROOT / "configs/smoke.py"), f"--{name}=", cwd=tmp_path), f"--{name}")
    holds(not list(tmp_path.iterdir()))


@pytest.mark.slow
def test_a_longer_run_is_not_changed(tmp_path, trained):  # noqa: F811
    shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    args = ("ddim_jax.train", *SMOKE, "--workdir", tmp_path / "run")
    refused(run(*args, "--config.train.num_steps=10"), "config.train.num_steps", "10", "step 20")
    ok(run(*args, "--config.train.log_every=1"))  # the run is complete
    holds(before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()})
