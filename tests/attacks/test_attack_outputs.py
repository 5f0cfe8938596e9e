"""A command uses a file in its output folder only if the same run wrote it. After any interruption the same command
completes the results.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import types
import zipfile
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacking import holds, refused, refuses
from conftest import meshes
from jax.tree_util import register_static
from processes import run, start
from tiny import params_of

from configs import digits, digits_conditional, smoke
from ddim_jax import config as config_lib
from ddim_jax import encode, registry, sample, samplers, sampling, schedule, trajectory
from ddim_jax.config import fingerprint, weights
from ddim_jax.data.scaling import to_uint8
from ddim_jax.data.sources import ArraySource
from ddim_jax.utils import output_arrays, output_folder, output_parts
from ddim_jax.utils.errors import ConfigError
from experiments import common

ONE_LINE = (ConfigError,)
MADE_FROM = {"sample": {"seed": 0, "eta": 0.5}, "weights": "abc"}
WRITTEN = ("samples.npz", "samples.parts", "grid.png", "report.json")
ARRAYS = output_arrays.Arrays(11, "config.sample.num_images", {"arr_0": ((4, 4, 1), "uint8"), "arr_1": ((), "int32")})
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 4, 4, 1), np.uint8)
COMPUTED_WITH = {"batch_size": 4, "devices": 1}


class Crash(BaseException):
    """The end of a process."""


def gathered(
    out, size=4, stop=None, made_from=MADE_FROM, images=IMAGES, arrays=ARRAYS, overwrite=False, name="samples"
):
    """The arrays that a run writes to a folder. stop: the number of batches after which the run ends; then None."""
    folder = output_folder.open_folder(out, made_from, WRITTEN, overwrite)

    def batches(first):
        for i, begin in enumerate(range(first, len(images), size)):
            if i == stop:
                raise Crash
            part = images[begin : begin + size]
            yield {"arr_0": part, "arr_1": np.arange(begin, begin + len(part), dtype=np.int32)}

    with contextlib.suppress(Crash):
        path = output_parts.gather(folder, f"{name}.npz", ARRAYS, batches, "drawing", COMPUTED_WITH)
        folder.claim()  # as in the commands that write a picture
        with np.load(path) as file:
            return {array: file[array] for array in file.files}


def right(found):
    holds(np.array_equal(found["arr_0"], IMAGES) and np.array_equal(found["arr_1"], np.arange(11)))


def refused_or_right(call, *words):
    """An error of one line that contains these words, or the right result."""
    try:
        found = call()
    except ConfigError as error:
        message = str(error)
        refuses(lambda: (_ for _ in ()).throw(ConfigError(message)), *words, errors=ONE_LINE)
    else:
        right(found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    right(gathered(out))
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended after two of three batches."""
    out = tmp_path_factory.mktemp("stopped")
    assert gathered(out, stop=2) is None
    assert [path.name for path in sorted((out / "samples.parts").iterdir())] == ["00000000.npz", "00000004.npz"]
    return out


def damaged(data, content):
    """The content of a file, damaged."""
    kind = data.draw(st.sampled_from(["cut", "flip", "zeros", "empty", "longer", "text"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]) + content[at + 1 :]
    changed = {
        "cut": content[:at],
        "zeros": content[:at] + bytes(len(content) - at),
        "empty": b"",
        "longer": content + content[at:],
        "text": b"not a zip file at all",
    }[kind]
    return changed


def npz(path, save=np.savez, **arrays):
    with open(path, "wb") as file:
        save(file, **arrays)


OTHERS = {  # arrays that are neither a part nor the result of a run of 11 images
    "other images": {"arr_0": np.zeros((4, 4, 4, 1), np.uint8), "arr_1": np.arange(4, dtype=np.int32)},
    "11 other images": {"arr_0": np.zeros((11, 4, 4, 1), np.uint8), "arr_1": np.arange(11, dtype=np.int32)},
    "0 images": {"arr_0": np.zeros((0, 4, 4, 1), np.uint8), "arr_1": np.zeros(0, np.int32)},
    "100 images": {"arr_0": np.zeros((100, 4, 4, 1), np.uint8), "arr_1": np.zeros(100, np.int32)},
    "another shape": {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.arange(4, dtype=np.int32)},
    "another dtype": {"arr_0": np.zeros((4, 4, 4, 1), np.float32), "arr_1": np.arange(4, dtype=np.int32)},
    "another array": {"images": np.zeros((4, 4, 4, 1), np.uint8)},
    "fewer arrays": {"arr_0": np.zeros((4, 4, 4, 1), np.uint8)},
    "no arrays": {},
    "scalars": {"arr_0": np.uint8(3), "arr_1": np.int32(0)},
    "unequal lengths": {"arr_0": np.zeros((4, 4, 4, 1), np.uint8), "arr_1": np.arange(3, dtype=np.int32)},
}


# --- results and parts ---


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40)
def test_a_damaged_result_is_named(finished, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(finished, out)
    path = out / "samples.npz"
    content = path.read_bytes()
    path.write_bytes(changed := damaged(data, content))
    if changed == content:
        return right(gathered(out))
    message = refuses(lambda: gathered(out), str(path), "--overwrite", errors=ONE_LINE)
    holds(len(message) < 1000 and path.read_bytes() == changed)
    path.unlink()
    right(gathered(out))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_file_in_place_of_the_result(finished, tmp_path, kind, save):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    npz(out / "samples.npz", save, **OTHERS[kind])
    refuses(lambda: gathered(out), str(out / "samples.npz"), errors=ONE_LINE)
    right(gathered(out, overwrite=True))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("place", [0, 4, 8])
def test_another_file_in_place_of_a_part(stopped, tmp_path, kind, save, place):
    """In place of a part that exists, or of the next part. A part of 0 images once caused an endless loop."""
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    npz(out / "samples.parts" / f"{place:08d}.npz", save, **OTHERS[kind])
    refuses(lambda: gathered(out), str(out / "samples.parts" / f"{place:08d}.npz"), errors=ONE_LINE)
    right(gathered(out, overwrite=True))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_a_damaged_part_is_named(stopped, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(stopped, out)
    path = out / "samples.parts" / data.draw(st.sampled_from(["00000000.npz", "00000004.npz"]))
    path.write_bytes(damaged(data, path.read_bytes()))
    refused_or_right(lambda: gathered(out), str(path))


def test_parts_of_other_runs_and_places(stopped, tmp_path):
    first, second = (f"samples.parts/{name}.npz" for name in ("00000000", "00000004"))
    for i, (source, target) in enumerate([(first, second), (second, first)]):
        out = tmp_path / str(i)
        shutil.copytree(stopped, out)
        shutil.copy(stopped / source, out / target)
        refuses(lambda out=out: gathered(out), str(out / target), errors=ONE_LINE)
    other, out = tmp_path / "other", tmp_path / "out"
    gathered(other, stop=2, made_from={**MADE_FROM, "weights": "others"}, images=255 - IMAGES)
    shutil.copytree(stopped, out)
    shutil.copy(other / first, out / first)
    refuses(lambda: gathered(out), str(out / first), errors=ONE_LINE)
    shutil.rmtree(out / "samples.parts")
    gathered(tmp_path / "latents", stop=2, name="latents")  # the same run, but another result
    shutil.copytree(tmp_path / "latents" / "latents.parts", out / "samples.parts")
    refuses(lambda: gathered(out), str(out / first), errors=ONE_LINE)


@pytest.mark.parametrize("size", [1, 3, 5, 11])
def test_a_missing_part_is_recomputed_in_batches_of_any_size(stopped, tmp_path, size):
    """The parts after a gap are discarded, because the new parts may overlap them."""
    for missing in ("00000000.npz", "00000004.npz"):
        out = tmp_path / missing
        shutil.copytree(stopped, out)
        (out / "samples.parts" / missing).unlink()
        right(gathered(out, size=size))
        holds(not (out / "samples.parts").exists())


@pytest.mark.parametrize("name", ["samples.npz", "samples.parts", "samples.parts/00000008.npz", "run.json", "grid.png"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a folder", "link to nothing", "link to a device"])
def test_pipes_folders_and_links_in_place_of_files(stopped, tmp_path, name, kind):
    """There is no hang, and nothing outside of the output folder changes."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    shutil.copytree(stopped, out)
    outside.mkdir()
    (outside / "7.png").write_text("mine")
    path = out / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make = {
        "fifo": lambda: os.mkfifo(path),
        "folder": lambda: (path.mkdir(), (path / "notes.txt").write_text("mine")),
        "link to a folder": lambda: path.symlink_to(outside),
        "link to nothing": lambda: path.symlink_to(tmp_path / "nothing"),
        "link to a device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    refused_or_right(lambda: gathered(out), str(out))
    with contextlib.suppress(ConfigError):
        gathered(out, overwrite=True)
    holds((outside / "7.png").read_text() == "mine" and [*outside.iterdir()] == [outside / "7.png"])
    holds(not (tmp_path / "nothing").exists())
    holds(kind != "folder" or name == "samples.parts" or not path.is_dir() or (path / "notes.txt").exists())


def test_overwrite_removes_no_file_outside(tmp_path):
    """samples.parts is a link to a folder of pictures whose names are numbers."""
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    for folder in (pictures, out):
        folder.mkdir()
    for name in ("1.png", "2.png"):
        (pictures / name).write_text("mine")
    (out / "samples.parts").symlink_to(pictures)
    right(gathered(out, overwrite=True))
    holds(sorted(path.name for path in pictures.iterdir()) == ["1.png", "2.png"])


# --- the record ---


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60)
def test_a_damaged_record_is_named(finished, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(finished, out)
    path = out / "run.json"
    path.write_bytes(damaged(data, path.read_bytes()))
    refused_or_right(lambda: gathered(out), str(out), "--out")


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "3", "null", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", "\x00", "\udcff"),
        '{"made_from": 3, "files": {}}',
        '{"made_from": {}, "files": []}',
        '{"files": {}}',
        '{"made_from": {}, "files": {"samples.npz": 3}}',
        '{"made_from": {}, "files": {"samples.npz": {"sha256": 3}}}',
        json.dumps({"made_from": MADE_FROM, "files": {"../../etc/passwd": {"sha256": "x"}}}),
        json.dumps({"made_from": MADE_FROM, "files": {"samples.npz": {"sha256": None}}}),
        json.dumps({"made_from": MADE_FROM, "files": {"samples.npz": {"sha256": "x", "arrays": 3}}}),
        json.dumps({"made_from": MADE_FROM, "files": {"samples.npz": {"sha256": "x", "arrays": {"arr_0": 3}}}}),
        json.dumps({"made_from": {"sample": {"seed": "\x1b]0;x\x07"}}, "files": {}}),
        json.dumps({"made_from": {"\x1b[2J": 1}, "files": {}}),
        json.dumps({"made_from": {**MADE_FROM, "more": 1}, "files": {}}),
    ],
)
def test_a_hostile_record_is_refused(finished, tmp_path, content):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    if content == "{}":  # an empty record of an earlier version
        return right(gathered(out))
    message = refuses(lambda: gathered(out), str(out), "--overwrite", errors=ONE_LINE)
    holds(message.isprintable() and len(message) < 1000)
    right(gathered(out, overwrite=True))


def test_the_record_of_a_finished_run(finished):
    record = json.loads((finished / "run.json").read_text())
    found = record["files"]["samples.npz"]
    holds(record["made_from"] == MADE_FROM and len(found["sha256"]) == 64)
    holds(found["arrays"]["arr_0"] == {"shape": [11, 4, 4, 1], "dtype": "uint8"})
    holds(found["arrays"]["arr_1"] == {"shape": [11], "dtype": "int32"})
    holds(found["computed_with"] == [{"from": 0, **COMPUTED_WITH}])


@pytest.mark.parametrize("kind", [*OTHERS, "cut", "right"])
def test_results_of_an_earlier_version(tmp_path, kind):
    """Its record has no SHA-256. Length, shape, dtype and CRC are verified. Parts are recomputed."""
    (tmp_path / "run.json").write_text(json.dumps({**MADE_FROM, "sample": {"seed": 0, "eta": 0.5, "ema": True}}))
    same = {"arr_0": IMAGES, "arr_1": np.arange(11, dtype=np.int32)}
    npz(tmp_path / "samples.npz", **(same if kind in ("cut", "right") else OTHERS[kind]))
    if kind == "cut":
        (tmp_path / "samples.npz").write_bytes((tmp_path / "samples.npz").read_bytes()[:300])
    (tmp_path / "samples.parts").mkdir()
    npz(tmp_path / "samples.parts" / "00000000.npz", **OTHERS["other images"])
    if kind in ("right", "11 other images"):  # without a SHA-256 the second one is accepted
        holds(len(gathered(tmp_path)["arr_0"]) == 11)
        holds(json.loads((tmp_path / "run.json").read_text())["files"].keys() == {"samples.npz"})
        (tmp_path / "samples.npz").write_bytes(b"")
    refuses(lambda: gathered(tmp_path), str(tmp_path / "samples.npz"), errors=ONE_LINE)
    (tmp_path / "samples.npz").unlink()
    right(gathered(tmp_path))


def test_another_run_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"sample": {"seed": 1, "eta": 0.5}, "weights": "abc"}))
    refuses(lambda: gathered(tmp_path), "sample.seed", "--overwrite", errors=ONE_LINE)


# --- interruptions at any moment, and two processes at once ---


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed_at", range(1, 10))
def test_a_process_that_ends_at_any_write(tmp_path, monkeypatch, killed_at, after):
    """Before and after each rename of a part, the result and the record. Temporary files remain, as after kill -9."""
    count, replace = 0, os.replace

    def ends(source, target):
        nonlocal count
        count += 1
        if count < killed_at or after:
            replace(source, target)
        if count >= killed_at:
            shutil.copy(target if after else source, tmp_path / "out" / f".samples.npz.{count:016x}.tmp")
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", ends)
        gathered(tmp_path / "out")
    assert count == killed_at or count < killed_at and killed_at > 6
    right(gathered(tmp_path / "out", size=3))
    holds(sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.json", "samples.npz"])
    right(gathered(tmp_path / "out"))


def test_a_second_process_in_the_same_folder(finished, tmp_path):
    held = output_folder.open_folder(finished, MADE_FROM, WRITTEN)
    refuses(lambda: gathered(finished), str(finished), "--out", errors=ONE_LINE)
    del held
    right(gathered(finished))
    first, second = (output_folder.open_folder(tmp_path / "new", {"seed": seed}, WRITTEN) for seed in (0, 1))
    first.claim()
    refuses(second.claim, str(tmp_path / "new"), "--out", errors=ONE_LINE)
    del first
    refuses(second.claim, str(tmp_path / "new"), "--out", errors=ONE_LINE)
    holds(json.loads((tmp_path / "new" / "run.json").read_text())["made_from"] == {"seed": 0})


def test_two_processes_on_a_disk_without_locks(tmp_path, monkeypatch):
    def unsupported(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(output_folder.fcntl, "flock", unsupported)
    first, second = (output_folder.open_folder(tmp_path, {"seed": seed}, WRITTEN) for seed in (0, 1))
    first.claim()
    refuses(second.claim, str(tmp_path), "--out", errors=ONE_LINE)
    third = output_folder.open_folder(tmp_path, {"seed": 0}, WRITTEN)
    third.claim()

    def writes():
        with first.writing("report.json") as file:
            file.write(b"{}")

    refuses(writes, str(tmp_path), "--out", errors=ONE_LINE)
    holds(not (tmp_path / "report.json").exists())


def test_names_of_temporary_files_cannot_be_guessed(tmp_path):
    """Links with the names that earlier versions used are not followed and not removed."""
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.write_text("mine")
    out.mkdir()
    for name in ("samples.npz", "run.json"):
        for guess in (f".{name}.tmp", f"{name}.tmp", f".{name}.{os.getpid()}.tmp", f"{name}.{os.getpid()}.tmp"):
            (out / guess).symlink_to(mine)
    right(gathered(out))
    holds(mine.read_text() == "mine" and len([*out.glob("*.tmp")]) == 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_at_a_random_moment(tmp_path, seed):
    args = (
        "ddim_jax.sample",
        "--config",
        "configs/digits.py",
        "--config.sample.num_images=60",
        "--config.sample.steps=5",
    )
    args = (*args, "--config.sample.batch_size=2", "--config.sample.eta=1", "--out", tmp_path / "out")
    process = start(*args)
    with contextlib.suppress(TimeoutError):
        parts = tmp_path / "out" / "samples.parts"
        while process.poll() is None and not parts.exists():
            pass
        wait = np.random.default_rng(seed).uniform(0, 0.5)
        with contextlib.suppress(Exception):
            process.wait(wait)
    process.kill()
    process.communicate()
    resumed = run(*args)
    holds(resumed.returncode == 0, resumed.stderr)
    whole = run(*args[:-1], tmp_path / "whole")
    holds(whole.returncode == 0, whole.stderr)
    with np.load(tmp_path / "out" / "samples.npz") as a, np.load(tmp_path / "whole" / "samples.npz") as b:
        holds(np.array_equal(a["arr_0"], b["arr_0"]))


# --- errors before the first write ---


def parsed(module=digits, **fields):
    """A config with other values of fields. A name without a section is a field of config.sample; model__dtype is
    config.model.dtype.
    """
    values = module.get_config().to_dict()
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        values[section or "sample"][field] = value
    return config_lib.parse(values)


def options(config, **given):
    defaults = {"workdir": None, "out": None, "overwrite": False, "png": False, "film": False}
    return types.SimpleNamespace(config=config, values=dataclasses.asdict(config), **defaults | given)


@pytest.fixture
def no_weights(monkeypatch):
    def find(*args):
        raise AssertionError("weights are read")

    monkeypatch.setattr(weights, "find", find)


@pytest.mark.parametrize("out", ["README.md/x", "README.md", "/proc/x", "a/" + "x" * 300, "x" * 300, "loop/x"])
def test_a_folder_that_cannot_be_written_is_an_error_before_weights_are_read(no_weights, tmp_path, monkeypatch, out):
    (tmp_path / "README.md").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for main, more in ((sample.main, {}), (encode.main, {"images": None, "count": None})):
        call = lambda main=main, more=more: main(options(parsed(), out=out, **more))
        refuses(call, out[:100], errors=ONE_LINE)
    holds(
        sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a", "loop"] and not [*tmp_path.glob("a/*")]
    )


def test_more_images_than_fit_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(output_parts.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=350))
    call = lambda: output_parts.check_room(
        output_folder.open_folder(tmp_path / "out", MADE_FROM, WRITTEN), {"samples.npz": ARRAYS}
    )
    refuses(call, "config.sample.num_images", "11 images", "440 bytes", "350 bytes", "--out", errors=ONE_LINE)
    holds(not (tmp_path / "out").exists())
    gathered(tmp_path / "out", stop=2)  # 8 of 11 images exist: the disk needs 440 bytes less the bytes of these parts
    call()
    right(gathered(tmp_path / "out"))
    monkeypatch.setattr(output_parts.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    call()  # the result is complete


def test_the_command_refuses_64_terabytes(tmp_path):
    args = ("--config", "configs/digits.py", "--config.sample.num_images=1000000000", "--out", tmp_path / "out")
    refused(run("ddim_jax.sample", *args), "config.sample.num_images", "1000000000", "--out")
    holds(not (tmp_path / "out").exists())


def test_a_late_error_leaves_the_folder_free(tmp_path):
    """The reference is read after the weights. The corrected command can use the same folder."""
    table = ("--config", "configs/digits.py", "--etas=0", "--steps=2", "--config.evaluate.num_images=20")
    table = ("experiments.table1_fid", *table, "--config.evaluate.metrics=fid", "--out", tmp_path / "out")
    refused(run(*table, "--config.evaluate.reference=nope.npz"), "config.evaluate.reference")
    holds(not (tmp_path / "out").exists())
    done = run(*table)
    holds(done.returncode == 0, done.stderr)


# --- cells of tables ---

CELLS = ("cells/S=1", "cells/S=2")


def table(out, values=(1, 2), depends=None, computed=None):
    """A table of two cells. computed: a list to which each S is added that is computed."""

    def measure(S, folder):
        if computed is not None:
            computed.append(S)
        with folder.writing("samples.npz") as file:
            np.savez(file, x=np.full(3, S))
        (folder / "first.png").write_bytes(b"picture %d" % S)
        return {"number": S**2}

    folder = output_folder.open_folder(out, {"experiment": "squares"}, common.WRITTEN)
    cells = [common.Cell({"S": S}, depends or {}, 1, lambda folder, S=S: measure(S, folder)) for S in values]
    return common.run(folder, cells)


ROWS = [{"S": 1, "number": 1}, {"S": 2, "number": 4}]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    assert table(out) == ROWS
    return out


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40)
def test_a_damaged_cell_is_named(measured, tmp_path_factory, data):
    out = tmp_path_factory.mktemp("out") / "out"
    shutil.copytree(measured, out)
    path = (
        out
        / data.draw(st.sampled_from(CELLS))
        / data.draw(st.sampled_from(["result.json", "samples.npz", "first.png"]))
    )
    content = path.read_bytes()
    path.write_bytes(changed := damaged(data, content))
    if changed == content:
        return holds(table(out) == ROWS)
    refuses(lambda: table(out, values=(1,)), str(path), "--out", errors=ONE_LINE)
    path.unlink()
    holds(table(out) == ROWS)


def test_numbers_of_other_runs_are_not_in_the_table(measured, tmp_path):
    forged = json.dumps({"axes": {"S": 3}, "numbers": {"number": 0}})
    for i, change in enumerate(
        [
            lambda out: (out / CELLS[0] / "result.json").write_text(forged.replace("3", "1")),
            lambda out: ((out / "cells/S=3").mkdir(), (out / "cells/S=3/result.json").write_text(forged)),
            lambda out: shutil.copytree(out / CELLS[0], out / "cells/S=3"),
            lambda out: shutil.copy(out / CELLS[0] / "result.json", out / CELLS[1] / "result.json"),
            lambda out: (shutil.rmtree(out / CELLS[1]), shutil.copytree(out / CELLS[0], out / CELLS[1])),
        ]
    ):
        out = tmp_path / str(i)
        shutil.copytree(measured, out)
        change(out)
        refuses(lambda out=out: table(out), str(out / "cells"), "result.json", errors=ONE_LINE)


def test_only_an_incomplete_cell_is_recomputed(measured, tmp_path):
    for name in ("result.json", "samples.npz", "first.png"):
        out, computed = tmp_path / name, []
        shutil.copytree(measured, out)
        (out / CELLS[1] / name).unlink()
        holds(table(out, computed=computed) == ROWS and computed == [2])
        holds(table(out, computed=computed) == ROWS and computed == [2])
    refuses(lambda: table(measured, depends={"process": "another"}), "process", "another", errors=ONE_LINE)


def test_cells_of_an_earlier_version_are_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"experiment": "squares"}))
    for S in (1, 2):
        folder = tmp_path / f"cells/S={S}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / "result.json").write_text(json.dumps({"axes": {"S": S}, "numbers": {"number": S**2}}))
    computed = []
    holds(table(tmp_path, depends={"process": "x"}, computed=computed) == ROWS and computed == [])
    (tmp_path / CELLS[0] / "result.json").write_text(json.dumps({"axes": {"S": 1}, "numbers": {"number": 9}}))
    words = (str(tmp_path / CELLS[0] / "result.json"),)
    refuses(lambda: table(tmp_path, depends={"process": "x"}), *words, errors=ONE_LINE)


# --- fingerprints ---


class Plain(NamedTuple):
    """DDIM with an additional factor: a sampler of a user."""

    factor: float = 1.0
    stochastic = False

    def check(self, transitions):
        pass

    def init(self, x):
        return ()

    def step(self, x_t, state, transition, denoise, noise):
        x_s, state = samplers.ddim().step(x_t, state, transition, denoise, noise)
        return self.factor * x_s, state


class Rewritten(Plain):
    """The same mathematics in other code, with a helper."""

    def step(self, x_t, state, transition, denoise, noise):
        return scaled(samplers.ddim().step(x_t, state, transition, denoise, noise)[0]), ()


FACTOR = 1.0


def scaled(x):
    return x * FACTOR


@register_static
@dataclasses.dataclass(frozen=True)
class Static(Plain):
    name: str = "static"


LINEAR = schedule.linear(1000)


def process_of(sampler, steps=10, noise=LINEAR):
    transitions = trajectory.descend(noise, trajectory.uniform(noise.num_steps, steps))
    return fingerprint.of_process(sampler, transitions, (8, 8, 1))


def test_an_edited_sampler_has_another_fingerprint(monkeypatch):
    """After an edit of a constant, a default, a helper or a global. Equal mathematics has an equal fingerprint."""
    first = process_of(Plain())
    holds(first == process_of(Plain()) == process_of(samplers.ddim()) == process_of(Rewritten()))
    holds(process_of(Plain(0.999)) != first)
    monkeypatch.setattr(f"{__name__}.FACTOR", 0.999)
    jax.clear_caches()  # as in a new process
    holds(process_of(Rewritten()) != first)

    def clipped(self, x_t, state, transition, denoise, noise):
        return jnp.clip(samplers.ddim().step(x_t, state, transition, denoise, noise)[0], -2, 2), state

    monkeypatch.setattr(Static, "step", Plain.step, raising=False)
    before = process_of(Static())
    monkeypatch.setattr(Static, "step", clipped)
    jax.clear_caches()
    holds(before == first and process_of(Static()) != first)


def test_a_sampler_for_float32_only_has_a_fingerprint():
    class Float32(Plain):
        def init(self, x):
            return jnp.zeros(x.shape, jnp.float32)

        def step(self, x_t, state, transition, denoise, noise):
            x_s, _ = samplers.ddim().step(x_t, (), transition, denoise, noise)
            return x_s, x_s

    holds(process_of(Float32()) == process_of(Float32()) and len(process_of(Float32())) == 64)


def test_processes_that_draw_other_images_have_other_fingerprints():
    every = [process_of(sampler) for sampler in (samplers.ddim(), samplers.ddim(0.5), samplers.ddim(0.5001))]
    every += [process_of(samplers.ddpm_hat()), process_of(samplers.ddim(), 11)]
    every += [
        process_of(samplers.ddim(), noise=noise) for noise in (schedule.cosine(1000), schedule.linear(1000, 1.001e-4))
    ]
    every += [process_of(samplers.ddim(), steps=1), process_of(samplers.ddim(), steps=1000)]
    holds(len(set(every)) == len(every))


@pytest.fixture
def tiny(monkeypatch):
    """(fields of config.sample) -> the config of a network of seconds, with random parameters."""
    params = params_of(parsed(smoke))
    monkeypatch.setattr(weights, "find", lambda *args: weights.Weights(params, "nowhere"))
    return lambda **fields: parsed(smoke, **fields)


def test_an_edited_sampler_does_not_return_the_old_images(tmp_path, monkeypatch, tiny):
    """A sampler in the registry, edited between two commands."""
    monkeypatch.chdir(tmp_path)
    draw = lambda **given: sample.main(options(tiny(sampler="mine", num_images=11, batch_size=8), **given))
    monkeypatch.setitem(registry.SAMPLERS, "mine", lambda: Plain(1.0))
    draw()
    draw()
    (first,) = (tmp_path / "samples" / "smoke").iterdir()
    monkeypatch.setitem(registry.SAMPLERS, "mine", lambda: Plain(0.5))
    draw()
    (second,) = {*(tmp_path / "samples" / "smoke").iterdir()} - {first}
    drawn = [np.load(folder / "samples.npz")["arr_0"] for folder in (first, second)]
    holds((drawn[0] != drawn[1]).any())
    refuses(lambda: draw(out=str(first)), str(first), "process", errors=ONE_LINE)


NAMED = {  # options that change the images -> their values
    "eta": [0.0, 0.5],
    "seed": [0, 1],
    "steps": [5, 6],
    "tau": ["uniform", "quadratic", "1,10,100,1000", "1,10,200,1000"],
    "tau_end": [0, 1],
    "clip_x0": [False, True],
    "label": [-1, 3],
    "guidance": [1.0, 1.5],
    "num_images": [100, 101],
    "sampler": ["ddim", "ddpm_hat"],
    "model__dtype": ["float32", "bfloat16"],
}
NO_EFFECT = {"batch_size": 7, "refine": 3, "model__dropout": 0.3, "model__remat": True}


def made_from(config, digest="abc"):
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    found = weights.Weights(None, "somewhere", 7)
    values = {**fingerprint.of_images(config, process), "weights": digest}
    return values, sample.default_folder(config, None, process, found, values)


def test_different_images_have_different_default_folders():
    conditional = lambda **fields: parsed(digits_conditional, **fields)
    usual = made_from(conditional())
    every = [usual, made_from(conditional(), "another checkpoint")]
    every += [made_from(conditional(**{name: value})) for name, values in NAMED.items() for value in values[1:]]
    every += [made_from(conditional(clip_x0=True, **more)) for more in ({"clip_range": 2.0}, {"clip_quantile": 0.9})]
    holds(len({str(folder) for _, folder in every}) == len(every))
    for name, value in NO_EFFECT.items():
        holds(made_from(conditional(**{name: value})) == usual, name)
    holds(
        "label3" in str(made_from(conditional(label=3))[1])
        and "guidance1.5" in str(made_from(conditional(guidance=1.5))[1])
    )


def test_the_fingerprint_of_an_encoding():
    images = np.random.default_rng(0).integers(0, 256, (1500, 8, 8, 1), np.uint8)
    found = types.SimpleNamespace(digest="abc")

    def of(images=images, labels=None, **fields):
        config = encode.deterministic(parsed(digits_conditional, steps=5, **fields))
        process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
        return encode.fingerprint(config, process, found, ArraySource(images, labels), len(images))

    usual, changed = of(), images.copy()
    changed[1] ^= 1  # not one of 1000 images at even indices
    labels = np.arange(1500) % 10
    every = [
        usual,
        of(changed),
        of(labels=labels),
        of(labels=labels[::-1]),
        of(guidance=1.5),
        of(label=3),
        of(refine=2),
    ]
    every += [of(tau_end=1), of(model__dtype="bfloat16"), of(tau="quadratic")]
    holds(len({json.dumps(values) for values in every}) == len(every))
    for fields in ({"batch_size": 7}, {"model__dropout": 0.3}, {"seed": 5}, {"clip_x0": True}, {"num_images": 3}):
        holds(of(**fields) == usual, str(fields))


# --- image i ---


def drawn(config, params, index):
    """x_T, x_0 and pixels of these images, drawn in one batch."""
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    keys, x_T = sampling.start(config_lib.pipeline(config, None, None), jnp.asarray(index))
    keys = keys if process.sampler.stochastic else None
    x_0 = samplers.integrate(
        process.sampler, sampling.conditioned(config_lib.pipeline(config, params, None)), process.transitions, x_T, keys
    )
    return np.asarray(x_T), np.asarray(x_0), np.asarray(to_uint8(x_0)).astype(int)


@pytest.mark.slow
def test_image_i_depends_only_on_the_seed_and_i():
    """Its noise depends only on (seed, i). With the same batch size, devices and version of JAX it is bitwise equal for
    all other images in the batch, and for all numbers of images. With another batch size it changes by at most one grey
    level.
    """
    config, mesh = parsed(smoke, eta=1.0), meshes()[0]
    params = params_of(config)
    noise, x_0, pixels = drawn(config, params, np.arange(8))
    holds(np.unique(pixels).size > 50)
    for index in (np.arange(8), np.r_[0:4, 100:104], np.r_[100:104, 4:8]):
        x_T, x, _ = drawn(config, params, index)
        holds(np.array_equal(x_T[index < 8], noise[index < 8]) and np.array_equal(x[index < 8], x_0[index < 8]))
    for index in (np.arange(8)[::-1], np.arange(5)):
        x_T, x, grey = drawn(config, params, index)
        holds(np.array_equal(x_T, noise[index]) and np.allclose(x, x_0[index], atol=1e-4))
        holds(abs(grey - pixels[index]).max() <= 1)
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    for total, first in ((13, 0), (29, 8)):
        fewer = parsed(smoke, eta=1.0, num_images=total, batch_size=8)
        batches = np.concatenate(
            list(sampling.batches(config_lib.pipeline(fewer, params, mesh, process), fewer.sample.num_images, first))
        )
        expected = drawn(config, params, np.arange(8, 16))[2] if first else pixels
        holds(len(batches) == total - first and np.array_equal(batches[:8], expected))


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_another_batch_size_changes_a_pixel_in_ten_thousand_by_one_grey_level(eta):
    config = parsed(eta=eta, steps=20)
    params = weights.find(config, None, meshes()[0]).params
    _, x_0, pixels = drawn(config, params, np.arange(500))
    for size in (1, 20, 100):
        parts = [drawn(config, params, np.arange(i, i + size)) for i in range(0, 20 * size if size == 1 else 500, size)]
        x, grey = (np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[1:])
        holds(np.allclose(x, x_0[: len(x)], atol=1e-4))
        difference = abs(grey - pixels[: len(grey)])
        holds(difference.max() <= 1 and difference.mean() <= 1e-4)


def test_the_record_holds_batch_size_and_devices(tmp_path, tiny):
    draw = lambda **more: sample.main(options(tiny(num_images=11, **more), out=str(tmp_path / "out")))
    draw(batch_size=5)
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["files"]
    (computed_with,) = recorded["samples.npz"]["computed_with"]
    devices = jax.device_count()
    expected = {"from": 0, "batch_size": -(-5 // devices) * devices, "devices": devices, "device": "cpu"}
    holds(computed_with == {**expected, "jax": jax.__version__})
    draw(batch_size=8)  # no error: the batch size may change
    holds(recorded == json.loads((tmp_path / "out" / "run.json").read_text())["files"])
    with zipfile.ZipFile(tmp_path / "out" / "samples.npz") as archive:
        holds(archive.namelist() == ["arr_0.npy"] and archive.comment == b"")


def test_the_record_of_a_run_that_resumed_with_other_devices(tmp_path):
    gathered(tmp_path, size=3, stop=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPUTED_WITH, "devices", 8)
        right(gathered(tmp_path, size=2))
    (entries,) = (entry["computed_with"] for entry in json.loads((tmp_path / "run.json").read_text())["files"].values())
    holds(entries == [{"from": 0, **COMPUTED_WITH}, {"from": 6, **COMPUTED_WITH, "devices": 8}])
