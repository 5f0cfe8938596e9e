"""The EDM networks of consistency_models, the teachers of its consistency models: the network of ADM with the
preconditioning of EDM.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install -e '.[parity]'")

import adm_model  # noqa: E402
from conftest import meshes  # noqa: E402
from messages import raises  # noqa: E402
from test_edm import algorithm_1, karras, level_of  # noqa: E402
from tiny import sampling_config  # noqa: E402

from ddim_jax import config as config_lib  # noqa: E402
from ddim_jax import samplers  # noqa: E402
from ddim_jax.checkpoints import diffusers_export  # noqa: E402
from ddim_jax.checkpoints import guided_diffusion_flags as flags_lib  # noqa: E402
from ddim_jax.config import weights  # noqa: E402
from ddim_jax.models.denoiser import Denoiser  # noqa: E402
from ddim_jax.utils.errors import CheckpointError  # noqa: E402

torch.set_num_threads(1)

FLAGS = (
    "--training_mode edm --image_size 8 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --resblock_updown True "
    "--num_head_channels 32 --attention_resolutions 8,4 --sigma_max 80 --s_churn 0"
)
KINDS = {"imagenet64": f"{FLAGS} --class_cond True", "bedroom256": f"{FLAGS} --use_scale_shift_norm False"}


@pytest.fixture(scope="module", params=KINDS)
def teacher(request, tmp_path_factory):
    """(a file with random weights and its flags next to it, the PyTorch network, labels of two images or None).

    The attention of these networks has the new order, and kernels that end with (1, 1).
    """
    folder, text = tmp_path_factory.mktemp("teacher"), KINDS[request.param]
    flags = flags_lib.parse_flags(text, "test") | {"use_new_attention_order": True}
    torch.manual_seed(0)
    network = adm_model.Network(flags, flags_lib.CLASSES if flags["class_cond"] else 0).eval().requires_grad_(False)
    for parameter in network.parameters():
        scale = 1 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.3
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, scale)
    is_kernel = lambda name: name.endswith(("qkv.weight", "proj_out.weight"))
    state = {name: value[..., None] if is_kernel(name) else value for name, value in network.state_dict().items()}
    torch.save(state, folder / "net.pt")
    (folder / flags_lib.FLAGS).write_text(text)
    return folder / "net.pt", network, np.asarray([3, 700]) if flags["class_cond"] else None


def read(path):
    found = weights.read_info(str(path))
    return found, config_lib.network(found.model), found.read(weights.params_like(found.model, meshes()[0]), True)


def noise():
    return np.random.default_rng(1).normal(size=(2, 8, 8, 3))


def channels_first(x, dtype):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), dtype=dtype)


def denoised(network, x, sigma, labels):
    """D(x, sigma) of Karras et al. 2022, Eq. 7, with the network's time 1000 ln(sigma) / 4."""
    dtype = network.out[2].weight.dtype
    scale = math.sqrt(sigma**2 + 0.25)
    time = torch.full((len(x),), 250 * math.log(sigma), dtype=dtype)
    labels = None if labels is None else torch.tensor(labels)
    output = network(channels_first(x / scale, dtype), time, labels).numpy().transpose(0, 2, 3, 1)
    return 0.25 / scale**2 * x + 0.5 * sigma / scale * output


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_outputs(teacher, sigma):
    """Within 5e-6 of the largest output, and of the rounding of the time: |1000 ln(sigma) / 4| is above 1,000."""
    path, network, labels = teacher
    _, ours, params = read(path)
    x, level = sigma * noise() + 0.5, level_of(sigma, np.float32)
    denoise = Denoiser(ours, params, "edm", None if labels is None else jnp.asarray(labels))
    x_0 = jax.jit(denoise)(jnp.asarray(x * np.sqrt(level.alpha_bar), jnp.float32), level).x_0
    expected = denoised(network, x, sigma, labels)
    assert expected.std() > 1e-4
    np.testing.assert_allclose(x_0, expected, atol=(5e-6 + 2e-5 * (sigma != 0.5)) * abs(expected).max())


def test_the_sampler(teacher, x64):
    """Algorithm 1 of EDM, 10 steps, in float64, beside a loop in NumPy over the PyTorch network."""
    path, network, labels = teacher
    found, ours, params = read(path)
    config = sampling_config(found, steps=10, sampler="heun")
    noise_schedule = config_lib.noise_schedule(config.schedule)
    process = config_lib.process(config.sample, noise_schedule)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    module = ours.module.clone(dtype=jnp.float64)
    labels_ = None if labels is None else jnp.asarray(labels)
    denoise = Denoiser(module, params, "edm", labels_, noise_schedule.level(1))
    start, alpha_bar = 80 * noise(), np.asarray(process.transitions.alpha_bar_t)[0]
    drawn = samplers.integrate(process.sampler, denoise, process.transitions, start * np.sqrt(alpha_bar))
    try:
        network.double()
        expected = algorithm_1(lambda x, sigma: denoised(network, x, sigma, labels), karras(10), start)
    finally:
        network.float()
    np.testing.assert_allclose(drawn, expected, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_beside_diffusers(teacher, sigma, tmp_path):
    """The same weights in a UNet2DModel, with the scalings and the time of diffusers' scheduler for these networks."""
    path, _, labels = teacher
    found, ours, params = read(path)
    config = weights.as_config(found)
    config["model"] |= {"prediction": "eps", "time_scale": 1.0}
    config["schedule"] |= {"name": "linear", "num_steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    config["sample"] |= {"tau": "uniform"}
    diffusers_export.save(tmp_path, params, config, "a card\n")
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    scheduler = diffusers.CMStochasticIterativeScheduler()
    x, level = sigma * noise(), level_of(sigma, np.float32)
    c_skip, c_out = scheduler.get_scalings(sigma)
    time = torch.tensor(float(scheduler.sigma_to_t(np.asarray([sigma]))[0]))
    given = {} if labels is None else {"class_labels": torch.tensor(labels)}
    with torch.no_grad():
        output = net(channels_first(x / math.sqrt(sigma**2 + 0.25), torch.float32), time, **given).sample
    expected = c_skip * x + c_out * output.numpy().transpose(0, 2, 3, 1)
    denoise = Denoiser(ours, params, "edm", None if labels is None else jnp.asarray(labels))
    x_0 = jax.jit(denoise)(jnp.asarray(x * np.sqrt(level.alpha_bar), jnp.float32), level).x_0
    np.testing.assert_allclose(x_0, expected, atol=5e-6 * abs(expected).max())


@pytest.mark.parametrize("name", ["edm_imagenet64_ema", "edm_bedroom256_ema", "edm_cat256_ema"])
def test_the_size_of_a_published_network(name, tmp_path):
    """That of diffusers' class for the same settings; for 64x64 296 million parameters, as ADM."""
    flags, _ = flags_lib.flags_of(tmp_path / f"{name}.pt")
    model = config_lib.section(config_lib.ModelConfig, {"name": "unet"} | flags_lib.network_fields(flags, name), "")
    shapes = jax.tree.leaves(weights.params_like(model, meshes()[0]))
    count = sum(leaf.size for leaf in shapes)
    assert "256" in name or count / 1e6 == pytest.approx(296, rel=0.01)
    fields = dataclasses.asdict(model) | {"time_scale": 1.0, "prediction": "eps"}
    with torch.device("meta"):
        net = diffusers.UNet2DModel.from_config(diffusers_export.unet_config(fields))
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--training_mode consistency_distillation", ("training_mode", "consistency_distillation", "edm")),
        ("--training_mode edm --learn_sigma True", ("learn_sigma", "training_mode")),
        ("--training_mode edm --predict_xstart True", ("predict_xstart", "training_mode")),
    ],
)
def test_a_flag_that_is_not_supported_is_named(flags, words):
    with raises(CheckpointError, "here", *words):
        flags_lib.network_fields(flags_lib.parse_flags(flags, "here"), "here")
