"""Checkpoints of guided-diffusion and improved-diffusion: the network of the same weights, in PyTorch, and what the
flags and the names of the published files mean.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")

import adm_model  # noqa: E402
from conftest import meshes  # noqa: E402
from messages import raises  # noqa: E402
from tiny import sampling_config  # noqa: E402

from ddim_jax import config as config_lib  # noqa: E402
from ddim_jax import sampling, schedule, trajectory  # noqa: E402
from ddim_jax.checkpoints import diffusers_export  # noqa: E402
from ddim_jax.checkpoints import guided_diffusion_flags as flags_lib  # noqa: E402
from ddim_jax.config import weights  # noqa: E402
from ddim_jax.utils.errors import CheckpointError, ConfigError  # noqa: E402

torch.set_num_threads(1)

ADM = "--resblock_updown True --num_head_channels 32 --attention_resolutions 8,4 --learn_sigma True"
KINDS = {  # the families, in small
    "adm": f"{ADM} --class_cond True",
    "adm, new order of attention": f"{ADM} --use_new_attention_order True --noise_schedule cosine",
    "adm, heads by number": "--resblock_updown True --num_heads 2 --attention_resolutions 8 --class_cond True",
    "improved-diffusion": (
        "--learn_sigma True --num_heads 2 --attention_resolutions 8,4 --diffusion_steps 4000 --noise_schedule cosine "
        "--rescale_timesteps True"
    ),
    "improved-diffusion, lsun": (
        "--learn_sigma True --num_heads 1 --use_scale_shift_norm False --attention_resolutions 4"
    ),
}
SMALL = "--image_size 8 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1"


def published(kind, folder):
    """(a file with random weights and its flags next to it, the PyTorch network, its flags)."""
    text = f"{SMALL} {KINDS[kind]}"
    flags = flags_lib.parse_flags(text, "test")
    torch.manual_seed(0)
    network = adm_model.Network(flags, flags_lib.CLASSES if flags["class_cond"] else 0).eval()
    for parameter in network.parameters():
        scale = 1 / np.sqrt(np.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.3
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, scale)
    torch.save(network.state_dict(), folder / "net.pt")
    (folder / flags_lib.FLAGS).write_text(f'MODEL_FLAGS="{text}"\n')
    return folder / "net.pt", network, flags


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    return published(request.param, tmp_path_factory.mktemp("adm"))


def read(path):
    found = weights.read_info(str(path))
    return found, config_lib.network(found.model), found.read(weights.params_like(found.model, meshes()[0]), True)


def inputs(flags, batch, dtype=np.float32):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, flags_lib.CLASSES, batch) if flags["class_cond"] else None
    return rng.normal(size=(batch, 8, 8, 3)).astype(dtype), labels


def by_torch(network, flags, x, time, labels):
    """(B, H, W, 3 or 6), from time 0..T-1."""
    scale = 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0
    time = torch.full((len(x),), float(time), dtype=network.out[2].weight.dtype) * scale
    labels = None if labels is None else torch.tensor(labels)
    with torch.no_grad():
        output = network(torch.tensor(x.transpose(0, 3, 1, 2)), time, labels)
    return output.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("time", [0, 7, 999])
def test_outputs(pair, time):
    """float32: within 5e-6 of the largest output; of a learned sigma both halves."""
    path, network, flags = pair
    _, ours, params = read(path)
    x, labels = inputs(flags, 3)
    expected = by_torch(network, flags, x, time, labels)
    assert expected.std() > 0.1 and expected.shape[-1] == (6 if flags["learn_sigma"] else 3)
    output = jax.jit(ours.apply)(params, x, jnp.full(3, time), None if labels is None else jnp.asarray(labels))
    np.testing.assert_allclose(output, expected, atol=5e-6 * abs(expected).max() + 2e-5 * (time == 999))


def test_outputs_in_float64(pair, x64):
    path, network, flags = pair
    _, ours, params = read(path)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    module = ours.module.clone(dtype=jnp.float64)
    x, labels = inputs(flags, 2, np.float64)
    network = type(network)(flags, flags_lib.CLASSES if flags["class_cond"] else 0).double().eval()
    network.load_state_dict(torch.load(path))
    expected = by_torch(network, flags, x, 500, labels)
    labels = None if labels is None else jnp.asarray(labels)
    output = module.apply({"params": params}, x, jnp.full(2, 500.0, jnp.float64), labels)
    np.testing.assert_allclose(output, expected, atol=1e-10 * abs(expected).max())


def test_gradients(pair):
    """Of a sum of squares with respect to x: within 1e-4 of its largest entry."""
    path, network, flags = pair
    _, ours, params = read(path)
    x, labels = inputs(flags, 2)
    variable = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    scale = 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0
    time = torch.full((2,), 300 * scale)
    network(variable, time, None if labels is None else torch.tensor(labels)).square().sum().backward()
    expected = variable.grad.numpy().transpose(0, 2, 3, 1)
    labels = None if labels is None else jnp.asarray(labels)
    loss = lambda x: jnp.square(ours.apply(params, x, jnp.full(2, 300), labels)).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, atol=1e-4 * abs(expected).max())


def test_the_variance_of_a_published_network(pair):
    """The denoiser predicts it, as the second half of the output. A sampler that needs it refuses other networks."""
    path, network, flags = pair
    found, _, params = read(path)
    config = sampling_config(found, steps=3, sampler="ddpm_learned")
    if not flags["learn_sigma"]:
        with raises(ConfigError, "config.sample.sampler", "ddpm_learned", "config.model.learn_sigma"):
            config_lib.pipeline(config, params, meshes()[0])
        return
    pipeline = config_lib.pipeline(config, params, meshes()[0])
    images = sampling.draw(pipeline, 2)
    assert images.shape == (2, 8, 8, 3) and np.std(images) > 0
    x, labels = inputs(flags, 2)
    level = schedule.level_at(schedule.levels(config_lib.noise_schedule(config.schedule)), 500, x)
    denoise = pipeline.denoiser.with_labels(None if labels is None else jnp.asarray(labels))
    expected = by_torch(network, flags, x, 499, labels)
    predicted = jax.jit(denoise)(x, level)
    np.testing.assert_allclose(predicted.eps, expected[..., :3], atol=5e-6 * np.abs(expected).max())
    np.testing.assert_allclose(predicted.variance_fraction, (expected[..., 3:] + 1) / 2, atol=5e-6)


def test_twenty_steps_of_ddim(pair):
    """Eq. (12) by hand around the PyTorch network, with x_0 clipped as its authors do, beside the pipeline."""
    path, network, flags = pair
    found, _, params = read(path)
    config = sampling_config(found, steps=20)
    pipeline = config_lib.pipeline(config, params, meshes()[0])
    labels = sampling.labels_of(pipeline, np.arange(2))
    _, x = sampling.start(pipeline, np.arange(2))
    drawn = sampling.decode(pipeline, np.asarray(x), labels)

    noise_schedule = config_lib.noise_schedule(config.schedule)
    tau = trajectory.uniform(noise_schedule.num_steps, 20)
    alpha_bar = np.asarray(schedule.levels(noise_schedule).alpha_bar, np.float64)
    x = np.asarray(x, np.float64)
    for t, s in zip(tau[:0:-1], tau[-2::-1], strict=True):
        output = by_torch(network, flags, x.astype(np.float32), t - 1, labels)[..., :3].astype(np.float64)
        x_0 = np.clip((x - np.sqrt(1 - alpha_bar[t]) * output) / np.sqrt(alpha_bar[t]), -1, 1)
        eps = (x - np.sqrt(alpha_bar[t]) * x_0) / np.sqrt(1 - alpha_bar[t])
        x = np.sqrt(alpha_bar[s]) * x_0 + np.sqrt(1 - alpha_bar[s]) * eps
    np.testing.assert_allclose(drawn, x, atol=1e-4)


# --- flags and names ---

SIZES = {  # published file -> parameters in millions, as its paper states them
    "64x64_diffusion": 296,
    "128x128_diffusion": 422,
    "256x256_diffusion": 554,
    "256x256_diffusion_uncond": 553,
    "512x512_diffusion": 559,
    "lsun_bedroom": 552,
    "cifar10_uncond_50M_500K": 53,
    "imagenet64_uncond_100M_1500K": 121,
    "imagenet64_cond_270M_250K": 273,
    "lsun_uncond_100M_1200K_bs128": 114,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of_a_published_network(name):
    flags, _ = flags_lib.flags_of(pathlib.Path(f"{name}.pt"))
    model = config_lib.section(config_lib.ModelConfig, {"name": "unet"} | flags_lib.network_fields(flags, name), "")
    shapes = jax.tree.leaves(weights.params_like(model, meshes()[0]))
    assert sum(leaf.size for leaf in shapes) / 1e6 == pytest.approx(SIZES[name], rel=0.03)


@pytest.mark.parametrize(
    "text, name",
    [
        ("--num_heads_upsample 2", "num_heads_upsample"),
        ("--noise_schedule sqrt", "noise_schedule"),
        ("--num_head_channels 0", "num_head_channels"),
        ("--num_heads 0", "num_heads"),
        ("--image_size 48", "image_size"),
        ("--channel_mult 1,-1", "channel_mult"),
        ("--channel_mult a,b", "channel_mult"),
        ("--diffusion_steps 0", "diffusion_steps"),
        ("--large_size 256", "large_size"),
        ("--learn_sigma maybe", "learn_sigma"),
        ("--num_channels", "num_channels"),
        ("image_size 64", "image_size"),
    ],
)
def test_a_flag_that_is_not_supported_is_named(text, name):
    with pytest.raises(CheckpointError, match=name):
        flags_lib.network_fields(flags_lib.parse_flags(text, "flags"), "flags")


def test_a_file_of_another_name_needs_its_flags(tmp_path):
    path, _, _ = published("adm", tmp_path)
    (tmp_path / flags_lib.FLAGS).unlink()
    with pytest.raises(CheckpointError, match=flags_lib.FLAGS):
        weights.read_info(str(path))


def test_what_diffusers_cannot_hold_is_not_exported(tmp_path):
    """A folder of diffusers would be another network; a .safetensors file holds all of it."""
    path, _, _ = published("improved-diffusion", tmp_path)
    model = dataclasses.asdict(weights.read_info(str(path)).model)
    with pytest.raises(CheckpointError, match="model.time_scale"):
        diffusers_export.unet_config(model)


@pytest.mark.parametrize("kind", ["adm", "adm, new order of attention"])
def test_adm_in_diffusers(kind, tmp_path):
    """As a folder for diffusers: both halves of the output."""
    diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")
    path, network, flags = published(kind, tmp_path)
    found, _, params = read(path)
    diffusers_export.save(tmp_path / "folder", params, weights.as_config(found), "a card\n")
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "folder" / "unet").eval()
    x, labels = inputs(flags, 3)
    given = {} if labels is None else {"class_labels": torch.tensor(labels)}
    with torch.no_grad():
        output = net(torch.tensor(x.transpose(0, 3, 1, 2)), 7, **given).sample.numpy().transpose(0, 2, 3, 1)
    expected = by_torch(network, flags, x, 7, labels)
    np.testing.assert_allclose(output, expected, atol=5e-6 * abs(expected).max())
