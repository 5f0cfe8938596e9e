"""CheckpointInfo checkpoints without PyTorch: what is read, what is refused, and what the commands do with them."""

import dataclasses
import http.server
import json
import pathlib
import re
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import meshes
from processes import error_line, ok, run
from test_unet import random_params

from configs import default, digits_conditional, smoke
from ddim_jax import checkpoints
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, diffusers_folder, parameter_names
from ddim_jax.config import weights
from ddim_jax.utils.errors import CheckpointError

SMOKE = ("--config", "configs/smoke.py")
DEFAULT = ("--config", "configs/default.py", "--config.sample.steps=4", "--config.sample.num_images=3")


def write(folder, **sample):
    """A diffusers folder of the smoke network, random parameters."""
    values = smoke.get_config().to_dict()
    values["sample"].update(sample)
    config = config_lib.parse(values)
    params = random_params(config_lib.network(config.model))
    values["sample"]["tau"], values["sample"]["clip_x0"] = config.sample.tau, config.sample.clip_x0
    diffusers_export.save(folder, params, values, "a card\n")
    return params


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "ddpm-smoke"
    write(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(original, tmp_path / "ddpm-smoke"))


def load(where):
    published = weights.read_info(str(where))
    return published.read(weights.params_like(published.model, meshes()[0]), True)


def edit(path, **values):
    content = json.loads(path.read_text())
    content = {name: value for name, value in (content | values).items() if value is not ...}
    path.write_text(json.dumps(content))


UNET, NOISE = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


# --- what is read ---


def test_what_was_written_is_read(tmp_path):
    params = write(tmp_path / "it", tau="trailing", clip_x0=True, clip_range=2.0)
    published = weights.read_info(str(tmp_path / "it"))
    expected = config_lib.parse(smoke.get_config().to_dict())
    assert (published.name, published.model, published.schedule) == ("it", expected.model, expected.schedule)
    assert published.sample == {
        "tau": "trailing", "tau_offset": 0, "tau_end": 0, "clip_x0": True, "clip_range": 2.0, "clip_quantile": 0.0
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "it"), params)
    assert (tmp_path / "it" / "README.md").read_text() == "a card\n"


def test_loading_places_parameters_on_every_device(original):
    published = weights.read_info(str(original))
    params = published.read(weights.params_like(published.model, meshes()[1]), True)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("layout", [parameter_names.DIFFUSERS, parameter_names.DIFFUSERS_OLD, parameter_names.OFFICIAL])
def test_every_parameter_has_its_own_name_in_every_layout(layout):
    paths = [
        tuple(key.key for key in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(
            random_params(config_lib.network(config_lib.parse(smoke.get_config().to_dict()).model))
        )[0]
    ]
    called = [layout.name(path, 2) for path in paths]
    assert len(set(called)) == len(paths)
    assert layout.name(("up_0_block_1", "conv_0", "kernel"), 4) in (
        "up_blocks.3.resnets.1.conv1.weight",
        "up.0.block.1.conv1.weight",
    )
    kernel = np.arange(24.0).reshape(1, 2, 3, 4)
    for path, array in [(("a", "conv_0", "kernel"), kernel), (("a", "query", "kernel"), kernel[0, 0])]:
        there = parameter_names.to_theirs(path, array, layout)
        np.testing.assert_array_equal(parameter_names.to_ours(path, there, array.ndim), array)


def test_the_checkpoint_decides_what_the_config_leaves_open(original, folder):
    edit(folder / NOISE, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=True)
    values = default.get_config().to_dict() | {"pretrained": str(folder)}
    config = config_lib.parse(weights.completed(values))
    assert config.name == "ddpm-smoke" and config.model.image_size == 8 and config.schedule.num_steps == 100
    assert (config.sample.tau, config.sample.tau_offset, config.sample.tau_end) == ("leading", 1, 1)
    assert config.sample.clip_x0 and config.model.dropout == 0.1  # the user's, of configs/default.py
    tau = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule)).tau
    assert tau.tolist() == [1, *range(2, 101, 2)]
    values["sample"].update(tau="quadratic", clip_x0=False)
    config = config_lib.parse(weights.completed(values))
    assert (config.sample.tau, config.sample.tau_offset, config.sample.tau_end) == ("quadratic", 0, 0)
    assert not config.sample.clip_x0


# --- what is refused ---


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

DAMAGES = {
    "no index": (without("model_index.json"), r"is a folder without a checkpoint; supported: a diffusers folder"),
    "no unet config": (without(UNET), r"has no unet/config.json or config.json"),
    "no scheduler": (without(NOISE), r"has no scheduler/scheduler_config.json or scheduler_config.json"),
    "no tensors": (without(WEIGHTS), r"has no unet/diffusion_pytorch_model.safetensors or .*\.bin"),
    "missing tensor": (
        tensors(lambda content: content.pop("mid_block.resnets.0.conv1.weight")),
        r"has no mid_block.resnets.0.conv1.weight, which its unet/config.json expects with shape \(16, 16, 3, 3\)",
    ),
    "surplus tensors": (
        tensors(lambda content: content.update({"extra.weight": np.ones(3), "more": np.ones(1)})),
        r"it has (extra.weight|more) \(and 1 more\) with shape \([31],\), which its unet/config.json does not",
    ),
    "wrong shape": (
        tensors(lambda content: content.update({"conv_in.weight": np.ones((8, 3, 3, 3), np.float32)})),
        r"conv_in.weight has shape \(8, 3, 3, 3\), its unet/config.json expects \(8, 1, 3, 3\)",
    ),
    "truncated": (cut(5000), r"diffusion_pytorch_model.safetensors is no complete .safetensors file"),
    "empty": (cut(0), r"is no complete .safetensors file"),
    "not tensors": (text(WEIGHTS, "<html>not found</html>"), r"is no complete .safetensors file"),
    "no json": (text(UNET, "{"), r"unet/config.json is no JSON"),
    "a list": (text(NOISE, "[1]"), r"scheduler_config.json must hold a JSON object, got list"),
    "text to image": (index(**TEXT_TO_IMAGE), r"is a StableDiffusionPipeline whose unet is UNet2DConditionModel; supp"),
    "latent": (index(vqvae=["diffusers", "VQModel"]), r"with vqvae beside its unet; supported: DDPMPipeline, DDIMPipe"),
    "other pipeline": (index(_class_name="ScoreSdeVePipeline"), r"is a ScoreSdeVePipeline; supported: DDPMPipeline"),
    "block type": (
        unet(down_block_types=["DownBlock2D", "SkipDownBlock2D"]),
        r"unet/config.json: down_block_types = 'SkipDownBlock2D' is not supported; supported: DownBlock2D or AttnDownB",
    ),
    "asymmetric": (unet(up_block_types=["UpBlock2D", "AttnUpBlock2D"]), r"up_block_types = .* attention at the sizes"),
    "blocks": (
        unet(down_block_types=["DownBlock2D"]),
        r"down_block_types = .*; supported: one for each of block_out_c",
    ),
    "fourier": (
        unet(time_embedding_type="fourier"),
        r"time_embedding_type = 'fourier' is not supported; .*'positional'",
    ),
    "activation": (unet(act_fn="gelu"), r"act_fn = 'gelu' is not supported; supported: 'silu' or 'swish'"),
    "scale shift": (unet(resnet_time_scale_shift="scale_shift"), r"resnet_time_scale_shift = 'scale_shift'"),
    "widths": (unet(block_out_channels=[8, 12]), r"block_out_channels = \[8, 12\] is not supported; .*multiples"),
    "not square": (unet(sample_size=[8, 16]), r"sample_size = \[8, 16\] is not supported"),
    "no size": (unet(sample_size=None), r"sample_size = None is not supported; supported: the height of square images"),
    "learned variance": (
        unet(out_channels=2),
        r"out_channels = 2 is not supported; supported: in_channels, which is 1",
    ),
    "padding": (unet(downsample_padding=2), r"downsample_padding = 2 is not supported; supported: 0 or 1"),
    "unknown field": (unet(rotary=True), r"rotary = True is not supported"),
    "groups": (unet(norm_num_groups=3), r"cannot be used: config.model: groups 3 does not divide"),
    "type of field": (unet(layers_per_block="2"), r"layers_per_block must be like 2, got '2'"),
    "zero": (unet(norm_eps=0.0), r"cannot be used: model.norm_epsilon: must be above 0, got 0.0"),
    "zero snr": (
        noise(rescale_betas_zero_snr=True),
        r"rescale_betas_zero_snr = True is not supported; supported: False",
    ),
    "schedule": (noise(beta_schedule="laplace"), r"beta_schedule = 'laplace' is not supported; supported: linear, sca"),
    "prediction": (
        noise(prediction_type="flow"),
        r"prediction_type = 'flow' is not supported; supported: epsilon, sam",
    ),
    "spacing": (noise(timestep_spacing="log"), r"timestep_spacing = 'log' is not supported; supported: leading, trail"),
    "other noise": (
        noise(_class_name="FlowMatchEulerDiscreteScheduler"),
        r"_class_name = 'FlowMatchEulerDiscreteScheduler' is not supported; supported: DDIMScheduler, DDPMScheduler",
    ),
    "variance": (noise(variance_type="learned_range"), r"variance_type = 'learned_range' is not supported"),
    "betas": (
        noise(trained_betas=[0.1, 1.5], num_train_timesteps=2),
        r"cannot be used: config.schedule: betas must lie in \(0, 1\)",
    ),
    "type of noise": (noise(clip_sample="yes"), r"clip_sample must be like True, got 'yes'"),
}


@pytest.mark.parametrize("damage, said", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_supported_is_named(folder, damage, said):
    load(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("damage, said", [DAMAGES["text to image"], DAMAGES["truncated"], DAMAGES["zero snr"]])
def test_it_is_one_line_on_the_command_line(folder, tmp_path, damage, said):
    damage(folder)
    for command in (
        ("ddim_jax.sample", *DEFAULT, f"--config.pretrained={folder}", "--out", tmp_path / "out"),
        ("ddim_jax.convert", "--from", folder, "--to", tmp_path / "to"),
    ):
        assert re.search(said, error_line(run(*command)))
    assert not (tmp_path / "to").exists() or not any((tmp_path / "to").iterdir())


def test_other_files_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    safetensors.numpy.save_file({"lora.down": np.ones(2)}, tmp_path / "lora.safetensors")
    for where, said in [
        (tmp_path / "empty", "is a folder without a checkpoint"),
        (tmp_path / "nothing" / "is" / "here", "there is no file or folder"),
        ("./models/google/ddpm", "there is no file or folder ./models/google/ddpm"),
        (tmp_path / "lora.safetensors", "holds tensors named lora.down"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            load(where)


def test_a_config_saved_by_an_earlier_version_is_read():
    """The digits that ship were saved before the fields of `FIELDS_ADDED_LATER` were there."""
    with safetensors.safe_open(checkpoints.shipped("digits"), framework="numpy") as file:
        saved = json.loads(file.metadata()["config"])
    assert "downsample_padding" not in saved["model"] and "pretrained" not in saved
    config = config_lib.parse_saved(saved)
    assert (config.pretrained, config.model.downsample_padding, config.sample.tau_end) == ("", "end", 0)
    now = default.get_config().to_dict()
    for (
        section,
        fields,
    ) in config_lib.FIELDS_ADDED_LATER.items():  # what it was is what it is unless a user asks for another
        assert fields == ({name: now[section][name] for name in fields} if isinstance(fields, dict) else now[section])


# --- the commands ---


@pytest.mark.slow
def test_sampling_it_is_sampling_the_run_that_it_was(original, tmp_path):
    """One folder, one file and one run of the same network: one set of images, and nothing to match by hand."""
    images = []
    for to, *options in [("f.safetensors",), ("run", "--format=orbax"), ("again",)]:
        ok(run("ddim_jax.convert", "--from", original, "--to", tmp_path / to, *options))
    for where in (original, tmp_path / "f.safetensors", tmp_path / "run", tmp_path / "again"):
        out = tmp_path / f"out_{where.name}"
        done = ok(run("ddim_jax.sample", *DEFAULT, f"--config.pretrained={where}", "--out", out))
        assert str(where) in done.stdout
        images.append(np.load(out / "samples.npz")["arr_0"])
        assert images[-1].shape == (3, 8, 8, 1)
    assert all((images[0] == other).all() for other in images)
    said = error_line(run("ddim_jax.convert", "--from", original, "--to", tmp_path / "again"))
    assert "again is there already; give another --to, or --overwrite" in said
    ok(run("ddim_jax.convert", "--from", original, "--to", tmp_path / "again", "--overwrite"))
    said = error_line(run("ddim_jax.convert", "--from", original, "--to", tmp_path / "run", "--format=orbax"))
    assert "a run is never written over" in said


@pytest.mark.parametrize(
    "args, said",
    [
        (("--config.schedule.name=cosine",), "config.schedule.name: with config.pretrained it is the checkpoint's own"),
        (("--config.model.channels=64",), "config.model.channels: with config.pretrained it is the checkpoint's own"),
        (("--config.sample.ema=False",), "holds one set of parameters"),
        (("--workdir", "runs/x"), "and --workdir is 'runs/x': give one of them"),
        (("--config.sample.steps=101",), "must be in 1..100, got 101"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(original, tmp_path, args, said):
    assert said in error_line(
        run("ddim_jax.sample", *DEFAULT, f"--config.pretrained={original}", "--out", tmp_path, *args)
    )


def test_how_it_is_computed_is_the_user_s(original, tmp_path):
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
    """With a learning rate of almost nothing the first checkpoint is where it started."""
    args = ("ddim_jax.train", *SMOKE, "--config.train.learning_rate=1e-12", "--config.train.num_steps=5")
    first = ok(run(*args, f"--config.pretrained={original}", "--workdir", tmp_path / "a"))
    assert f"starts from {original}" in first.stdout
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    jax.tree.map(close, ema_of(tmp_path / "a", 5), load(original))
    longer = (*args[:-1], "--config.train.num_steps=10")
    again = ok(run(*longer, f"--config.pretrained={original}", "--workdir", tmp_path / "a"))
    assert "goes on from step 5" in again.stdout and "starts from" not in again.stdout
    said = error_line(run(*longer, "--workdir", tmp_path / "a"))
    assert "config.pretrained is ''" in said
    ok(run("ddim_jax.convert", "--from", original, "--to", tmp_path / "b", "--format=orbax"))
    converted = ok(run(*args, "--workdir", tmp_path / "b"))
    assert "starts from" in converted.stdout and "step 0" in converted.stdout
    jax.tree.map(np.testing.assert_array_equal, ema_of(tmp_path / "b", 5), ema_of(tmp_path / "a", 5))


# --- the hub ---


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as downloading a file takes. files: {repository: folder}."""

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
    """A hub on this machine that holds google/ddpm-smoke, and an empty cache."""
    Hub.files = {"google/ddpm-smoke": original}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield server
        server.shutdown()


DEFAULT_SAMPLE = ("ddim_jax.sample", *DEFAULT)


def test_a_hub_id_is_fetched_once_and_found_offline(hub, tmp_path, monkeypatch):
    args = ("ddim_jax.sample", *DEFAULT, "--config.pretrained=google/ddpm-smoke")
    done = ok(run(*args, "--out", tmp_path / "online"))
    assert "from google/ddpm-smoke" in done.stdout
    for id_, said in [
        ("google/ddpm-smok", "neither a file or folder here nor a repository on the hub that you may read"),
        ("google/ddpm-smoke@v2", "has no revision 'v2'"),
    ]:
        assert said in error_line(run(*DEFAULT_SAMPLE, f"--config.pretrained={id_}", "--out", tmp_path / "no"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ok(run(*args, "--out", tmp_path / "offline"))
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("online", "offline"))
    assert (a == b).all()
    said = error_line(run(*DEFAULT_SAMPLE, "--config.pretrained=google/ddpm-other", "--out", tmp_path / "no"))
    assert "HF_HUB_OFFLINE is set and the file is not in its cache" in said


def test_no_network_is_told(tmp_path, monkeypatch):
    import huggingface_hub.utils._http as http_of_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(http_of_hub.time, "sleep", lambda seconds: None)  # between its retries
    with pytest.raises(CheckpointError, match="the hub cannot be reached and the file is not in its cache"):
        load("google/ddpm-smoke")


def test_half_precision_is_read_without_pytorch(folder):
    content = safetensors.numpy.load_file(folder / WEIGHTS)
    expected = content["conv_in.weight"].astype(jnp.bfloat16).astype(np.float32)
    safetensors.numpy.save_file({name: array.astype(jnp.bfloat16) for name, array in content.items()}, folder / WEIGHTS)
    np.testing.assert_array_equal(load(folder)["conv_in"]["kernel"], expected.transpose(2, 3, 1, 0))


def test_without_pytorch_its_own_format_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (folder / WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"to read it, pip install 'ddim-jax\[torch\]' \(a .safetensors file"):
        load(folder)


def test_the_class_none_comes_back_from_diffusers():
    """A network for guidance has one class more there, and is told apart from one with so many classes."""
    config = config_lib.parse(digits_conditional.get_config().to_dict())
    model = dataclasses.asdict(config.model)
    told = diffusers_export.unet_config(model)
    assert told["num_class_embeds"] == 11
    fields = diffusers_folder.network_fields(json.loads(json.dumps(told)), "here")
    assert fields == {name: model[name] for name in fields} and fields["label_dropout"] == 0.1
    for wrong in ({"_label_dropout": "much"}, {"num_class_embeds": None}):
        with pytest.raises(CheckpointError, match="_label_dropout = .* is not supported"):
            diffusers_folder.network_fields(told | wrong, "here")
