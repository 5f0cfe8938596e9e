"""Damaged and non-finite weights: a file that ddim_jax writes, a shipped file, and every part of a run."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import mutations
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.numpy
from attacking import holds, refused, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damage_is_seen, damaged, refuses_or, same_network
from processes import run
from tiny import random_params, smoke_values

from configs import smoke
from ddim_jax import checkpoints
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.evaluation import classifier, digits_classifier
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils.errors import CheckpointError, DamagedError

NETWORK = config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model)


@pytest.fixture(scope="module")
def params():
    return random_params(NETWORK)


def with_value(params, module, leaf, value):
    """The parameters with another value at index 0 of one leaf."""
    return params | {module: params[module] | {leaf: params[module][leaf].at[0].set(value)}}


# --- a file ---


@pytest.fixture(scope="module")
def file(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "smoke.safetensors"
    mutations.write_smoke(path, params)
    return path


@pytest.fixture(scope="module")
def expected(file):
    return mutations.load(file)


@settings(max_examples=100)
@given(data=st.data())
def test_a_damaged_file(file, expected, data):
    changed = file.with_name("changed.safetensors")
    changed.write_bytes(data.draw(damaged(file.read_bytes())))
    refuses_or(lambda: mutations.load(changed), lambda read: same_network(read, expected))


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_header(file, expected, data):
    """Names, types, shapes, the config and the step."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    changed = file.with_name("changed.safetensors")
    changed.write_bytes(content[:8] + data.draw(damaged(content[8:end])) + content[end:])
    refuses_or(lambda: mutations.load(changed), lambda read: same_network(read, expected))


@pytest.mark.parametrize("part", ["config", "step", "format", "tensors"])
def test_a_mixture_of_two_files(file, params, tmp_path, part):
    """Both files are of the same network. The other one has another step and schedule."""
    values = smoke_values()
    other = tmp_path / "other.safetensors"
    checkpoints.save(other, params, values | {"schedule": values["schedule"] | {"beta_end": 0.03}}, 6)
    with safetensors.safe_open(other, framework="numpy") as of_other, safetensors.safe_open(file, "numpy") as of_file:
        metadata, others = of_file.metadata(), of_other.metadata()
    metadata = metadata | ({part: others[part]} if part in ("config", "step") else {"format": "other"})
    arrays = safetensors.numpy.load_file(file)
    if part == "tensors":
        arrays["conv_in/kernel"] = arrays["conv_in/kernel"] * 2
    mutations.write_old_safetensors(tmp_path / "mixed.safetensors", arrays, metadata)
    refuses(lambda: mutations.load(tmp_path / "mixed.safetensors"), "mixed.safetensors", errors=(CheckpointError,))


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("name", ["digits", "digits_conditional"])
def test_a_flipped_bit_of_a_shipped_file(name, place, tmp_path):
    shipped = checkpoints.shipped(name)
    content = bytearray(shipped.read_bytes())
    content[len(content) * (2 * place + 1) // 16] ^= 1 << place
    (tmp_path / shipped.name).write_bytes(content)
    damage_is_seen(lambda: mutations.load(tmp_path / shipped.name))


@pytest.mark.parametrize("place", range(8))
def test_a_flipped_bit_of_the_shipped_classifier(place, tmp_path):
    content = bytearray(digits_classifier.SHIPPED.read_bytes())
    content[len(content) * (2 * place + 1) // 16] ^= 1 << place
    (tmp_path / "classifier.safetensors").write_bytes(content)
    read = lambda: classifier.read(tmp_path / "classifier.safetensors", digits_classifier.Classifier(), (8, 8, 1), "it")
    refuses(read, "classifier.safetensors", errors=(DamagedError,))


def test_a_flipped_bit_is_an_error_of_one_line(tmp_path):
    content = bytearray(checkpoints.shipped("digits").read_bytes())
    content[2_000_000] ^= 16
    (tmp_path / "digits.safetensors").write_bytes(content)
    given = f"--config.pretrained={tmp_path / 'digits.safetensors'}"
    process = run("ddim_jax.sample", "--config", "configs/default.py", given, "--out", tmp_path / "out")
    refused(process, str(tmp_path / "digits.safetensors"), "up_1_block_0/conv_0/kernel")


def test_a_file_without_checksums(params, file, tmp_path):
    flat = {"/".join(path): leaf for path, leaf in mutations.flat(params).items()}
    metadata = {"format": "ddim_jax", "config": json.dumps(smoke_values()), "step": "5"}
    mutations.write_old_safetensors(tmp_path / "smoke.safetensors", flat, metadata)
    holds(same_network(mutations.load(tmp_path / "smoke.safetensors"), mutations.load(file)))


# --- values that are not finite, and dtypes that are not floats ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_parameters(params, tmp_path, value):
    """In each format the error names the parameter."""
    bad = with_value(params, "norm_out", "bias", value)
    mutations.write_smoke(tmp_path / "smoke.safetensors", bad)
    diffusers_export.save(tmp_path / "folder", bad, smoke_values(), "a card\n")
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(0), params, bad, {}, jnp.int32(0)), smoke_values())
        checkpoints.wait()
    for name, leaf in [
        ("smoke.safetensors", "norm_out/bias"),
        ("folder", "conv_norm_out.bias"),
        ("run", "ema_params/norm_out/bias"),
    ]:
        path = tmp_path / name
        refuses(lambda path=path: mutations.load(path), str(path), leaf, errors=(CheckpointError,))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.int64])
def test_tensors_of_another_dtype(params, tmp_path, dtype):
    """The shapes are right."""
    diffusers_export.save(tmp_path / "folder", params, smoke_values(), "a card\n")
    path = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["conv_in.bias"] = np.ones(tensors["conv_in.bias"].shape, dtype)
    safetensors.numpy.save_file(tensors, path)
    words = (str(path), "conv_in.bias", np.dtype(dtype).name)
    refuses(lambda: mutations.load(tmp_path / "folder"), *words, errors=(CheckpointError,))


def test_float64_beyond_float32(params, tmp_path):
    diffusers_export.save(tmp_path / "folder", params, smoke_values(), "a card\n")
    path = tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["conv_in.bias"] = np.full(tensors["conv_in.bias"].shape, 1e300)
    safetensors.numpy.save_file(tensors, path)
    refuses(lambda: mutations.load(tmp_path / "folder"), str(path), "conv_in.bias", errors=(CheckpointError,))


# --- a run ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory, params):
    """A run with the steps 5 and 10."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpoints(workdir, keep=5) as checkpoints:
        for step in (5, 10):
            ema = with_value(params, "norm_out", "bias", float(step))
            state = TrainState(jnp.int32(step), params, ema, {}, jnp.int32(0))
            checkpoints.save(state, smoke_values() | {"name": f"step{step}"}, "the data")
            checkpoints.wait()
    return workdir


@pytest.fixture
def workdir(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def read_json_items(workdir, step=10):
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.config(step), checkpoints.data(step)


@settings(max_examples=60)
@given(data=st.data(), item=st.sampled_from(["config", "record"]))
def test_a_damaged_json_item(whole, data, item):
    expected = read_json_items(whole)
    path = whole / "checkpoints" / "10" / item / "metadata"
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(content)))
        refuses_or(lambda: read_json_items(whole), lambda value: value == expected)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("item", ["config", "record"])
@pytest.mark.parametrize("digit", [3, 4, 5, 6, 7, 8])
def test_another_digit_in_a_json_item(workdir, item, digit):
    """A DamagedError, so that --skip_damaged has an effect."""
    path = workdir / "checkpoints" / "10" / item / "metadata"
    text = path.read_text()
    at = [i for i, character in enumerate(text) if character.isdigit()][digit * 5]
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    damage_is_seen(lambda: mutations.load(workdir))


@pytest.mark.parametrize("item", ["config", "record", "params", "ema_params"])
def test_an_item_of_another_step(workdir, item):
    steps = workdir / "checkpoints"
    shutil.rmtree(steps / "10" / item)
    shutil.copytree(steps / "5" / item, steps / "10" / item)

    def everything():
        with Checkpoints(workdir) as checkpoints:
            config = checkpoints.config(10)
        _, ema = mutations.load(workdir)
        return config["name"] == "step10" and float(ema["norm_out"]["bias"][0]) == 10

    refuses_or(everything, bool)


@pytest.mark.parametrize("item", ["config", "record", "ema_params"])
def test_a_missing_item(workdir, item):
    shutil.rmtree(workdir / "checkpoints" / "10" / item)
    refuses(lambda: mutations.load(workdir), str(workdir / "checkpoints" / "10"), item, errors=(CheckpointError,))


@pytest.mark.parametrize("name", ["30", "7", "4294967306", "99999999999999999999999"])
@pytest.mark.parametrize("how", [shutil.copytree, pathlib.Path.rename], ids=["copied", "renamed"])
def test_a_step_under_another_number(workdir, name, how):
    """Also 2^32 + 10, which is 10 in 32 bits."""
    steps = workdir / "checkpoints"
    how(steps / "10", steps / name)

    def step_inside():
        with Checkpoints(workdir) as checkpoints:
            return int(name), checkpoints.config(int(name))

    damage_is_seen(step_inside)


@pytest.mark.slow
def test_a_copied_step_does_not_resume(workdir):
    """The error names --skip_damaged."""
    steps = workdir / "checkpoints"
    shutil.copytree(steps / "10", steps / "20")
    refused(
        run("ddim_jax.train", "--config", "configs/smoke.py", "--workdir", workdir), str(steps / "20"), "--skip_damaged"
    )


def remove_digests(step):
    record = step / "record" / "metadata"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({name: content[name] for name in ("checksums", "data")}))


def remove_record(step):
    shutil.rmtree(step / "record")
    path = step / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    del content["item_handlers"]["record"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("as_earlier_version", [remove_digests, remove_record])
def test_a_checkpoint_of_an_earlier_version(workdir, whole, as_earlier_version):
    as_earlier_version(workdir / "checkpoints" / "10")
    holds(same_network(mutations.load(workdir), mutations.load(whole)))


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_any_damaged_file_of_a_step(whole, data):
    """An error, or the values that were saved."""
    expected = mutations.load(whole)
    step = whole / "checkpoints" / "10"
    names = sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    path = step / data.draw(st.sampled_from([name for name in names if not name.startswith(("params", "optimizer"))]))
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged(content)))
        refuses_or(lambda: mutations.load(whole), lambda read: same_network(read, expected))
    finally:
        path.write_bytes(content)


def test_orbax_reads_the_same_steps(whole):
    with ocp.CheckpointManager(whole / "checkpoints", options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        holds(sorted(manager.all_steps()) == [5, 10])
