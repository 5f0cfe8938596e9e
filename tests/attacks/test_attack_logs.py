"""Damaged logs, damaged compiled programs and failing metric writers: training continues, with at most one warning."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import types

import numpy as np
import pytest
from attacking import holds, refuses
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT, ok, run
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from test_commands import assert_same_run, trained  # noqa: F401, a fixture
from tiny import SMOKE

from configs import smoke
from ddim_jax import config as config_lib
from ddim_jax.training import log_file, metric_writers, train_step

CONFIG = config_lib.parse(smoke.get_config().to_dict())
METRICS = train_step.Metrics(*map(np.float32, (0.5, 1.0, 0.1)), np.int32(0), np.bool_(True), np.ones(4), np.ones(4))


def writers(workdir, begin, config, pending=()):
    """The MetricWriters of ddim_jax.train."""
    public = config_lib.public(dataclasses.asdict(config))
    wandb = functools.partial(metric_writers.WeightsAndBiases, workdir, config.train.wandb, config.name, public)
    return metric_writers.MetricWriters(
        workdir,
        begin,
        pending,
        num_steps=config.train.num_steps,
        log_every=config.train.log_every,
        batch_size=config.train.batch_size,
        num_levels=config.schedule.num_steps,
        wandb=wandb if config.train.wandb else None,
    )


# --- metrics.jsonl, evaluations.jsonl ---


def line(step, **more):
    return (json.dumps({"step": step, "loss": 0.5, **more}) + "\n").encode()


JUNK = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"",
            b"null",
            b"[]",
            b"5",
            b'"step"',
            b"{}",
            b'{"loss": 1}',
            b'{"step": null}',
            b'{"step": true}',
            b'{"step": -1}',
            b'{"step": 2.5}',
            b'{"step": 1e999}',
            b'{"step": NaN}',
            b'{"step": "5"}',
            b'{"step": [5]}',
            b'{"step": ' + b"9" * 5000 + b"}",
            b"[" * 100_000,
            b'{"step": 5' * 3,
            b"\x00" * 4096,
            b"\xff\xfe{\x00",
            b"x" * (log_file.LINE_BYTES + 7),
            b'{"step": 1}' + b" " * log_file.LINE_BYTES + b'{"step": 2}',
        ]
    ),
).map(lambda junk: junk.replace(b"\n", b"") + b"\n")


@given(st.lists(st.one_of(st.integers(0, 30).map(line), JUNK), max_size=12), st.integers(0, 30), st.binary(max_size=20))
def test_a_log_keeps_its_complete_lines(lines, begin, half):
    """The lines up to the step `begin`. A damaged log is kept as a copy. An incomplete last line is removed."""
    half = half.replace(b"\n", b"")
    good = [one for one in lines if log_file.step_of(one) is not None and len(one) <= log_file.LINE_BYTES]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
        file = pathlib.Path(folder, "metrics.jsonl")
        file.write_bytes(b"".join(lines) + half)
        log_file.truncate_after(begin, file)
        kept = [one for one in good if log_file.step_of(one) <= begin]
        found = file.read_bytes()
        holds(found.startswith(b"".join(kept)) and len(found.splitlines()) <= len(kept) + 1, found)
        holds(log_file.steps_in(file) >= {log_file.step_of(one) for one in kept})
        if len(good) < len(lines):
            holds(file.with_name("metrics.jsonl.damaged").read_bytes() == b"".join(lines) + half)
        before = found
        log_file.truncate_after(begin, file)
        holds(file.read_bytes() == before)
        with open(file, "ab") as more:
            more.write(line(31))
        holds(31 in log_file.steps_in(file), "a line was appended to an incomplete one")


@pytest.mark.slow
def test_a_damaged_log_does_not_stop_training(tmp_path, trained):  # noqa: F811
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(lines[0] + b"\x00\xff" * 50 + b"\n" + lines[1] + b'{"step": "x"}\n[]\n' + b"".join(lines[2:]))
    (tmp_path / "run" / "evaluations.jsonl").write_bytes(b"\xfe\n")
    resumed = ok(run("ddim_jax.train", *SMOKE, "--workdir", tmp_path / "run"))
    assert_same_run(tmp_path / "run", trained)
    warnings = [one for one in resumed.stderr.splitlines() if one.startswith("warning: ")]
    holds(len(warnings) == 2 and "metrics.jsonl.damaged" in warnings[0], resumed.stderr)


def test_a_pipe_in_place_of_a_log(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    refuses(lambda: writers(tmp_path, 0, CONFIG), str(tmp_path / "metrics.jsonl"))


# --- TensorBoard, Weights & Biases ---


def events(folder):
    """The records of the files of TensorBoard. Checks their lengths and checksums."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,), (check,) = struct.unpack("Q", content[:8]), struct.unpack("I", content[8:12])
            record = content[12 : 12 + length]
            holds(check == masked_crc32c(content[:8]))
            holds(struct.unpack("I", content[12 + length : 16 + length])[0] == masked_crc32c(record))
            yield Event.FromString(record)
            content = content[16 + length :]


def logged(workdir, begin=0, steps=15):
    with writers(workdir, begin, CONFIG) as log:
        for step in range(begin + 1, begin + steps + 1):
            log.add_update(step, METRICS)
        log.write_evaluation(step, {"fid": 3.0}, samples=np.zeros((4, 4, 3), np.uint8))


def test_the_files_of_tensorboard(tmp_path):
    logged(tmp_path)
    logged(tmp_path, begin=10)
    found = list(events(tmp_path / "tensorboard"))
    values = [(event.step, value.tag) for event in found for value in event.summary.value]
    holds({(5, "loss"), (10, "loss"), (15, "fid"), (15, "samples"), (25, "loss")} <= set(values), values)
    restarts = [event.step for event in found if event.session_log.status == 1]
    holds(restarts == [1, 11], "TensorBoard must discard the later steps of the first process")


def random_metrics(step):
    rng = np.random.default_rng(step)
    numbers = rng.normal(size=3).astype(np.float32)
    skipped = step % 4 == 0  # the loss of a skipped update is not finite
    bins = rng.normal(size=(2, 4)).astype(np.float32)
    numbers[0] = np.nan if skipped else numbers[0]
    return train_step.Metrics(*numbers, np.int32(skipped), np.bool_(True), *bins, {"x": np.float32(step)})


@pytest.mark.parametrize("stop", range(11))
def test_the_lines_of_an_interrupted_run(stop, tmp_path):
    """A run that is resumed between two lines writes the lines of an uninterrupted one, to the last digit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with writers(whole, 0, CONFIG) as log:
        for step in range(1, 11):
            log.add_update(step, random_metrics(step))
    with writers(parts, 0, CONFIG) as log:
        for step in range(1, stop + 1):
            log.add_update(step, random_metrics(step))
        pending = json.loads(json.dumps(log.pending()))
    with writers(parts, stop, CONFIG, pending) as log:
        for step in range(stop + 1, 11):
            log.add_update(step, random_metrics(step))
    lines = lambda folder: [
        {name: value for name, value in json.loads(text).items() if not name.endswith("per_second")}
        for text in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    holds(lines(parts) == lines(whole) and [one["step"] for one in lines(whole)] == [5, 10])


VALID = {"loss": 0.5, "grad_norm": 1, "ema_distance": 1, "skipped": 0, "finite": 1, "more": {}}
VALID |= {"bin_losses": [1] * 4, "bin_counts": [1] * 4}


@pytest.mark.parametrize(
    "change",
    [{"loss": "x"}, {"loss": [1, 2]}, {"bin_losses": 3}, {"bin_counts": [[1]] * 4}, {"more": 5}, {"more": {"x": "y"}}]
    + [{"finite": {}}, {"other": 1}, {"more": {"x": [1, 2]}}],
)
def test_pending_metrics_of_another_form(change, tmp_path):
    writers(tmp_path, 0, CONFIG, [VALID]).pending()
    for value in (VALID | change, [], None, 3, {}):
        refuses(lambda value=value: writers(tmp_path, 0, CONFIG, [value]), str(tmp_path), "metrics")


DAMAGES = {
    "a file": lambda folder: folder.write_text(""),
    "a pipe": os.mkfifo,
    "a broken link": lambda folder: folder.symlink_to("/nowhere/at/all"),
    "a folder that is not writable": lambda folder: folder.symlink_to("/proc/1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tensorboard_folder_that_cannot_be_written(damage, tmp_path, capsys):
    DAMAGES[damage](tmp_path / "tensorboard")
    logged(tmp_path)
    warnings = [one for one in capsys.readouterr().err.splitlines() if one.startswith("warning: ")]
    holds(len(warnings) == 1 and "TensorBoard" in warnings[0], warnings)
    holds(log_file.steps_in(tmp_path / "metrics.jsonl") == {5, 10, 15})


class Wandb(types.ModuleType):
    """A replacement for Weights & Biases that keeps the arguments of init."""

    class errors:  # noqa: N801
        class Error(Exception):
            pass

    def __init__(self, fails):
        super().__init__("wandb")
        self.given, self.fails, self.Image = {}, fails, lambda picture: picture

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **given):
        self.given = given
        return self

    def define_metric(self, *args, **options):
        pass

    def log(self, numbers):
        if self.fails:
            raise ConnectionError("no network")

    def finish(self):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_no_private_field_is_sent(fails, tmp_path, monkeypatch, capsys):
    """A connection that fails does not stop training."""
    module = Wandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", module)
    secret = "/home/user/secret"
    config = dataclasses.replace(
        CONFIG,
        pretrained=secret,
        data=dataclasses.replace(CONFIG.data, path=secret),
        evaluate=dataclasses.replace(CONFIG.evaluate, weights=secret, reference=secret),
        train=dataclasses.replace(CONFIG.train, wandb="project"),
    )
    workdir = tmp_path / "patients"
    workdir.mkdir()
    with writers(workdir, 0, config) as log:
        for step in range(1, 6):
            log.add_update(step, METRICS)
    local = {"dir", "project", "settings"}
    sent = json.dumps({name: value for name, value in module.given.items() if name not in local})
    holds("secret" not in sent and "patients" not in sent and '"channels": 8' in sent, sent)
    settings = module.given["settings"]
    holds(settings["x_disable_meta"] and settings["disable_git"] and settings["console"] == "off", settings)
    warning = capsys.readouterr().err
    holds(("WeightsAndBiases" in warning and "no network" in warning) == fails, warning)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../x", b"a/b", b"x" * 300, b"\n", b"a\x1b[31m"])
def test_a_damaged_wandb_id_is_replaced(content, tmp_path):
    (tmp_path / "wandb_id").write_bytes(content)
    name = metric_writers.wandb_id(tmp_path)
    holds(len(name) == 32 and name.isalnum() and metric_writers.wandb_id(tmp_path) == name)


# --- compiled programs ---

PROGRAMS = """
import os, pathlib, sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from ddim_jax.utils import compilation_cache
from ddim_jax.training import train_step
compilation_cache.LEAST_SECONDS = 0
compilation_cache.enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
folder = pathlib.Path(jax.config.jax_compilation_cache_dir)

def program():
    jax.clear_caches()
    hits.clear()
    value = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))))
    assert value == 512, value
    return len(hits)

def damaged(change):
    for file in folder.glob("*-cache"):
        change(file)
    first, then = program(), program()
    assert not first and then, (change.__name__, first, then)

def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)

def cut(file): os.truncate(file, file.stat().st_size // 2)
def empty(file): file.write_bytes(b"")
def swap(file): file.write_bytes(b"\\0" * 32 + file.read_bytes())
def older(file): file.write_bytes(file.read_bytes()[32:])
def lone(file):
    file.write_bytes(b"")
    (folder / "jit_other-0-cache").write_bytes(b"x")

program()
assert program()
for change in (flip, cut, empty, swap, older, lone):
    if change is not older or "own" in sys.argv:
        damaged(change)
print("ok")
"""


@pytest.mark.parametrize("folder", ["DDIM_JAX_CACHE", "JAX_COMPILATION_CACHE_DIR"])
def test_a_damaged_program_is_compiled_once(folder, tmp_path):
    """It is never executed, it is not compiled at every start, and there is no warning."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAMS, "own" if folder == "DDIM_JAX_CACHE" else "other"],
        cwd=ROOT,
        env={**env, folder: str(tmp_path)},
        capture_output=True,
        text=True,
    )
    holds(process.stdout == "ok\n", process.stderr)


def test_a_full_folder_of_programs(tmp_path, monkeypatch):
    """An incomplete program is not kept."""
    from jax._src.lru_cache import LRUCache

    from ddim_jax.utils.compilation_cache import Programs

    cache = LRUCache(str(tmp_path), max_size=1 << 20)
    programs = Programs(cache, True)
    programs.put("complete", b"x" * 100)
    write = type(cache.path).write_bytes

    def full(path, content):
        write(path, content[:10])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(type(cache.path), "write_bytes", full)
    programs.put("incomplete", b"y" * 100)
    monkeypatch.undo()
    holds(programs.get("incomplete") is None and programs.get("complete") == b"x" * 100)
    holds(not list(tmp_path.glob("incomplete*")))
