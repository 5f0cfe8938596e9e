"""Checkpoints from untrusted sources: fields of wrong types and huge sizes, names that are paths or escape sequences,
pipes and devices.
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
from mutations import DEEP, WRONG, refuses_or
from processes import ROOT, run
from tiny import random_params, smoke_values

from configs import smoke
from ddim_jax import checkpoints
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, parameter_names
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.config import weights
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError, DamagedError

NETWORK = config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model)
UNET, NOISE, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def refuses_file(call, *words, errors=(CheckpointError,)):
    return refuses(call, *words, errors=errors)


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
    """A test that waits for a pipe fails after a minute."""

    def fail(number, frame):
        raise TimeoutError("60 seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- fields ---


@settings(max_examples=250)
@given(data=st.data())
def test_a_wrong_field_of_a_diffusers_folder(original, data):
    """An error of one line, or a network of a valid size."""
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
def test_a_wrong_field_of_a_config_of_ddim_jax(tmp_path_factory, data):
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

    def name():
        info = weights.read_info(str(path))
        config_lib.part_of_section(config_lib.SampleConfig, info.sample, "sample")  # raises for a wrong type
        return info.name

    refuses_or(name, lambda name: files.NAME.fullmatch(name) is not None)  # a valid file name


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
def test_a_size_out_of_range(folder, name, field, value):
    """The error comes before an allocation of that size."""
    edited(folder / name, **{field: value} | ({"timestep_spacing": "leading"} if name == NOISE else {}))
    field_of_config = {
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
    refuses_file(lambda: weights.read_info(str(folder)), str(folder), field_of_config)


def test_too_many_channels_of_images(folder):
    edited(folder / UNET, in_channels=10**9, out_channels=10**9)
    refuses_file(lambda: weights.read_info(str(folder)), "image_channels", str(10**9))


def test_the_number_of_betas_is_the_number_of_levels(folder):
    edited(folder / NOISE, trained_betas=[0.01] * 99)
    refuses_file(lambda: weights.read_info(str(folder)), "num_train_timesteps", "99")


@pytest.mark.parametrize("name", [UNET, NOISE, INDEX])
@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 300 + "1" + "}" * 300, "{", "", "\xff", '{"a": ' + "9" * 5000 + "}"])
def test_invalid_json(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    refuses_file(lambda: weights.read_info(str(folder)), name)


@pytest.mark.parametrize("name", [UNET, NOISE, INDEX])
def test_json_of_a_terabyte(folder, name):
    os.truncate(folder / name, 1 << 40)
    refuses_file(lambda: weights.read_info(str(folder)), name, str(1 << 40))


@pytest.mark.parametrize("text", [DEEP, "{", "[]", "5", "null", '{"name": ' + DEEP + "}"])
def test_invalid_json_in_a_file_of_ddim_jax(tmp_path, text):
    metadata = {"format": "ddim_jax", "config": text, "step": "5"}
    mutations.write_old_safetensors(tmp_path / "own.safetensors", {"a": np.ones(1)}, metadata)
    refuses_file(lambda: weights.read_info(str(tmp_path / "own.safetensors")), "own.safetensors")


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8, 7])
def test_a_header_that_is_too_long(tmp_path, size):
    path = tmp_path / "own.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + b'{"a": 1}' * 10)
    refuses_file(lambda: weights.read_info(str(path)), "own.safetensors")


# --- names and escape sequences ---

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
def test_an_invalid_name_in_a_file(params, tmp_path, name):
    mutations.write_smoke(tmp_path / "own.safetensors", params, name=name)
    refuses_file(lambda: weights.read_info(str(tmp_path / "own.safetensors")), "own.safetensors", " name: ")


@pytest.mark.parametrize("name", ["../../x", "/abs", "\x1b[31mred"], ids=repr)
def test_an_invalid_name_in_a_run(params, tmp_path, name):
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        state = TrainState(jnp.int32(0), params, params, {}, jnp.int32(0))
        checkpoints.save(state, smoke_values() | {"name": name})
        checkpoints.wait()
    refuses_file(lambda: weights.read_info(str(tmp_path / "run")), str(tmp_path / "run"), " name: ")


def test_a_command_without_out_writes_nothing_outside(params, tmp_path, monkeypatch):
    mutations.write_smoke(tmp_path / "own.safetensors", params, name="../../outside")
    inner = tmp_path / "a" / "b" / "c"
    inner.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ.get('PYTHONPATH', '')}:{ROOT}")
    shipped = ROOT / "configs" / "default.py"
    given = f"--config.pretrained={tmp_path / 'own.safetensors'}"
    process = run("ddim_jax.sample", "--config", shipped, given, "--config.sample.num_images=1", cwd=inner)
    refused(process, "own.safetensors", " name: ", "../../outside")
    holds(sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "own.safetensors"])


@pytest.mark.parametrize("called", ["my net (1)", "\x1b[31mred", "net\nnet", "--", "né"])
def test_the_name_of_a_folder_becomes_a_valid_name(original, tmp_path, called):
    shutil.copytree(original, tmp_path / called)
    name = weights.read_info(str(tmp_path / called)).name
    holds(name and all(c.isascii() and (c.isalnum() or c in "._-") for c in name) and name[0].isalnum(), name)


ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\n"


def check_escaped(message):
    holds(message is not None and message.isprintable() and "owned" in message, message)


def test_escape_sequences_in_files_are_printed_escaped(folder, tmp_path):
    edited(folder / UNET, **{ESCAPE: 1})
    check_escaped(refuses_or(lambda: weights.read_info(str(folder))))
    edited(folder / UNET, **{ESCAPE: None}, down_block_types=["DownBlock2D", ESCAPE])
    check_escaped(refuses_or(lambda: weights.read_info(str(folder))))
    edited(folder / INDEX, _class_name=ESCAPE)
    check_escaped(refuses_or(lambda: weights.read_info(str(folder))))
    edited(folder / INDEX, **{ESCAPE: ["diffusers", "VQModel"]})
    check_escaped(refuses_or(lambda: weights.read_info(str(folder))))
    safetensors.numpy.save_file({ESCAPE: np.ones(1, np.float32)}, tmp_path / "some.safetensors")
    check_escaped(refuses_or(lambda: weights.read_info(str(tmp_path / "some.safetensors"))))


def test_the_length_of_a_message_is_bounded(folder):
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
    """The tensors of a network, with the names of the official code."""
    values = smoke_values()["model"] | {"channels": 32, "groups": 32}
    params = random_params(config_lib.network(config_lib.section(config_lib.ModelConfig, values, "model")))
    of = lambda path, leaf: np.ascontiguousarray(
        parameter_names.to_torch_layout(path, np.asarray(leaf), parameter_names.OFFICIAL)
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
    "a circular alias": "a: &a [*a]\n" + YAML.replace("ch: 32", "ch: *a"),
    "large": "# " + "x" * 10_000_000 + YAML,
    "an invalid date": YAML.replace("ch: 32", "ch: 2020-99-99"),
    "a long number": YAML.replace("ch: 32", "ch: 0x" + "f" * 10_000),
    "an invalid number": YAML.replace("ch: 32", 'ch: !!int "x"'),
    "binary": YAML.replace("ch: 32", "ch: !!binary x"),
    "a list as a key": YAML + "? [1, 2]\n: 3\n",
    "an escape sequence": YAML.replace("linear", '"\\e[2J"'),
    "a schedule that is a list": YAML.replace("linear", "[1]"),
    "misspelt": YAML.replace("beta_start", "beta_strat"),
    "a huge width": YAML.replace("ch: 32", "ch: 1000000000"),
    "many levels": YAML.replace("num_diffusion_timesteps: 100", "num_diffusion_timesteps: 10000000000"),
    "a huge image": YAML.replace("image_size: 8", "image_size: 1000000000"),
    "nan": YAML.replace("0.0001", ".nan"),
    "bool": YAML.replace("num_res_blocks: 1", "num_res_blocks: true"),
    "code": "a: !!python/object/apply:os.system ['touch executed']\n" + YAML.replace("ch: 32", "ch: -1"),
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_hostile_yaml(official, text, monkeypatch):
    monkeypatch.chdir(official.parent)
    official.with_name("config.yml").write_text(text)
    refuses_file(lambda: weights.read_info(str(official)), str(official.parent))
    holds(not official.with_name("executed").exists())


@settings(max_examples=60)
@given(value=st.sampled_from(WRONG), field=st.sampled_from(sorted(set(re.findall(r"(\w+): ", YAML)))))
def test_a_wrong_field_of_the_official_config(tmp_path_factory, value, field):
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


def test_tensors_without_a_config(official):
    """The tensors do not determine the resolutions with attention."""
    official.with_name("config.yml").unlink()
    refuses_file(lambda: weights.read_info(str(official)), "config.yml")


# --- files of PyTorch ---


def save_torch(path, state):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    torch.save({name: torch.tensor(value) for name, value in state.items()}, path)


@pytest.fixture
def checkpoint(official):
    path = official.with_suffix(".ckpt")
    save_torch(path, safetensors.numpy.load_file(official))
    return path


@pytest.mark.parametrize("place", range(8))
def test_a_bit_of_a_pytorch_file(checkpoint, place):
    """The file holds CRCs."""
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


def test_a_compressed_pytorch_file(checkpoint):
    """Its tensors may have any size."""
    with zipfile.ZipFile(checkpoint) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
        archive.writestr(f"{next(iter(content)).split('/')[0]}/data/bomb", bytes(100_000_000))
    refuses_file(lambda: mutations.load(checkpoint), str(checkpoint))


def test_a_view_larger_than_its_storage(official):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    state = {name: torch.tensor(value) for name, value in safetensors.numpy.load_file(official).items()}
    torch.save(state | {"conv_in.weight": torch.ones(1).expand(32, 1, 3, 3)}, official.with_suffix(".ckpt"))
    refuses_file(lambda: mutations.load(official.with_suffix(".ckpt")), "net.ckpt", "(32, 1, 3, 3)")


@pytest.mark.parametrize("key", [5, None, (1, 2)], ids=repr)
def test_names_of_tensors_that_are_not_strings(official, key):
    torch = pytest.importorskip("torch", reason="files of PyTorch: pip install -e '.[torch]'")
    torch.save({key: torch.ones(1), "conv_in.weight": torch.ones(1)}, official.with_suffix(".ckpt"))
    refuses_file(lambda: weights.read_info(str(official.with_suffix(".ckpt"))), "net.ckpt")


# --- pipes and devices ---

PIPES = [UNET, NOISE, INDEX, WEIGHTS]


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_a_folder(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refuses_file(lambda: mutations.load(folder), str(folder), name)


@pytest.mark.parametrize("name", ["pipe", "pipe.safetensors", "pipe.ckpt"])
def test_a_pipe_or_a_device_instead_of_a_checkpoint(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refuses_file(lambda: weights.read_info(str(tmp_path / name)), str(tmp_path / name))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    refuses_file(lambda: weights.read_info(str(tmp_path / name)), str(tmp_path / name))


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "config/metadata", "record/metadata", "ema_params/_METADATA"])
def test_a_pipe_in_a_run(params, tmp_path, name):
    """The error comes before Orbax reads the file: that could not be interrupted."""
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(0), params, params, {}, jnp.int32(0)), smoke_values())
        checkpoints.wait()
    path = tmp_path / "run" / "checkpoints" / "0" / name
    path.unlink()
    os.mkfifo(path)
    refuses_file(lambda: mutations.load(tmp_path / "run"), str(path))


# --- the hub ---


def in_cache(folder, name, digest):
    """Moves a file of a folder to its place in the cache of huggingface_hub, whose name is the digest of the file."""
    blobs = folder.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    shutil.move(folder / name, blobs / digest)
    (folder / name).symlink_to(blobs / digest)
    return blobs / digest


@pytest.mark.parametrize("name", [UNET, NOISE, INDEX, WEIGHTS])
def test_a_bit_of_a_file_in_the_cache_of_the_hub(folder, name):
    """The digest of a large file is its SHA-256, that of a small file the hash of Git."""
    content = (folder / name).read_bytes()
    of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    blob = in_cache(folder, name, hashlib.sha256(content).hexdigest() if name == WEIGHTS else of_git)
    mutations.load(folder)
    changed = bytearray(content)
    at = content.index(b"0.02") + 3 if name == NOISE else len(content) - 20
    changed[at] ^= 1
    blob.write_bytes(changed)
    refuses_file(lambda: mutations.load(folder), str(folder / name), str(blob), errors=(DamagedError,))


@pytest.mark.parametrize("value", ["0", "1"])
def test_hf_hub_offline(tmp_path, monkeypatch, value):
    """The error names HF_HUB_OFFLINE if it is 1. If it is 0, the hub is called."""
    import huggingface_hub.utils._http as http_of_hub
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value == "1")  # read at import
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # an unused port
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(http_of_hub.time, "sleep", lambda seconds: None)
    message = refuses_file(lambda: weights.read_info("google/ddpm-smoke"), "google/ddpm-smoke", "model_index.json")
    holds(("HF_HUB_OFFLINE" in message) == (value == "1"), message)


def test_the_shipped_weights_are_valid():
    for name in checkpoints.shipped_names():
        holds(weights.read_info(str(checkpoints.shipped(name))).name == name)
