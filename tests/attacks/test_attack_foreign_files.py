"""Checkpoints of strangers: fields of wrong types and absurd sizes, texts that would reach paths and terminals, files
that never end.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import zipfile

import jax.numpy as jnp
import mutations
import numpy as np
import pytest
import safetensors.numpy
import yaml
from attacking import holds, refused, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import DEEP, WRONG, refuses_or, smoke_values
from processes import ROOT, run
from test_unet import random_params

from configs import smoke
from ddim_jax import checkpoints
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, parameter_names
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.config import weights
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

NETWORK = config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model)
UNET, NOISE, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def refuses_file(call, *words):
    return refuses(call, *words, errors=(CheckpointError,))


@pytest.fixture(scope="module")
def params():
    return random_params(NETWORK)


@pytest.fixture(scope="module")
def original(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("foreign") / "net"
    diffusers_export.save(folder, params, smoke_values(), "a card\n")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "net"))


def edited(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(autouse=True)
def in_a_minute():
    """What waits for a pipe is interrupted."""

    def late(number, frame):
        raise TimeoutError("it does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- fields ---


@settings(max_examples=250)
@given(data=st.data())
def test_a_field_of_a_diffusers_folder_that_is_something_else(original, data):
    """Refused in one line, or a network of a size that can be."""
    name = data.draw(st.sampled_from([UNET, NOISE, INDEX]))
    path, text = original / name, (original / name).read_text()
    fields = json.loads(text) | ({"trained_betas": None} if name == NOISE else {})
    try:
        path.write_text(
            json.dumps(fields | {data.draw(st.sampled_from(sorted(fields))): data.draw(st.sampled_from(WRONG))})
        )
        refuses_or(lambda: weights.read_info(str(original)), lambda found: found.model.image_size <= 4096)
    finally:
        path.write_text(text)


@settings(max_examples=150)
@given(data=st.data())
def test_a_field_of_our_own_config_that_is_something_else(params, tmp_path_factory, data):
    values = smoke_values()
    section = data.draw(st.sampled_from(["", "model", "schedule", "sample"]))
    value = data.draw(st.sampled_from(WRONG))
    if section:
        values[section] |= {data.draw(st.sampled_from(sorted(values[section]))): value}
    else:
        values[data.draw(st.sampled_from(["name", "model", "schedule", "sample"]))] = value
    path = tmp_path_factory.getbasetemp() / "own.safetensors"
    metadata = {
        "format": "ddim_jax",
        "config": json.dumps(values),
        "step": data.draw(st.sampled_from(["5", "-1", "x"])),
    }
    mutations.write_old_safetensors(path, {"a": np.ones(1)}, metadata)

    def recipe():
        found = weights.read_info(str(path))
        config_lib.part_of_section(config_lib.SampleConfig, found.sample, "sample")  # of the right types
        return found.name

    refuses_or(recipe, lambda name: files.NAME.fullmatch(name) is not None)  # one that can be part of a path


ABSURD = [
    (UNET, "sample_size", 10**9),
    (UNET, "sample_size", 10**30),
    (UNET, "layers_per_block", 10**6),
    (UNET, "layers_per_block", 100),
    (UNET, "block_out_channels", [10**9, 10**9]),
    (UNET, "block_out_channels", [8] * 1000),
    (UNET, "norm_num_groups", 10**9),
    (UNET, "attention_head_dim", 10**9),
    (UNET, "num_class_embeds", 10**9),
    (UNET, "norm_eps", 10**400),
    (NOISE, "num_train_timesteps", 10**10),
    (NOISE, "steps_offset", 10**30),
    (NOISE, "beta_start", 10**400),
    (NOISE, "clip_sample_range", float("nan")),
]


@pytest.mark.parametrize("name, field, value", ABSURD, ids=lambda value: str(value)[:30])
def test_a_size_that_cannot_be(folder, name, field, value):
    """Before anything of that size is made."""
    edited(folder / name, **{field: value} | ({"timestep_spacing": "leading"} if name == NOISE else {}))
    ours = {
        "sample_size": "image_size",
        "block_out_channels": "channels",
        "layers_per_block": "num_res_blocks",
        "norm_num_groups": "groups",
        "attention_head_dim": "head_channels",
        "num_class_embeds": "num_classes",
        "norm_eps": "norm_epsilon",
        "num_train_timesteps": "num_steps",
        "steps_offset": "tau_offset",
        "clip_sample_range": "clip_range",
    }.get(field, field)
    refuses_file(lambda: weights.read_info(str(folder)), ours)


def test_too_many_channels_of_images(folder):
    edited(folder / UNET, in_channels=10**9, out_channels=10**9)
    refuses_file(lambda: weights.read_info(str(folder)), "image_channels")


def test_betas_are_as_many_as_levels(folder):
    edited(folder / NOISE, trained_betas=[0.01] * 99)
    refuses_file(lambda: weights.read_info(str(folder)), "num_train_timesteps", "99")


@pytest.mark.parametrize("name", [UNET, NOISE, INDEX])
@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 300 + "1" + "}" * 300, "{", "", "\xff", '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_none(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refuses_file(lambda: weights.read_info(str(folder)), name)


@pytest.mark.parametrize("name", [UNET, NOISE, INDEX])
def test_json_of_a_terabyte(folder, name):
    os.truncate(folder / name, 1 << 40)
    refuses_file(lambda: weights.read_info(str(folder)), name)


@pytest.mark.parametrize("text", [DEEP, "{", "[]", "5", "null", '{"name": ' + DEEP + "}"])
def test_our_own_config_that_is_none(tmp_path, text):
    metadata = {"format": "ddim_jax", "config": text, "step": "5"}
    mutations.write_old_safetensors(tmp_path / "own.safetensors", {"a": np.ones(1)}, metadata)
    refuses_file(lambda: weights.read_info(str(tmp_path / "own.safetensors")), "own.safetensors")


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8, 7])
def test_a_header_that_is_longer_than_it_may_be(tmp_path, size):
    path = tmp_path / "own.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b'{"a": 1}' * 10)
    refuses_file(lambda: weights.read_info(str(path)), "own.safetensors")


# --- names and texts ---

NAMES = [
    "../../x",
    "/abs",
    "a\0b",
    "\x1b[31mred",
    "",
    ".",
    "..",
    "a" * 200,
    "a/b",
    "x\n---\n# y",
    5,
    None,
    ["x"],
    "-rf",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_in_a_file_is_no_path(params, tmp_path, name):
    mutations.write_smoke(tmp_path / "own.safetensors", params, name=name)
    refuses_file(lambda: weights.read_info(str(tmp_path / "own.safetensors")), "name")


@pytest.mark.parametrize("name", ["../../x", "/abs", "\x1b[31mred"], ids=repr)
def test_a_name_in_a_run_is_no_path(params, tmp_path, name):
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        state = TrainState(jnp.int32(0), params, params, {}, jnp.int32(0))
        checkpoints.save(state, smoke_values() | {"name": name})
        checkpoints.wait()
    refuses_file(lambda: weights.read_info(str(tmp_path / "run")), "name")


def test_nothing_is_written_outside(params, tmp_path, monkeypatch):
    """Without --out, by the command."""
    mutations.write_smoke(tmp_path / "own.safetensors", params, name="../../outside")
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{ROOT}")
    shipped = ROOT / "configs" / "default.py"
    given = f"--config.pretrained={tmp_path / 'own.safetensors'}"
    refused(run("ddim_jax.sample", "--config", shipped, given, "--config.sample.num_images=1", cwd=inner), "name")
    holds(sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "own.safetensors"])


@pytest.mark.parametrize("called", ["my net (1)", "\x1b[31mred", "net\nnet", "--", "né"])
def test_the_name_of_a_folder_becomes_one_that_is_plain(original, tmp_path, called):
    shutil.copytree(original, tmp_path / called)
    name = weights.read_info(str(tmp_path / called)).name
    holds(name and all(c.isascii() and (c.isalnum() or c in "._-") for c in name) and name[0].isalnum(), name)


ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\n"


def without_escapes(message):
    holds(message is not None and message.isprintable() and "owned" in message, message)


def test_texts_of_files_do_not_reach_the_terminal_as_they_are(folder, params, tmp_path):
    edited(folder / UNET, **{ESCAPE: 1})
    without_escapes(refuses_or(lambda: weights.read_info(str(folder))))
    edited(folder / UNET, **{ESCAPE: None}, down_block_types=["DownBlock2D", ESCAPE])
    without_escapes(refuses_or(lambda: weights.read_info(str(folder))))
    edited(folder / INDEX, _class_name=ESCAPE)
    without_escapes(refuses_or(lambda: weights.read_info(str(folder))))
    edited(folder / INDEX, **{ESCAPE: ["diffusers", "VQModel"]})
    without_escapes(refuses_or(lambda: weights.read_info(str(folder))))
    safetensors.numpy.save_file({ESCAPE: np.ones(1, np.float32)}, tmp_path / "some.safetensors")
    without_escapes(refuses_or(lambda: weights.read_info(str(tmp_path / "some.safetensors"))))


def test_a_message_does_not_grow_with_the_file(folder):
    edited(folder / UNET, down_block_types=["x" * 1_000_000, "y"])
    holds(len(refuses_or(lambda: weights.read_info(str(folder)))) <= 2000)
    edited(folder / UNET, down_block_types=["DownBlock2D", "AttnDownBlock2D"], sample_size=[[7] * 1000] * 1000)
    holds(len(refuses_or(lambda: weights.read_info(str(folder)))) <= 2000)


# --- the official code's config ---

YAML = """
data: {image_size: 8, rescaled: true}
model: {ch: 32, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4], in_channels: 1, out_ch: 1, dropout: 0.1}
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.02, num_diffusion_timesteps: 100}
"""
LAUGHS = "a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}, *a{i}]\n" for i in range(40))
MERGES = "m0: &m0 {x: 1}\n" + "".join(
    f"m{i + 1}: &m{i + 1} {{<<: [*m{i}, *m{i}, *m{i}, *m{i}], y{i}: 1}}\n" for i in range(12)
)


@pytest.fixture(scope="module")
def official_tensors():
    """A network under the names of the official code."""
    values = smoke_values()["model"] | {"channels": 32, "groups": 32}
    params = random_params(config_lib.network(config_lib.section(config_lib.ModelConfig, values, "model")))
    of = lambda path, leaf: np.ascontiguousarray(
        parameter_names.to_theirs(path, np.asarray(leaf), parameter_names.OFFICIAL)
    )
    return {parameter_names.OFFICIAL.name(path, 2): of(path, leaf) for path, leaf in mutations.flat(params).items()}


@pytest.fixture
def official(official_tensors, tmp_path):
    safetensors.numpy.save_file(official_tensors, tmp_path / "net.safetensors")
    (tmp_path / "config.yml").write_text(YAML)
    weights.read_info(str(tmp_path / "net.safetensors"))
    return tmp_path / "net.safetensors"


HOSTILE_YAML = {
    "deep": "a: " + DEEP,
    "laughs": LAUGHS + YAML.replace("ch: 32", "ch: *a40"),
    "laughs unused": LAUGHS + YAML,
    "merges": MERGES + YAML,
    "itself": "a: &a [*a]\n" + YAML.replace("ch: 32", "ch: *a"),
    "large": "# " + "x" * 10_000_000 + YAML,
    "a date": YAML.replace("ch: 32", "ch: 2020-99-99"),
    "a number": YAML.replace("ch: 32", "ch: 0x" + "f" * 10_000),
    "no number": YAML.replace("ch: 32", 'ch: !!int "x"'),
    "binary": YAML.replace("ch: 32", "ch: !!binary x"),
    "keys": YAML + "? [1, 2]\n: 3\n",
    "control": YAML.replace("linear", '"\\e[2J"'),
    "schedule": YAML.replace("linear", "[1]"),
    "misspelt": YAML.replace("beta_start", "beta_strat"),
    "huge": YAML.replace("ch: 32", "ch: 1000000000"),
    "levels": YAML.replace("num_diffusion_timesteps: 100", "num_diffusion_timesteps: 10000000000"),
    "image": YAML.replace("image_size: 8", "image_size: 1000000000"),
    "nan": YAML.replace("0.0001", ".nan"),
    "bool": YAML.replace("num_res_blocks: 1", "num_res_blocks: true"),
    "code": "a: !!python/object/apply:os.system ['touch executed']\n" + YAML.replace("ch: 32", "ch: -1"),
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_yaml_that_is_hostile(official, text, monkeypatch):
    monkeypatch.chdir(official.parent)
    official.with_name("config.yml").write_text(text)
    refuses_file(lambda: weights.read_info(str(official)), official.parent.name)
    holds(not official.with_name("executed").exists())


@settings(max_examples=60)
@given(value=st.sampled_from(WRONG), field=st.sampled_from(sorted(set(re.findall(r"(\w+): ", YAML)))))
def test_a_field_of_its_config_that_is_something_else(params, tmp_path_factory, value, field):
    folder = tmp_path_factory.getbasetemp() / "official"
    if not folder.exists():
        folder.mkdir()
        keys = ("conv_in.weight", "temb.dense.0.weight")
        safetensors.numpy.save_file({key: np.ones(1, np.float32) for key in keys}, folder / "net.safetensors")
    content = yaml.safe_load(YAML)
    for section in content.values():
        if field in section:
            section[field] = value
    if field in content:
        content[field] = value
    (folder / "config.yml").write_text(json.dumps(content))
    refuses_or(lambda: weights.read_info(str(folder / "net.safetensors")), lambda found: found.model.image_size == 8)


def test_tensors_alone_do_not_tell_a_network(official):
    """Attention might be at any size of images."""
    official.with_name("config.yml").unlink()
    refuses_file(lambda: weights.read_info(str(official)), "config.yml")


# --- files of PyTorch ---


def zip_of_torch(path, state):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    torch.save({name: torch.tensor(value) for name, value in state.items()}, path)


@pytest.fixture
def checkpoint(official):
    path = official.with_suffix(".ckpt")
    zip_of_torch(path, safetensors.numpy.load_file(official))
    return path


@pytest.mark.parametrize("place", range(8))
def test_a_bit_of_a_pytorch_file(checkpoint, place):
    """Its own CRCs tell."""
    content = bytearray(checkpoint.read_bytes())
    with zipfile.ZipFile(checkpoint) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size > 1000]
    entry = entries[len(entries) * place // 8]
    content[entry.header_offset + 200 + len(entry.filename)] ^= 1 << place
    checkpoint.write_bytes(content)
    refuses_or(lambda: mutations.load(checkpoint), lambda read: False)


def test_a_pytorch_file_without_crcs(official):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    state = {name: torch.tensor(value) for name, value in safetensors.numpy.load_file(official).items()}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, official.with_suffix(".ckpt"))
    finally:
        torch.serialization.set_crc32_options(True)
    holds(mutations.load(official.with_suffix(".ckpt"))[0] == mutations.load(official)[0])


def test_a_pytorch_file_that_is_compressed(checkpoint):
    """It may be of any size when it is read."""
    with zipfile.ZipFile(checkpoint) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
        archive.writestr(f"{next(iter(content)).split('/')[0]}/data/bomb", bytes(100_000_000))
    refuses_file(lambda: mutations.load(checkpoint), "compressed")


def test_a_view_that_claims_what_is_not_stored(official):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    state = {name: torch.tensor(value) for name, value in safetensors.numpy.load_file(official).items()}
    torch.save(state | {"conv_in.weight": torch.ones(1).expand(32, 1, 3, 3)}, official.with_suffix(".ckpt"))
    refuses_file(lambda: mutations.load(official.with_suffix(".ckpt")))


@pytest.mark.parametrize("key", [5, None, (1, 2)], ids=repr)
def test_names_that_are_no_texts(official, key):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    torch.save({key: torch.ones(1), "conv_in.weight": torch.ones(1)}, official.with_suffix(".ckpt"))
    refuses_file(lambda: weights.read_info(str(official.with_suffix(".ckpt"))))


# --- pipes and devices ---

PIPES = [UNET, NOISE, INDEX, WEIGHTS]


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_a_folder(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refuses_file(lambda: mutations.load(folder))


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors", "pipe.ckpt"])
def test_a_pipe_or_a_device_instead_of_a_checkpoint(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refuses_file(lambda: weights.read_info(str(tmp_path / name)), "neither a regular file nor a folder")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refuses_file(lambda: weights.read_info(str(tmp_path / name)), "neither a regular file nor a folder")


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "config/metadata", "record/metadata", "ema_params/_METADATA"])
def test_a_pipe_in_a_run(params, tmp_path, name):
    """In a process of its own: what reads it cannot be interrupted."""
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(0), params, params, {}, jnp.int32(0)), smoke_values())
        checkpoints.wait()
    path = tmp_path / "run" / "checkpoints" / "0" / name
    path.unlink()
    os.mkfifo(path)
    refuses_file(lambda: mutations.load(tmp_path / "run"), "neither a regular file nor a folder")


# --- the hub ---


def in_cache(folder, name, digest):
    """Moves a file of a folder to where huggingface_hub's cache keeps it, called by its digest."""
    blobs = folder.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    shutil.move(folder / name, blobs / digest)
    (folder / name).symlink_to(blobs / digest)
    return blobs / digest


@pytest.mark.parametrize("name", [UNET, NOISE, INDEX, WEIGHTS])
def test_a_bit_of_a_file_in_the_cache_of_the_hub(folder, name):
    """The hub calls a large file by its SHA-256, and a small one as Git does."""
    content = (folder / name).read_bytes()
    of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    blob = in_cache(folder, name, hashlib.sha256(content).hexdigest() if name == WEIGHTS else of_git)
    mutations.load(folder)
    changed = bytearray(content)
    at = content.index(b"0.02") + 3 if name == NOISE else len(content) - 20
    changed[at] ^= 1
    blob.write_bytes(changed)
    refuses_file(lambda: mutations.load(folder), "damaged")


@pytest.mark.parametrize("value, said", [("0", "the hub cannot be reached"), ("1", "HF_HUB_OFFLINE is set")])
def test_offline_means_what_it_means_to_the_hub(tmp_path, monkeypatch, value, said):
    import huggingface_hub.utils._http as http_of_hub
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value == "1")  # what it read at its import
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(http_of_hub.time, "sleep", lambda seconds: None)
    refuses_file(lambda: weights.read_info("google/ddpm-smoke"), said)


def test_the_files_that_ship_are_among_them():
    """What is refused above is not what ships."""
    for name in checkpoints.shipped_names():
        holds(weights.read_info(str(checkpoints.shipped(name))).name == name)
