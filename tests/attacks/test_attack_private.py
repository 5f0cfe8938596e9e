"""The output of convert may be published: it holds nothing private, and no text of a config becomes markdown. convert
replaces only files that it wrote.
"""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import subprocess
import types
import typing

import jax.numpy as jnp
import mutations
import numpy as np
import pytest
import safetensors
import yaml
from attacking import holds, refused, refuses
from processes import run
from tiny import random_params, smoke_values

from configs import smoke
from ddim_jax import checkpoints, convert
from ddim_jax import config as config_lib
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils.errors import CheckpointError, ConfigError

SECRET = "top-secret-1b9e"
PLACES = ("pretrained", "data.path", "train.wandb", "evaluate.features", "evaluate.weights", "evaluate.reference")
FORMATS = {"safetensors": "w.safetensors", "diffusers": "folder", "orbax": "run"}


@pytest.fixture(scope="module")
def params():
    return random_params(config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model))


def private_values():
    """A config with paths and accounts, in its fields and in unknown fields."""
    values = smoke_values()
    for place in PLACES:
        section, _, field = place.rpartition(".")
        (values[section] if section else values)[field] = f"/home/{SECRET}/{field}"
    values["hostname"] = values["train"]["notes"] = values["data"]["root"] = SECRET
    return values


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
    """A run with that config."""
    workdir = tmp_path_factory.mktemp(SECRET) / "run"
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), params, params, {}, jnp.int32(0)), private_values())
        checkpoints.wait()
    return workdir


def converted(source, to, format_=None, overwrite=False, paths=False):
    given = {"from": str(source), "to": str(to), "format": format_, "ema": True}
    convert.main(types.SimpleNamespace(**given, overwrite=overwrite, paths=paths))
    return pathlib.Path(to)


def texts(where):
    """The bytes of all files and of their names."""
    paths = [where, *where.rglob("*")] if where.is_dir() else [where]
    return b"".join(path.read_bytes() for path in paths if path.is_file()) + " ".join(p.name for p in paths).encode()


# --- paths and accounts ---


@pytest.mark.parametrize("format_", FORMATS)
def test_the_output_holds_no_path_and_no_account(workdir, tmp_path, format_):
    first = converted(workdir, tmp_path / FORMATS[format_], format_)
    holds(SECRET.encode() not in texts(first), format_)
    if format_ != "diffusers":
        holds(SECRET.encode() not in texts(converted(first, tmp_path / "second")))


def test_the_card_holds_the_config(workdir, tmp_path):
    card = (converted(workdir, tmp_path / "folder") / "README.md").read_text()
    config = json.loads(card.split("```json")[1].split("```")[0])
    expected = json.loads(json.dumps(dataclasses.asdict(config_lib.parse(smoke_values()))))
    for section in ("model", "schedule", "sample", "name"):
        holds(config[section] == expected[section], section)
    holds(config["train"]["learning_rate"] == smoke_values()["train"]["learning_rate"])
    config_lib.parse_saved(config)  # the config is complete


@pytest.mark.parametrize("format_", ["safetensors", "diffusers"])
def test_paths_are_written_on_request(workdir, tmp_path, format_):
    holds(
        f"/home/{SECRET}/path".encode() in texts(converted(workdir, tmp_path / FORMATS[format_], format_, paths=True))
    )


def test_every_string_field_is_private_or_public():
    """A new field that may hold a path must be in PRIVATE. Another string field must be in the list here."""
    public = {"name", "sample.tau", "evaluate.metrics"}
    for name, kind in _fields(config_lib.Config):
        if kind is str and not _is_choice(name):
            holds(name in public or name in config_lib.PRIVATE, name)


def _fields(kind, path=""):
    for name, inner in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def _is_choice(name):
    """Whether the field is a name in a table, so that another string raises an error."""
    try:
        config_lib.parse(_with(smoke_values(), name, SECRET))
    except ConfigError as error:
        return f"config.{name}" in str(error)
    return False


def _with(values, name, value):
    return config_lib.with_value(values, name, value)


def test_the_public_part_of_a_config_lacks_only_the_private_fields():
    values = smoke_values()
    public = config_lib.public(private_values())
    holds(SECRET not in json.dumps(public))
    holds(config_lib.parse(public).train == config_lib.parse(values).train)
    holds(config_lib.public({"model": {"channels": 8}}) == {"model": {"channels": 8}})
    holds(config_lib.public({}) == {} and config_lib.public({"model": 5}) == {"model": {}})


# --- markdown ---

MARKDOWN = [
    "`` ` ``\n# owned",
    "```\n\n# owned\n```",
    "---\nlicense: owned\n---",
    "<script>owned</script>",
    "\x1b[31mowned",
]


@pytest.mark.parametrize("text", MARKDOWN, ids=repr)
def test_strings_of_a_config_are_not_markdown_in_the_card(params, tmp_path, text):
    values = smoke_values()
    values["sample"]["tau"] = text
    for section, field in (("train", "ema_schedule"), ("data", "name"), ("evaluate", "metrics")):
        values[section][field] = text
    values[text] = text
    checkpoints.save(tmp_path / "own.safetensors", params, values, 5)
    card = (converted(tmp_path / "own.safetensors", tmp_path / "folder") / "README.md").read_text()
    holds(all(c.isprintable() or c == "\n" for c in card))
    _, front, rest = card.split("---\n", 2)
    holds(yaml.safe_load(front) == {
        "library_name": "diffusers", "pipeline_tag": "unconditional-image-generation",
        "tags": ["ddim", "ddpm", "jax", "ddim_jax"],
    })  # fmt: skip
    lines, fenced = rest.splitlines(), False
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            holds(not line.startswith("#") or "owned" not in line, line)
            holds("<script" not in line or "`" in line.split("<script")[0], line)
    holds(not fenced and json.loads(card.rsplit("```json", 1)[1].rsplit("```", 1)[0])["name"] == "smoke")


# --- --overwrite ---


def listing(folder):
    """{path: content, None for a folder} of everything in a folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def a_run(folder, workdir):
    shutil.copytree(workdir, folder)


def a_run_in_training(folder, workdir):
    (folder / "checkpoints").mkdir(parents=True)


def notes(folder, workdir):
    folder.mkdir()
    (folder / "README.md").write_text("my notes\n")


def a_foreign_pipeline(folder, workdir):
    converted(workdir, folder)
    (folder / "README.md").write_text("another card\n")


def a_pipeline_and_more(folder, workdir):
    converted(workdir, folder)
    (folder / "unet" / "notes.txt").write_text("mine\n")


def a_pipeline_with_a_link(folder, workdir):
    converted(workdir, folder)
    shutil.move(folder / "unet", folder.parent / "elsewhere")
    (folder / "unet").symlink_to(folder.parent / "elsewhere")


def photographs(folder, workdir):
    (folder / "2026").mkdir(parents=True)
    (folder / "2026" / "one.png").write_bytes(b"png")


OTHERS = [a_run, a_run_in_training, notes, a_foreign_pipeline, a_pipeline_and_more, a_pipeline_with_a_link, photographs]


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("format_", ["diffusers", "orbax"])
def test_overwrite_does_not_replace_another_folder(workdir, tmp_path, make, format_):
    to = tmp_path / "present"
    make(to, workdir)
    before = listing(tmp_path)
    for overwrite in (False, True):
        call = lambda overwrite=overwrite: converted(workdir, to, format_, overwrite)
        refuses(call, str(to), "--to", errors=(ConfigError,))
    holds(listing(tmp_path) == before)


@pytest.mark.parametrize("place", ["/", "~", "~/..", "/tmp", "/etc"])
def test_overwrite_does_not_replace_a_system_folder(workdir, tmp_path, monkeypatch, place):
    monkeypatch.setattr(convert, "WRITERS", {name: lambda *args: None for name in FORMATS})  # for the case of a failure
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".profile").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = pathlib.Path(place).expanduser()
    refuses(lambda: converted(workdir, place, "diffusers", True), f" {place} ", "--to", errors=(ConfigError,))


@pytest.mark.parametrize("content", [b"", b"notes", "foreign"], ids=str)
def test_overwrite_does_not_replace_another_file(workdir, tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content == "foreign":
        safetensors.numpy.save_file({"lora": np.ones(3)}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    call = lambda: converted(workdir, path, overwrite=True)
    refuses(call, str(path), errors=(ConfigError, CheckpointError))
    holds(path.read_bytes() == before)


def test_overwrite_replaces_an_output_of_convert(workdir, tmp_path):
    for name, format_ in (("folder", "diffusers"), ("w.safetensors", "safetensors")):
        converted(workdir, tmp_path / name, format_)
        before = listing(tmp_path)
        (tmp_path / "folder" / f".{'0' * 16}.tmp").mkdir()  # of a process that was killed
        converted(workdir, tmp_path / name, format_, overwrite=True)
        (tmp_path / "folder" / f".{'0' * 16}.tmp").rmdir()
        holds(listing(tmp_path).keys() == before.keys())
        holds(mutations.equal(mutations.load(tmp_path / name)[1], mutations.load(workdir)[1]))


def test_temporary_folders_of_a_killed_process_are_no_error(workdir, tmp_path):
    for format_ in ("diffusers", "orbax"):
        (tmp_path / format_ / f".{'0' * 16}.tmp" / "checkpoints").mkdir(parents=True)
        converted(workdir, tmp_path / format_, format_)


@pytest.mark.slow
def test_a_failure_leaves_no_files(workdir, tmp_path, monkeypatch):
    """With a new folder, and with an empty one. Then the same command succeeds."""
    for format_ in ("diffusers", "orbax"):
        for exists in (False, True):
            to = tmp_path / f"{format_}-{exists}"
            if exists:
                to.mkdir()
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", _full)
                with pytest.raises((OSError, CheckpointError)):
                    converted(workdir, to, format_)
            holds(to.exists() == exists and (not exists or not listing(to)), format_)
            converted(workdir, to, format_)


def _full(*args, **kwargs):
    raise OSError(28, "No space left on device", "there")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can make a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("format_", FORMATS)
def test_the_same_command_succeeds_after_a_full_disk(workdir, small_disk, format_):
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    ballast.write_bytes(bytes(free - 40_000))
    to = small_disk / FORMATS[format_]
    reason = "checkpoints" if format_ == "orbax" else os.strerror(errno.ENOSPC)
    refused(run("ddim_jax.convert", "--from", workdir, "--to", to, "--format", format_), str(to), reason)
    holds(sorted(path.name for path in small_disk.iterdir()) == ["ballast"])
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    converted(workdir, to, format_)
    holds(mutations.equal(mutations.load(to)[1], mutations.load(workdir)[1]))
