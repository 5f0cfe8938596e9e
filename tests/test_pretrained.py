"""Checkpoints of other programs, read without PyTorch: their parameters, their errors, and their use in commands."""

import dataclasses
import http.server
import json
import pathlib
import re
import shutil
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import meshes
from messages import missing, raises
from processes import error_line, ok, run
from tiny import random_params, smoke_config, smoke_values

from configs import default, digits_conditional
from ddim_jax import checkpoints
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, diffusers_network, parameter_names
from ddim_jax.config import weights
from ddim_jax.models import network as network_lib
from ddim_jax.utils.errors import CheckpointError

SMOKE = ("--config", "configs/smoke.py")
DEFAULT = ("--config", "configs/default.py", "--config.sample.steps=4", "--config.sample.num_images=3")


def write(folder, **sample):
    """Writes a diffusers folder of the smoke network with random parameters, and returns these."""
    values = smoke_values()
    values["sample"].update(sample)
    params = random_params(config_lib.network(smoke_config().model))
    diffusers_export.save(folder, params, values, "a card\n")
    return params


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "ddpm-smoke"
    write(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test may damage."""
    return pathlib.Path(shutil.copytree(original, tmp_path / "ddpm-smoke"))


def load(where):
    info = weights.read_info(str(where))
    return info.read(weights.params_like(info.model, meshes()[0]), True)


def edit(path, **values):
    content = json.loads(path.read_text())
    content = {name: value for name, value in (content | values).items() if value is not ...}
    path.write_text(json.dumps(content))


UNET, NOISE = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


# --- reading ---


def test_a_written_folder_is_read(tmp_path):
    params = write(tmp_path / "it", tau="trailing", clip_x0=True, clip_range=2.0)
    info, expected = weights.read_info(str(tmp_path / "it")), smoke_config()
    assert (info.name, info.model, info.schedule) == ("it", expected.model, expected.schedule)
    assert info.sample == {
        "tau": "trailing", "tau_offset": 0, "tau_end": 0, "clip_x0": True, "clip_range": 2.0, "clip_quantile": 0.0
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "it"), params)
    assert (tmp_path / "it" / "README.md").read_text() == "a card\n"


def test_loading_places_parameters_on_every_device(original):
    info = weights.read_info(str(original))
    params = info.read(weights.params_like(info.model, meshes()[1]), True)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("layout", [parameter_names.DIFFUSERS, parameter_names.DIFFUSERS_OLD, parameter_names.OFFICIAL])
def test_every_parameter_has_its_own_name_in_every_layout(layout):
    shapes = network_lib.param_shapes(config_lib.network(smoke_config().model))
    paths = [tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(shapes)]
    names = [layout.name(path, 2) for path in paths]
    assert len(set(names)) == len(paths)
    assert layout.name(("up_0_block_1", "conv_0", "kernel"), 4) in (
        "up_blocks.3.resnets.1.conv1.weight",
        "up.0.block.1.conv1.weight",
    )
    kernel = np.arange(24.0).reshape(1, 2, 3, 4)
    for path, array in [(("a", "conv_0", "kernel"), kernel), (("a", "query", "kernel"), kernel[0, 0])]:
        converted = parameter_names.to_torch_layout(path, array, layout)
        np.testing.assert_array_equal(parameter_names.from_torch_layout(path, converted, array.ndim), array)


def test_the_checkpoint_sets_the_open_fields_of_the_config(original, folder):
    edit(folder / NOISE, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=True)
    values = default.get_config().to_dict() | {"pretrained": str(folder)}
    config = config_lib.parse(weights.completed(values))
    assert config.name == "ddpm-smoke" and config.model.image_size == 8 and config.schedule.num_steps == 100
    assert (config.sample.tau, config.sample.tau_offset, config.sample.tau_end) == ("leading", 1, 1)
    assert config.sample.clip_x0 and config.model.dropout == 0.1  # of configs/default.py, not of the checkpoint
    tau = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule)).tau
    assert tau.tolist() == [1, *range(2, 101, 2)]
    values["sample"].update(tau="quadratic", clip_x0=False)
    config = config_lib.parse(weights.completed(values))
    assert (config.sample.tau, config.sample.tau_offset, config.sample.tau_end) == ("quadratic", 0, 0)
    assert not config.sample.clip_x0


# --- errors ---


def tensors(change):
    def damage(folder):
        content = safetensors.numpy.load_file(folder / WEIGHTS)
        change(content)
        safetensors.numpy.save_file(content, folder / WEIGHTS)

    return damage


def cut(size):
    def damage(folder):
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])

    return damage


def unet(**values):
    return lambda folder: edit(folder / UNET, **values)


def noise(**values):
    return lambda folder: edit(folder / NOISE, **values)


def index(**values):
    return lambda folder: edit(folder / "model_index.json", **values)


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


TEXT_TO_IMAGE = dict(
    _class_name="StableDiffusionPipeline",
    unet=["diffusers", "UNet2DConditionModel"],
    vae=["diffusers", "AutoencoderKL"],
    text_encoder=["transformers", "CLIPTextModel"],
)

INDEX = "model_index.json"
# name -> (the damage, names in the message)
DAMAGES = {
    "no index": (without(INDEX), ("ddpm-smoke",)),
    "no unet config": (without(UNET), ("unet/config.json", "config.json")),
    "no scheduler": (without(NOISE), (NOISE, "scheduler_config.json")),
    "no tensors": (without(WEIGHTS), (WEIGHTS, "unet/diffusion_pytorch_model.bin")),
    "missing tensor": (
        tensors(lambda content: content.pop("mid_block.resnets.0.conv1.weight")),
        ("mid_block.resnets.0.conv1.weight", UNET, "(16, 16, 3, 3)"),
    ),
    "surplus tensors": (
        tensors(lambda content: content.update({"extra.weight": np.ones(3), "more": np.ones(1)})),
        ("1 more", UNET),
    ),
    "wrong shape": (
        tensors(lambda content: content.update({"conv_in.weight": np.ones((8, 3, 3, 3), np.float32)})),
        ("conv_in.weight", "(8, 3, 3, 3)", UNET, "(8, 1, 3, 3)"),
    ),
    "truncated": (cut(5000), (WEIGHTS,)),
    "empty": (cut(0), (WEIGHTS,)),
    "not tensors": (text(WEIGHTS, "<html>not found</html>"), (WEIGHTS,)),
    "no json": (text(UNET, "{"), (UNET, "JSON")),
    "a list": (text(NOISE, "[1]"), (NOISE, "JSON", "list")),
    "text to image": (index(**TEXT_TO_IMAGE), ("StableDiffusionPipeline", "UNet2DConditionModel")),
    "latent": (index(vqvae=["diffusers", "VQModel"]), ("vqvae", "DDPMPipeline", "DDIMPipeline")),
    "other pipeline": (index(_class_name="ScoreSdeVePipeline"), ("ScoreSdeVePipeline", "DDPMPipeline")),
    "block type": (
        unet(down_block_types=["DownBlock2D", "SkipDownBlock2D"]),
        (UNET, "down_block_types", "'SkipDownBlock2D'", "AttnDownBlock2D"),
    ),
    "blocks": (unet(down_block_types=["DownBlock2D"]), (UNET, "down_block_types", "block_out_channels")),
    "fourier": (unet(time_embedding_type="fourier"), (UNET, "time_embedding_type", "'fourier'", "'positional'")),
    "activation": (unet(act_fn="gelu"), (UNET, "act_fn", "'gelu'", "'silu'", "'swish'")),
    "scale shift": (unet(resnet_time_scale_shift="spatial"), (UNET, "resnet_time_scale_shift", "'spatial'")),
    "widths": (unet(block_out_channels=[8, 0]), (UNET, "block_out_channels", "[8, 0]")),
    "not square": (unet(sample_size=[8, 16]), (UNET, "sample_size", "[8, 16]")),
    "no size": (unet(sample_size=None), ("sample_size", "image_size")),
    "channels": (unet(out_channels=3), (UNET, "out_channels", "3", "in_channels", "1")),
    "padding": (unet(downsample_padding=2), (UNET, "downsample_padding", "2", "0", "1")),
    "unknown field": (unet(rotary=True), (UNET, "rotary")),
    "groups": (unet(norm_num_groups=3), ("ddpm-smoke", "config.model", "groups", "3")),
    "type of field": (unet(layers_per_block="2"), (UNET, "layers_per_block", "'2'")),
    "zero": (unet(norm_eps=0.0), ("ddpm-smoke", "model.norm_epsilon", "got 0.0")),
    "zero snr": (
        noise(rescale_betas_zero_snr=True),
        ("scheduler_config.json", "rescale_betas_zero_snr", "True", "False"),
    ),
    "schedule": (
        noise(beta_schedule="jsd"),
        ("scheduler_config.json", "beta_schedule", "'jsd'", "linear", "scaled_linear", "laplace"),
    ),
    "prediction": (
        noise(prediction_type="flow"),
        ("scheduler_config.json", "prediction_type", "'flow'", "epsilon", "sample"),
    ),
    "spacing": (
        noise(timestep_spacing="log"),
        ("scheduler_config.json", "timestep_spacing", "'log'", "leading", "trailing"),
    ),
    "other noise": (
        noise(_class_name="FlowMatchEulerDiscreteScheduler"),
        ("scheduler_config.json", "_class_name", "'FlowMatchEulerDiscreteScheduler'", "DDIMScheduler", "DDPMScheduler"),
    ),
    "variance": (noise(variance_type="learned_range"), ("variance_type", "'learned_range'", "out_channels")),
    "edm": (noise(_class_name="EDMEulerScheduler"), ("_class_name", "'EDMEulerScheduler'", "EDM")),
    "betas": (noise(trained_betas=[0.1, 1.5], num_train_timesteps=2), ("ddpm-smoke", "config.schedule", "1.5")),
    "type of noise": (noise(clip_sample="yes"), ("scheduler_config.json", "clip_sample", "'yes'")),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES)
def test_an_unsupported_setting_is_named(folder, damage, words):
    load(folder)
    damage(folder)
    with raises(CheckpointError, *words) as caught:
        load(folder)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("damage, words", [DAMAGES["text to image"], DAMAGES["truncated"], DAMAGES["zero snr"]])
def test_the_error_is_one_line_of_a_command(folder, tmp_path, damage, words):
    damage(folder)
    for command in (
        ("ddim_jax.sample", *DEFAULT, f"--config.pretrained={folder}", "--out", tmp_path / "out"),
        ("ddim_jax.convert", "--from", folder, "--to", tmp_path / "to"),
    ):
        error_line(run(*command), *words)
    assert not (tmp_path / "to").exists() or not any((tmp_path / "to").iterdir())


def test_other_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    safetensors.numpy.save_file({"lora.down": np.ones(2)}, tmp_path / "lora.safetensors")
    for where, words in [
        (tmp_path / "empty", ()),
        (tmp_path / "nothing" / "is" / "here", ()),
        ("./models/google/ddpm", ()),
        (tmp_path / "lora.safetensors", ("lora.down",)),
    ]:
        with raises(CheckpointError, str(where), *words):
            load(where)


def test_a_config_saved_by_an_earlier_version_is_read():
    """The shipped digits were saved before the fields of `FIELDS_ADDED_LATER` were added."""
    with safetensors.safe_open(checkpoints.shipped("digits"), framework="numpy") as file:
        saved = json.loads(file.metadata()["config"])
    assert "downsample_padding" not in saved["model"] and "pretrained" not in saved
    config = config_lib.parse_saved(saved)
    assert (config.pretrained, config.model.downsample_padding, config.sample.tau_end) == ("", "end", 0)
    # The values for old configs are the defaults of new ones.
    current = default.get_config().to_dict()
    for section, fields in config_lib.FIELDS_ADDED_LATER.items():
        defaults = current[section]
        assert fields == ({name: defaults[name] for name in fields} if isinstance(fields, dict) else defaults)


# --- the commands ---


@pytest.mark.slow
def test_all_formats_of_a_network_draw_the_same_images(original, tmp_path):
    """A folder, a file and a run, without further options."""
    images = []
    for to, *options in [("f.safetensors",), ("run", "--format=orbax"), ("copy",)]:
        ok(run("ddim_jax.convert", "--from", original, "--to", tmp_path / to, *options))
    for where in (original, tmp_path / "f.safetensors", tmp_path / "run", tmp_path / "copy"):
        out = tmp_path / f"out_{where.name}"
        done = ok(run("ddim_jax.sample", *DEFAULT, f"--config.pretrained={where}", "--out", out))
        assert str(where) in done.stdout
        images.append(np.load(out / "samples.npz")["arr_0"])
        assert images[-1].shape == (3, 8, 8, 1)
    assert all((images[0] == other).all() for other in images)
    copy = ("ddim_jax.convert", "--from", original, "--to", tmp_path / "copy")
    error_line(run(*copy), "--to", str(tmp_path / "copy"), "--overwrite")
    ok(run(*copy, "--overwrite"))
    to_run = ("ddim_jax.convert", "--from", original, "--to", tmp_path / "run", "--format=orbax", "--overwrite")
    error_line(run(*to_run), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "args, words",
    [
        (("--config.schedule.name=cosine",), ("config.schedule.name", "config.pretrained")),
        (("--config.model.channels=64",), ("config.model.channels", "config.pretrained")),
        (("--config.sample.ema=False",), ("config.sample.ema", "ddpm-smoke")),
        (("--workdir", "runs/x"), ("config.pretrained", "--workdir", "'runs/x'")),
        (("--config.sample.steps=101",), ("config.sample.steps", "1..100", "got 101")),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused(original, tmp_path, args, words):
    process = run("ddim_jax.sample", *DEFAULT, f"--config.pretrained={original}", "--out", tmp_path, *args)
    error_line(process, *words)


def test_the_dtype_can_be_changed(original, tmp_path):
    args = ("--config.model.dtype=bfloat16", "--out", tmp_path)
    ok(run("ddim_jax.sample", *DEFAULT, f"--config.pretrained={original}", *args))


def ema_of(workdir, step):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(
        pathlib.Path(workdir).absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        return manager.restore(step, args=ocp.args.Composite(ema_params=ocp.args.StandardRestore()))["ema_params"]


@pytest.mark.slow
def test_training_starts_from_it_and_resumes(original, tmp_path):
    """With a learning rate near 0 the first checkpoint has the initial parameters."""
    args = ("ddim_jax.train", *SMOKE, "--config.train.learning_rate=1e-12", "--config.train.num_steps=5")
    first = ok(run(*args, f"--config.pretrained={original}", "--workdir", tmp_path / "a"))
    assert f"from {original}" in first.stdout
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, ema_of(tmp_path / "a", 5), load(original))
    longer = (*args[:-1], "--config.train.num_steps=10")
    resumed = ok(run(*longer, f"--config.pretrained={original}", "--workdir", tmp_path / "a"))
    assert f"from step 5 of {tmp_path / 'a'}" in resumed.stdout and f"from {original}" not in resumed.stdout
    error_line(run(*longer, "--workdir", tmp_path / "a"), "config.pretrained", "''", repr(str(original)))
    ok(run("ddim_jax.convert", "--from", original, "--to", tmp_path / "b", "--format=orbax"))
    converted = ok(run(*args, "--workdir", tmp_path / "b"))
    assert not missing(converted.stdout, "step 0")
    jax.tree.map(np.testing.assert_array_equal, ema_of(tmp_path / "b", 5), ema_of(tmp_path / "a", 5))


# --- the hub ---


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of the hub that a download needs. files: {repository: folder}."""

    files = {}

    def do_HEAD(self):
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path)
        folder = self.files.get(match[1]) if match else None
        path = folder / match[3] if folder else None
        code, error = (
            (404, "RepoNotFound") if not folder else (404, "EntryNotFound") if not path.is_file() else (200, "")
        )
        if code == 200 and match[2] not in ("main", "c" * 40):
            code, error = 404, "RevisionNotFound"
        self.content = path.read_bytes() if code == 200 else b""
        self.send_response(code)
        for name, value in {
            "X-Repo-Commit": "c" * 40, "ETag": f'"{abs(hash(self.path))}"', "X-Error-Code": error,
            "Content-Length": len(self.content),
        }.items():  # fmt: skip
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(original, tmp_path, monkeypatch):
    """A local hub with google/ddpm-smoke, and an empty cache."""
    Hub.files = {"google/ddpm-smoke": original}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
        server.shutdown()


DEFAULT_SAMPLE = ("ddim_jax.sample", *DEFAULT)


def test_a_hub_id_is_downloaded_once_and_found_offline(hub, tmp_path, monkeypatch):
    args = ("ddim_jax.sample", *DEFAULT, "--config.pretrained=google/ddpm-smoke")
    done = ok(run(*args, "--out", tmp_path / "online"))
    assert "from google/ddpm-smoke" in done.stdout
    for id_, words in [("google/ddpm-smok", ("google/ddpm-smok",)), ("google/ddpm-smoke@v2", ("'v2'",))]:
        process = run(*DEFAULT_SAMPLE, f"--config.pretrained={id_}", "--out", tmp_path / "no")
        error_line(process, "hub", *words)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ok(run(*args, "--out", tmp_path / "offline"))
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("online", "offline"))
    assert (a == b).all()
    process = run(*DEFAULT_SAMPLE, "--config.pretrained=google/ddpm-other", "--out", tmp_path / "no")
    error_line(process, "google/ddpm-other", "HF_HUB_OFFLINE")


def test_an_unreachable_hub_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between its retries
    with raises(CheckpointError, "google/ddpm-smoke", "hub"):
        load("google/ddpm-smoke")


def test_half_precision_is_read_without_pytorch(folder):
    content = safetensors.numpy.load_file(folder / WEIGHTS)
    expected = content["conv_in.weight"].astype(jnp.bfloat16).astype(np.float32)
    safetensors.numpy.save_file({name: array.astype(jnp.bfloat16) for name, array in content.items()}, folder / WEIGHTS)
    np.testing.assert_array_equal(load(folder)["conv_in"]["kernel"], expected.transpose(2, 3, 1, 0))


def test_a_bin_file_is_read_without_pytorch(folder, monkeypatch):
    """A file that is no archive of torch.save is refused in one line; nothing imports torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with raises(CheckpointError, "unet/diffusion_pytorch_model.bin"):
        load(folder)


def test_the_class_none_is_kept_by_diffusers():
    """A network for guidance has one more class in diffusers. It is not read as a network with so many classes."""
    config = config_lib.parse(digits_conditional.get_config().to_dict())
    model = dataclasses.asdict(config.model)
    exported = diffusers_export.unet_config(model)
    assert exported["num_class_embeds"] == 11
    fields = diffusers_network.network_fields(json.loads(json.dumps(exported)), "here")
    assert fields == {name: model[name] for name in fields} and fields["label_dropout"] == 0.1
    for wrong in ({"_label_dropout": "much"}, {"num_class_embeds": None}):
        with raises(CheckpointError, "here", "_label_dropout"):
            diffusers_network.network_fields(exported | wrong, "here")
