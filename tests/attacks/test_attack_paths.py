"""Names in files and options are never used as paths, and their control characters are never printed."""

import dataclasses
import json
import pathlib
import types

import hypothesis
import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.numpy
from attacking import holds, refuses
from processes import run

from configs import digits
from ddim_jax import checkpoints, encode, sample
from ddim_jax import config as config_lib
from ddim_jax.config import weights
from ddim_jax.utils import files, output_folder
from ddim_jax.utils.errors import ConfigError
from experiments import common, oracle_table1

HOSTILE = [
    *("../../x", "/abs", "..", ".", "", "a/../../b", "~/x", "x\x00y", "\x1b]0;x\x07", "a\nb", "x" * 300, "é" * 200),
    *("\udcff", "CON", "-rf", "--out=x", "a b", "$(id)", "\u202egnp.exe", "*", "C:\\x", "samples/../..", "\x7f"),
]
names = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=300), st.text("./\\~\x00\x1b-_ab", max_size=30))


def inside(path, folder):
    """Whether the path is below the folder, by its parts, printable, and valid for a file system."""
    path, folder = pathlib.Path(path), pathlib.Path(folder)
    return (
        path.is_relative_to(folder)
        and ".." not in path.parts
        and str(path).isprintable()
        and all(len(part.encode()) <= 255 for part in path.parts)
    )


CONFIG = config_lib.parse(digits.get_config().to_dict())
PROCESS = config_lib.process(CONFIG.sample, config_lib.noise_schedule(CONFIG.schedule))


@hypothesis.given(names)
def test_the_default_folder_is_below_samples(name):
    config = dataclasses.replace(CONFIG, name=name)
    folder = sample.default_folder(config, None, PROCESS, weights.Weights(None, "", 1), {"weights": name})
    holds(inside(folder, "samples") and len(folder.parts) == 3)
    files.check_name(folder.name)
    files.check_name(folder.parent.name)


@hypothesis.given(st.dictionaries(names, names, min_size=1, max_size=12))
def test_the_folder_of_a_cell_is_one_name_below_cells(axes):
    folder = common.folder_of(axes)
    holds(inside(folder, "cells") and len(folder.parts) == 2)


@hypothesis.given(st.lists(st.tuples(names, names), min_size=2, max_size=2, unique=True))
def test_two_cells_have_different_folders(values):
    first, second = (dict(zip(("sample.tau", "pretrained"), pair, strict=True)) for pair in values)
    holds(common.folder_of(first) != common.folder_of(second))


def test_cells_of_earlier_versions_keep_their_names():
    holds(common.folder_of({"eta": "0.5", "S": 10}).name == "eta=0.5_S=10")
    holds(common.folder_of({"sample.tau": "official_uniform"}).name == "sample.tau=official_uniform")
    holds(common.folder_of({"p": "a"}) != common.folder_of({"p": "a "}) != common.folder_of({"p": "a/"}))
    holds(common.folder_of({"a": "1_b=2", "b": "3"}) != common.folder_of({"a": "1", "b": "2_b=3"}))


@pytest.mark.parametrize(
    "name",
    [
        *("../../escaped", "a\x1b]0;owned\x07b"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("/tmp/escaped_by_ddim_jax", "x\x00y", "..")),
    ],
)
def test_a_name_in_a_weights_file_is_not_used_as_a_path(tmp_path, name):
    """The command without --out: an error, or samples below the folder samples."""
    home = tmp_path / "home"
    home.mkdir()
    with safetensors.safe_open(checkpoints.shipped("digits"), framework="numpy") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = json.loads(metadata["config"]) | {"name": name}
    metadata = {key: value for key, value in metadata.items() if "sha" not in key and "digest" not in key}
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors", metadata | {"config": json.dumps(config)})
    args = ("--config.sample.num_images=1", "--config.sample.steps=1", f"--config.pretrained={tmp_path}/w.safetensors")
    root = pathlib.Path(__file__).parents[2]
    done = run("ddim_jax.sample", "--config", root / "configs" / "default.py", *args, cwd=home)
    holds(done.returncode in (0, 2), done.stderr)
    written = [path for path in tmp_path.rglob("samples.npz")]
    holds(len(written) == (done.returncode == 0))
    holds(all(inside(path, home / "samples") for path in written))
    holds(not pathlib.Path("/tmp/escaped_by_ddim_jax").exists())
    holds("\x1b" not in done.stdout + done.stderr and "\x00" not in done.stdout + done.stderr)


@hypothesis.given(names)
def test_strings_of_a_record_are_printed_escaped(tmp_path_factory, name):
    out = tmp_path_factory.mktemp("out")
    record = {"sample": {"sampler": name}, "model": {name: name}}
    (out / "run.json").write_text(json.dumps(record))
    call = lambda: output_folder.open_folder(out, {"sample": {"sampler": 0}}, ())
    message = refuses(call, str(out), "sample.sampler", errors=(ConfigError,))
    holds(message.isprintable() and len(message) < 500)


def test_invalid_names_of_files_in_a_record(tmp_path):
    (tmp_path / "secret.npz").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("../secret.npz", "/etc/passwd", "", "..", "a/b", "\x00", "x" * 300):
        record = {"made_from": {}, "files": {name: {"sha256": "0" * 64}}}
        (out / "run.json").write_text(json.dumps(record))
        refuses(lambda: output_folder.open_folder(out, {}, ()), str(out / "run.json"), errors=(ConfigError,))


@pytest.mark.parametrize("count", ["²", "٣", "1e3", "-1", "0", "360", "9" * 5000, " ", "1,5", "0x10", "１"])
def test_invalid_counts(count):
    message = refuses(lambda: encode.load_images(None, count, CONFIG), "--count", errors=(ConfigError,))
    holds(len(message) < 200)


def test_images_and_count_are_the_same_option(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(oracle_table1.common, "begin", lambda *args, **depends: seen.append(depends) or 1 / 0)
    config = config_lib.parse(digits.get_config().to_dict())
    given = dict(
        config=config, values=dataclasses.asdict(config), out=str(tmp_path), etas="0", steps="5", data="digits"
    )
    for images, count in ((None, "50"), ("50", "20000")):
        with pytest.raises(ZeroDivisionError):
            oracle_table1.main(types.SimpleNamespace(**given, points="500", images=images, count=count))
    holds(seen[0] == seen[1] and seen[0]["counts"]["digits"] == 50)
