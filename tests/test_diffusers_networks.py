"""Folders of diffusers that hold other networks than DDPM's: each setting of `UNet2DModel` that is read, beside
diffusers' own class with the same weights, in both directions; and the layouts of weight files.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")

from messages import raises  # noqa: E402
from test_parity import (  # noqa: E402
    config_of,
    difference,
    from_torch,
    inputs,
    publish,
    randomise,
    read,
    to_torch,
    torch_labels,
)
from tiny import random_params  # noqa: E402

from ddim_jax import config as config_lib  # noqa: E402
from ddim_jax import samplers, sampling, schedule, trajectory  # noqa: E402
from ddim_jax.checkpoints import diffusers_export, model_card  # noqa: E402
from ddim_jax.checkpoints.diffusers_network import FIXED, NETWORK, network_fields  # noqa: E402
from ddim_jax.config import weights  # noqa: E402
from ddim_jax.models.unet import UNet, sinusoid  # noqa: E402
from ddim_jax.utils.errors import CheckpointError  # noqa: E402

torch.set_num_threads(1)

DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
SMALL = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4)
SMALL |= dict(down_block_types=DOWN, up_block_types=UP)
RESNET = dict(
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
BOTH = dict(downsample_type="resnet", upsample_type="resnet")
VARIANTS = {
    "scale_shift": dict(SMALL, resnet_time_scale_shift="scale_shift"),
    "scale_shift, norm in the middle": dict(SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8),
    "other groups in the middle": dict(SMALL, attn_norm_num_groups=8, attention_head_dim=16),
    "residual blocks resample": dict(SMALL, **RESNET, **BOTH),
    "attention at full size": dict(
        SMALL, down_block_types=DOWN[::-1], up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"), **BOTH
    )
    | dict(attention_head_dim=None),
    "ADM": dict(
        SMALL, **RESNET, **BOTH, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, num_class_embeds=7
    )
    | dict(out_channels=6),
    "learned variance": dict(SMALL, in_channels=1, out_channels=2),
    "no size": dict(SMALL, sample_size=None),
    "widths": dict(SMALL, block_out_channels=(16, 24), norm_num_groups=8),
    "narrower below": dict(SMALL, block_out_channels=(24, 16, 40), norm_num_groups=8)
    | dict(down_block_types=("DownBlock2D", *DOWN), up_block_types=(*UP, "UpBlock2D")),
    "attention in the encoder": dict(SMALL, up_block_types=("UpBlock2D", "UpBlock2D")),
    "attention in the decoder": dict(SMALL, down_block_types=("DownBlock2D", "DownBlock2D")),
    "padding, dropout, one head": dict(SMALL, downsample_padding=0, dropout=0.3, attention_head_dim=None)
    | dict(freq_shift=1, flip_sin_to_cos=False, norm_eps=1e-6),
    "one block": dict(SMALL, block_out_channels=(16,), down_block_types=("AttnDownBlock2D",), sample_size=4)
    | dict(up_block_types=("UpBlock2D",)),
}  # fmt: skip


def opened(where):
    """(Checkpoint, Linen module, params); 8x8 images if the folder does not tell their size."""
    found = weights.read_info(where, 8)
    like = weights.params_like(found.model, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    return found, config_lib.network(found.model).module, found.read(like, True)


def published(name, folder):
    """(diffusers' network with random weights, its folder, `opened` of the folder)."""
    net = randomise(diffusers.UNet2DModel(**VARIANTS[name]))
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range" if net.config.out_channels != net.config.in_channels else "fixed_small"
    )
    where = publish(folder / "net", net, scheduler)
    return net, where, opened(where)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    return published(request.param, tmp_path_factory.mktemp("published"))


QUICK = ("ADM", "other groups in the middle", "attention in the decoder")  # the other ones are slow tests


@pytest.fixture(
    scope="module", params=[pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in VARIANTS]
)
def thorough(request, tmp_path_factory):
    return published(request.param, tmp_path_factory.mktemp("published"))


def by_diffusers(net, x, time, labels=None):
    with torch.no_grad():
        return from_torch(net(to_torch(x), torch.tensor(time), **torch_labels(labels)).sample)


# --- the network ---


def test_outputs(variant):
    """In float32, of a learned variance both halves."""
    net, _, (found, module, params) = variant
    x, labels = inputs(found, 3)
    time = [0, 1, 20]
    expected = by_diffusers(net, x, time, labels)
    assert expected.shape[-1] == net.config.out_channels
    assert difference(jax.jit(module.apply)({"params": params}, x, jnp.asarray(time), labels), expected) < 5e-6


def test_outputs_in_float64(thorough, x64):
    """With the sinusoids of `sinusoid`: diffusers computes them in float32."""
    net, _, (found, module, params) = thorough
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), params)
    x, labels = inputs(found, 2, np.float64)
    model = found.model

    class Sinusoid(torch.nn.Module):
        def forward(self, time):
            fields = (model.channels, model.frequency_shift, model.cos_first)
            return torch.tensor(np.asarray(sinusoid(jnp.asarray(time.numpy(), jnp.float64), *fields)))

    original = net.time_proj
    try:
        net.double().time_proj = Sinusoid()
        expected = by_diffusers(net, x, [999.0, 500.0], labels)
    finally:
        net.float().time_proj = original
    apply = jax.jit(module.clone(dtype=jnp.float64).apply)
    output = apply({"params": params}, x, jnp.asarray([999.0, 500.0]), labels)
    assert expected.dtype == np.float64 and difference(output, expected) < 1e-10


def test_gradients(thorough):
    """Of a sum of squares, with respect to x."""
    net, _, (found, module, params) = thorough
    x, labels = inputs(found, 2)
    variable = to_torch(x).requires_grad_()
    net(variable, torch.tensor([3, 300]), **torch_labels(labels)).sample.square().sum().backward()
    loss = lambda x: jnp.square(module.apply({"params": params}, x, jnp.asarray([3, 300]), labels)).sum()
    assert difference(jax.jit(jax.grad(loss))(x), from_torch(variable.grad)) < 1e-4


def test_twenty_steps_of_ddim(thorough):
    """Eq. (12) around diffusers' network, with the first half of its output as eps, beside the pipeline."""
    net, where, (found, _, params) = thorough
    values = config_of(where)
    values["model"]["image_size"] = 8
    values["sample"] |= {"steps": 20, "tau": "uniform", "clip_x0": False}
    config = config_lib.parse(weights.completed(values))
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    x, labels = inputs(found, 2)
    model = sampling.conditioned(config_lib.pipeline(config, params, None), labels)
    drawn = samplers.integrate(process.sampler, model, process.transitions, x)

    alpha_bar = np.asarray(schedule.linear().alpha_bar)
    tau, channels = trajectory.uniform(1000, 20), x.shape[-1]
    x_t = x.astype(np.float64)
    for t, s in zip(tau[:0:-1], tau[-2::-1], strict=True):
        eps = by_diffusers(net, x_t.astype(np.float32), [t - 1] * 2, labels)[..., :channels].astype(np.float64)
        x_0 = (x_t - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])
        x_t = np.sqrt(alpha_bar[s]) * x_0 + np.sqrt(1 - alpha_bar[s]) * eps
    assert difference(drawn, x_t) < 1e-4


def test_the_folder_is_written_back(thorough, tmp_path):
    """The same tensors and settings; diffusers reads the folder without a warning about a tensor."""
    net, _, (found, module, params) = thorough
    config = weights.as_config(found)
    config["sample"] = config["sample"] | {"tau": "leading", "clip_x0": False}
    diffusers_export.save(tmp_path / "back", params, config, model_card.markdown(config, None, 1))
    back, loading = diffusers.UNet2DModel.from_pretrained(tmp_path / "back" / "unet", output_loading_info=True)
    assert not any(map(len, loading.values())), loading
    original = net.state_dict()
    assert original.keys() == back.state_dict().keys()
    for name, tensor in back.state_dict().items():
        torch.testing.assert_close(tensor, original[name], rtol=0, atol=0)
    x, labels = inputs(found, 2)
    np.testing.assert_array_equal(by_diffusers(back.eval(), x, [5, 7], labels), by_diffusers(net, x, [5, 7], labels))
    fields = network_fields(json.loads((tmp_path / "back" / "unet" / "config.json").read_text()), "back")
    assert {name: getattr(found.model, name) for name in fields} == fields
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "back")
    if found.model.learn_sigma:
        assert type(pipeline).__name__ == "DDPMPipeline" and pipeline.scheduler.config.variance_type == "learned_range"
        assert "DDPMPipeline" in (tmp_path / "back" / "README.md").read_text()
    if not found.model.num_classes:
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape[1:3] == x.shape[1:3]


EXPORTED = {  # networks of ours -> the settings that they have in diffusers
    "ADM by the number of heads": (
        dict(scale_shift=True, resample="block", num_heads=2, learn_sigma=True, channel_mult=(1, 1)),
        dict(attention_head_dim=8, attn_norm_num_groups=4, out_channels=6, downsample_type="resnet"),
    ),
    "time_channels as many as channels": (dict(time_channels=16), dict(time_embedding_dim=None)),
    "fractions": (dict(channel_mult=(1, 1.5), groups=8), dict(block_out_channels=[16, 24])),
    "attention on one way": (
        dict(attention_resolutions=(), attention_resolutions_up=(4,)),
        dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["AttnUpBlock2D", "UpBlock2D"]),
    ),
}
OURS = UNet(
    image_size=8, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), groups=4, dropout=0.0
)  # fmt: skip


def fields_of(module):
    other = {"prediction": "eps", "name": "unet", "dtype": "float32"}
    return {item.name: getattr(module, item.name) for item in dataclasses.fields(module)[:-2]} | other


@pytest.mark.parametrize("name", EXPORTED)
def test_networks_of_ours_in_diffusers(name, tmp_path):
    changed, expected = EXPORTED[name]
    module = OURS.clone(**changed)
    module.check()
    params = random_params(module)
    config = weights.as_config(weights.checked(shipped_like(fields_of(module), config_of(""))))
    diffusers_export.save(tmp_path, params, config, "a card\n")
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    assert {name: net.config[name] for name in expected} == expected
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    output = module.apply({"params": params}, x, jnp.asarray([5, 30]))
    assert difference(output, by_diffusers(net, x, [5, 30])) < 5e-6


def shipped_like(model, values):
    from ddim_jax.checkpoints import CheckpointInfo

    sample = {
        "tau": "leading",
        "tau_offset": 0,
        "tau_end": 0,
        "clip_x0": False,
        "clip_range": 1.0,
        "clip_quantile": 0.0,
    }
    return CheckpointInfo(
        "test", lambda like, ema: None, name="net", model=model, schedule=values["schedule"], sample=sample
    )


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(patch_size=2), ("model.patch_size", "1", "2")),
        (dict(time_scale=0.25), ("model.time_scale", "1", "0.25")),
        (dict(time_channels=32), ("model.time_channels", "16", "32")),
        (dict(channel_mult=(2, 2)), ("model.channel_mult", "1")),
        (dict(num_heads=2), ("model.num_heads",)),
        (dict(middle_groups=-1), ("model.middle_groups", "scale_shift", "-1")),
    ],
)
def test_networks_that_diffusers_does_not_have(changed, words):
    """The two attentions of OURS have 32 channels and those at full size 16, so two heads differ in size."""
    module = OURS.clone(attention_resolutions=(8, 4), **changed)
    with raises(CheckpointError, *words):
        diffusers_export.unet_config(fields_of(module))


# --- settings that are refused ---


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(sample_size=(8, 16)), ("sample_size", "square")),
        (dict(sample_size="8"), ("sample_size", "'8'")),
        (dict(out_channels=4), ("out_channels", "4", "in_channels", "3")),
        (dict(time_embedding_dim=32), ("time_embedding_dim", "32", "16")),
        (dict(time_embedding_type="learned", num_train_timesteps=9), ("time_embedding_type", "'learned'")),
        (dict(class_embed_type="timestep"), ("class_embed_type", "'timestep'")),
        (dict(class_embed_type="identity"), ("class_embed_type", "'identity'")),
        (dict(mid_block_type=None), ("mid_block_type", "None", "'UNetMidBlock2D'")),
        (dict(mid_block_scale_factor=2.0), ("mid_block_scale_factor", "2.0")),
        (dict(center_input_sample=True), ("center_input_sample", "True")),
        (dict(resnet_time_scale_shift="spatial"), ("resnet_time_scale_shift", "'spatial'", "'scale_shift'")),
        (dict(attn_norm_num_groups=0), ("attn_norm_num_groups", "0")),
        (dict(attention_head_dim=(8, 8)), ("attention_head_dim",)),
        (dict(block_out_channels=(16, 2.5)), ("block_out_channels",)),
        (dict(down_block_types=DOWN[::-1], downsample_type="resnet"), ("down_block_types", "resnet")),
        (dict(down_block_types=DOWN[::-1], downsample_type=None), ("downsample_type", "None")),
        (dict(down_block_types=DOWN[::-1], downsample_type="pool"), ("downsample_type", "'pool'", "'conv'")),
        (dict(down_block_types=("KDownBlock2D", DOWN[0])), ("down_block_types", "'KDownBlock2D'")),
        (dict(RESNET), ("down_block_types", "up_block_types", "UpBlock2D")),
    ],
)
def test_a_setting_that_is_not_supported_is_named(settings, words):
    if words[-1] == "UpBlock2D":  # the encoder by residual blocks, the decoder by convolutions
        settings = dict(settings, up_block_types=("UpBlock2D", "UpBlock2D"))
    with raises(CheckpointError, "here", *words):
        network_fields(SMALL | settings, "here")


def test_every_field_of_the_network_is_known_with_its_default():
    """Of the installed version: a field of a later one fails this test. The fields of earlier versions are fewer."""
    import inspect

    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert NETWORK | {name: supported[0] for name, supported in FIXED.items()} == defaults


@pytest.mark.parametrize("variance_type, allowed", [("learned", "learned_range"), ("learned_range", "out_channels")])
def test_a_learned_variance_without_its_channels_is_refused(variance_type, allowed, tmp_path):
    net = diffusers.UNet2DModel(**SMALL)
    where = publish(tmp_path / "net", net, diffusers.DDPMScheduler(variance_type=variance_type))
    with raises(CheckpointError, "variance_type", f"'{variance_type}'", allowed):
        weights.read_info(where)


# --- the size of the images ---


@pytest.fixture(scope="module")
def unsized(tmp_path_factory):
    net = randomise(diffusers.UNet2DModel(**VARIANTS["no size"]))
    return publish(tmp_path_factory.mktemp("unsized") / "net", net)


def test_the_size_is_given_by_the_command(unsized, tmp_path, capsys):
    from processes import error_line, ok, run

    with raises(CheckpointError, "sample_size", "image_size"):
        weights.read_info(unsized)
    assert weights.read_info(unsized, 16).model.attention_resolutions == (8,)
    assert weights.load(unsized, image_size=16).shape == (16, 16, 3)
    with raises(CheckpointError, "image_size", "9"):
        weights.read_info(unsized, 9)
    sample = ("ddim_jax.sample", "--config", "configs/default.py", f"--config.pretrained={unsized}")
    sample += ("--config.sample.steps=2", "--config.sample.num_images=2")
    done = ok(run(*sample, "--config.model.image_size=16", "--out", tmp_path / "out"))
    assert "sample_size" in done.stderr and "16x16" in done.stderr
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)
    convert = ("ddim_jax.convert", "--from", unsized, "--to", tmp_path / "net.safetensors")
    error_line(run(*convert), "sample_size", "image_size")
    error_line(run(*convert, "--image_size=big"), "--image_size", "'big'")
    ok(run(*convert, "--image_size=16"))
    assert weights.read_info(str(tmp_path / "net.safetensors")).model.image_size == 16


def test_the_size_of_a_folder_that_tells_it_is_not_changed(tmp_path):
    from processes import error_line, run

    where = publish(tmp_path / "net", diffusers.UNet2DModel(**SMALL))
    assert weights.read_info(where, 16).model.image_size == 8
    sample = ("ddim_jax.sample", "--config", "configs/default.py", f"--config.pretrained={where}")
    error_line(
        run(*sample, "--config.model.image_size=16", "--out", tmp_path), "config.model.image_size", "config.pretrained"
    )


# --- the weight files ---


@pytest.fixture
def folder(tmp_path):
    net = randomise(diffusers.UNet2DModel(**SMALL))
    return net, tmp_path, publish(tmp_path / "net", net)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_shards_and_variants(folder, safe, variant, shard):
    net, tmp_path, where = folder
    expected = read(where)[2]
    unet = tmp_path / "net" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    if variant:
        net = net.half()
        expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), expected)
    net.save_pretrained(unet, safe_serialization=safe, variant=variant, max_shard_size=shard)
    assert (len(list(unet.glob("diffusion_pytorch_model*"))) > 2) == (shard == "40KB")
    jax.tree.map(np.testing.assert_array_equal, read(where)[2], expected)


def test_full_precision_is_preferred(folder):
    net, tmp_path, where = folder
    expected = read(where)[2]
    net.half().save_pretrained(tmp_path / "net" / "unet", variant="fp16")
    jax.tree.map(np.testing.assert_array_equal, read(where)[2], expected)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda index: index.pop("weight_map"), ("weight_map", "None")),
        (lambda index: index["weight_map"].update({"conv_in.bias": "../../secret.safetensors"}), ("weight_map",)),
        (lambda index: index["weight_map"].update({"conv_in.bias": 3}), ("weight_map", "3")),
        (lambda index: index["weight_map"].pop("conv_in.bias"), ("weight_map", "'conv_in.bias'")),
        (lambda index: index["weight_map"].update({"more": next(iter(index["weight_map"].values()))}), ("'more'",)),
        (
            lambda index: index["weight_map"].update({"more": "diffusion_pytorch_model-9.safetensors"}),
            ("unet/diffusion_pytorch_model-9.safetensors",),
        ),
    ],
)
def test_a_wrong_index_of_shards_is_named(folder, damage, words):
    net, tmp_path, where = folder
    unet = tmp_path / "net" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    net.save_pretrained(unet, max_shard_size="40KB")
    index = next(unet.glob("*.index.json"))
    content = json.loads(index.read_text())
    damage(content)
    index.write_text(json.dumps(content))
    with raises(CheckpointError, *words):
        read(where)


# --- fixtures: the configs of published networks, in small ---

TRAIN_UNCONDITIONAL = dict(  # diffusers' examples/unconditional_image_generation/train_unconditional.py
    sample_size=32,
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    block_out_channels=(32, 32, 64, 64, 128, 128),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
)
OLD = dict(  # the fields that diffusers 0.3 writes, for google/ddpm-cifar10-32
    act_fn="silu", attention_head_dim=None, block_out_channels=[32, 64, 64, 64], center_input_sample=False,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-6,
    norm_num_groups=32, out_channels=3, sample_size=16, time_embedding_type="positional",
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
OLD_NOISE = dict(
    _class_name="DDPMScheduler", _diffusers_version="0.3.0", beta_end=0.02, beta_schedule="linear", beta_start=0.0001,
    clip_sample=True, num_train_timesteps=1000, tensor_format="pt", trained_betas=None, variance_type="fixed_large",
)  # fmt: skip


def check_first_output(where, net):
    found, module, params = opened(where)
    x, _ = inputs(found, 1)
    expected = by_diffusers(net, x, [11])
    assert difference(jax.jit(module.apply)({"params": params}, x, jnp.asarray([11])), expected) < 5e-6
    return found


def test_the_default_of_train_unconditional(tmp_path):
    """The commonest kind on the hub. Its widths are a quarter here; the published ones are 128, 128, 256, ..., 512."""
    net = randomise(diffusers.UNet2DModel(**TRAIN_UNCONDITIONAL))
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    found = check_first_output(publish(tmp_path / "net", net, scheduler), net)
    model = found.model
    assert (model.head_channels, model.norm_epsilon, model.downsample_padding) == (8, 1e-5, "both")
    assert (model.cos_first, model.frequency_shift, model.channel_mult) == (True, 0, (1, 1, 2, 2, 4, 4))
    assert model.attention_resolutions == (2,) and found.note == ""
    widths = [128, 128, 256, 256, 512, 512]
    published = network_fields(TRAIN_UNCONDITIONAL | {"block_out_channels": widths, "sample_size": 64}, "it")
    assert published["channel_mult"] == (1, 1, 2, 2, 4, 4) and published["attention_resolutions"] == (4,)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("in_root", [False, True])
def test_the_fields_of_diffusers_0_3(tmp_path, channels, in_root):
    """Also of grey images, and with everything in the root, as in the first repositories and in courses."""
    settings = OLD | dict(in_channels=channels, out_channels=channels)
    net = randomise(diffusers.UNet2DModel(**settings))
    where = tmp_path / "net"
    publish(where, net)
    (where / "unet" / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.3.0", **settings})
    )
    (where / "scheduler" / "scheduler_config.json").write_text(json.dumps(OLD_NOISE))
    if in_root:
        for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
            shutil.move(where / name, where)
        shutil.rmtree(where / "unet")
        shutil.rmtree(where / "scheduler")
    found = check_first_output(str(where), net)
    assert found.model.image_channels == channels and found.model.prediction == "eps"
    assert found.sample["clip_x0"] and "fixed_large" in found.note
