"""Checkpoints of EDM: the network of the same weights in PyTorch, its sampler, and files that are hostile or damaged.

The networks are in `edm_model`. Their pickles have the layout of the published files.
"""

import dataclasses
import math
import os
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install -e '.[parity]'")

import edm_model  # noqa: E402
from conftest import meshes  # noqa: E402
from messages import raises  # noqa: E402
from mutations import WAYS, altered  # noqa: E402
from processes import ROOT  # noqa: E402
from tiny import sampling_config  # noqa: E402

from ddim_jax import config as config_lib  # noqa: E402
from ddim_jax import gaussian, losses, samplers, sampling, schedule  # noqa: E402
from ddim_jax.checkpoints import diffusers_export, edm, torch_file  # noqa: E402
from ddim_jax.config import weights  # noqa: E402
from ddim_jax.models import song_unet  # noqa: E402
from ddim_jax.models.denoiser import Denoiser  # noqa: E402
from ddim_jax.utils.errors import CheckpointError, ConfigError, DamagedError  # noqa: E402

torch.set_num_threads(1)

SIGMAS = (0.002, 0.3, 5.0, 80.0)


QUICK = ("DDPM++", "NCSN++ with classes", "ADM")  # they have every kind of layer; the other ones are slow tests


def kinds(quick):
    return [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in edm_model.KINDS]


@pytest.fixture(scope="module", params=kinds(QUICK))
def pair(request, tmp_path_factory):
    """(a .pkl file with random weights, the PyTorch network)."""
    network = edm_model.network_of(request.param)
    return edm_model.save(tmp_path_factory.mktemp("edm") / "net.pkl", network), network


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same for DDPM++ without classes."""
    network = edm_model.network_of("DDPM++")
    return edm_model.save(tmp_path_factory.mktemp("edm") / "net.pkl", network), network


def read(path):
    found = weights.read_info(str(path))
    return found, config_lib.network(found.model), found.read(weights.params_like(found.model, meshes()[0]), True)


def inputs(network, batch, dtype=np.float32):
    """(x_sigma / sigma for any sigma, labels or None)."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, network.label_dim, batch) if network.label_dim else None
    return rng.normal(size=(batch, 8, 8, 3)).astype(dtype), labels


def one_hot(network, labels, dtype):
    return None if labels is None else torch.eye(network.label_dim, dtype=dtype)[torch.tensor(labels)]


def denoised(network, x, sigma, labels=None):
    """D(x, sigma) by PyTorch, (B, H, W, C)."""
    values = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))
    with torch.no_grad():
        output = network(values, float(sigma), one_hot(network, labels, values.dtype))
    return output.numpy().transpose(0, 2, 3, 1)


def level_of(sigma, dtype=np.float64):
    """The noise level with this sigma = sqrt((1 - alpha_bar) / alpha_bar). t counts from 1."""
    return schedule.Level(np.asarray(500.0, dtype), *(np.asarray(v / (1 + sigma**2), dtype) for v in (1, sigma**2)))


def as_labels(labels):
    return None if labels is None else jnp.asarray(labels)


# --- the network and its preconditioning ---


def test_outputs(pair):
    """D(x, sigma) is the predicted x_0, and (x - D) / sigma the predicted eps (Karras et al. 2022, Eq. 3 and 7)."""
    path, network = pair
    _, ours, params = read(path)
    noise, labels = inputs(network, 3)
    denoise = jax.jit(Denoiser(ours, params, "edm", as_labels(labels)))
    for sigma in SIGMAS:
        x, level = sigma * noise + 0.5 * noise[:, ::-1], level_of(sigma, np.float32)
        expected = denoised(network, x, sigma, labels)
        x_0, eps = denoise(x * np.sqrt(level.alpha_bar), level)
        assert expected.std() > 0.1
        np.testing.assert_allclose(x_0, expected, atol=5e-6 * abs(expected).max())
        if sigma >= 0.3:  # below, the difference of x and D has few digits in PyTorch
            np.testing.assert_allclose(eps, (x - expected) / sigma, atol=5e-6 * abs(x).max() / sigma)


def doubled(path, network):
    """(network, params) of both in float64."""
    found, _, params = read(path)
    ours = config_lib.network(found.model)
    return ours.module.clone(dtype=jnp.float64), jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)


@pytest.mark.parametrize("pair", kinds(QUICK[:2]), indirect=True)
def test_outputs_in_float64(pair, x64):
    path, network = pair
    ours, params = doubled(path, network)
    noise, labels = inputs(network, 2, np.float64)
    denoise = jax.jit(Denoiser(ours, params, "edm", as_labels(labels)))
    for sigma in SIGMAS:
        x, level = sigma * noise + 0.5 * noise[:, ::-1], level_of(sigma)
        try:
            expected = denoised(network.double(), x, sigma, labels)
        finally:
            network.float()
        x_0, eps = denoise(x * np.sqrt(level.alpha_bar), level)
        np.testing.assert_allclose(x_0, expected, atol=1e-10 * abs(expected).max())
        np.testing.assert_allclose(eps, (x - expected) / sigma, atol=1e-10 * abs(x).max() / sigma)


def test_gradients(pair):
    """Of a sum of squares of x_0 with respect to x: within 1e-4 of the largest entry."""
    path, network = pair
    _, ours, params = read(path)
    x, labels = inputs(network, 2)
    variable = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    network(variable, 0.7, one_hot(network, labels, torch.float32)).square().sum().backward()
    expected, level = variable.grad.numpy().transpose(0, 2, 3, 1), level_of(0.7, np.float32)
    denoise = Denoiser(ours, params, "edm", as_labels(labels))
    loss = lambda x: jnp.square(denoise(x * np.sqrt(level.alpha_bar), level).x_0).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), expected, atol=1e-4 * abs(expected).max())


def test_the_resampling_is_that_of_its_definition(x64):
    """`downsample` and `upsample` are transposes of each other up to the factor 4, and keep a constant image."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)))
    small = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)))
    for weights_ in ((1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)):
        down, up = song_unet.downsample(x, weights_), song_unet.upsample(small, weights_)
        assert down.shape == small.shape and up.shape == x.shape
        np.testing.assert_allclose((down * small).sum(), (x * up).sum() / 4, rtol=1e-12)
        inner = slice(2, -2)
        constant = song_unet.upsample(jnp.ones((1, 8, 8, 1)), weights_)[:, inner, inner]
        np.testing.assert_allclose(constant, 1, rtol=1e-12)


# --- sampling ---


def sigma_of(process):
    """sigma at each timestep of tau, from T down to 0, in float64."""
    ab, one_minus = np.asarray(process.transitions.alpha_bar_t), np.asarray(process.transitions.one_minus_alpha_bar_t)
    return np.append(np.sqrt(one_minus.astype(np.float64) / ab.astype(np.float64)), 0.0)


def karras(count, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Eq. (5) of the paper: the noise levels, and 0."""
    ramp = np.linspace(0, 1, count)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(levels, 0.0)


def algorithm_1(denoise, sigmas, x):
    """Algorithm 1 with sigma(t) = t and s(t) = 1, without noise: Heun's second-order steps, and Euler's to 0."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (euler - denoise(euler, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def ddim(denoise, sigmas, x):
    """Eq. (13): Euler's steps in sigma."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (following - sigma) * (x - denoise(x, sigma)) / sigma
    return x


def test_the_karras_levels_of_a_checkpoint(plain):
    """tau "karras" over the schedule of a checkpoint has the levels of the paper."""
    found, _, params = read(plain[0])
    config = sampling_config(found, steps=18, sampler="heun")
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    np.testing.assert_allclose(sigma_of(process), karras(18), rtol=2e-6)


@pytest.mark.parametrize("sampler, reference", [("heun", algorithm_1), ("ddim", ddim)], ids=["heun", "ddim"])
@pytest.mark.parametrize("kind", [QUICK[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in QUICK[1:])])
def test_the_sampler_of_edm(kind, sampler, reference, tmp_path, x64):
    """The paper's levels, 18 steps, in float64: an independent loop in NumPy over the PyTorch network."""
    network = edm_model.network_of(kind)
    path = edm_model.save(tmp_path / "net.pkl", network)
    ours, params = doubled(path, network)
    found = weights.read_info(str(path))
    config = sampling_config(found, steps=18, sampler=sampler)
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    noise, labels = inputs(network, 2, np.float64)
    levels = process.transitions
    denoise = Denoiser(ours, params, "edm", as_labels(labels), config_lib.noise_schedule(config.schedule).level(1))
    start = 80.0 * noise
    drawn = samplers.integrate(process.sampler, denoise, levels, start * np.sqrt(np.asarray(levels.alpha_bar_t)[0]))
    expected = reference(lambda x, sigma: denoised(network.double(), x, sigma, labels), karras(18), start)
    assert expected.std() > 0.1
    np.testing.assert_allclose(drawn, expected, atol=1e-6 * abs(expected).max())


def test_the_pipeline_of_a_checkpoint(pair):
    """20 steps of DDIM in float32 through the config, beside the PyTorch network: within 1e-4."""
    path, network = pair
    found, _, params = read(path)
    config = sampling_config(found, steps=20)
    pipeline = config_lib.pipeline(config, params, meshes()[0])
    labels = sampling.labels_of(pipeline, np.arange(2))
    _, x = sampling.start(pipeline, np.arange(2))
    drawn = sampling.decode(pipeline, np.asarray(x), labels)
    sigmas = sigma_of(pipeline.process)
    labels = None if labels is None else np.asarray(labels)
    as_float32 = lambda x, sigma: denoised(network, x.astype(np.float32), sigma, labels).astype(np.float64)
    expected = ddim(as_float32, sigmas, np.asarray(x, np.float64) * np.sqrt(1 + sigmas[0] ** 2))
    np.testing.assert_allclose(drawn, expected, atol=1e-4 * max(1, abs(expected).max()))


def test_encoding_is_decoded(plain):
    """From x_0 to the latent and back, at 100 steps; the clean image has sigma = 0, where ln(sigma) is infinite."""
    found, _, params = read(plain[0])
    config = sampling_config(found, steps=100, sampler="ddim")
    pipeline = config_lib.pipeline(config, params, meshes()[0])
    x_0 = 0.5 * np.tanh(np.random.default_rng(3).normal(size=(2, 8, 8, 3))).astype(np.float32)
    latent = sampling.encode(pipeline, x_0, None)
    back = sampling.decode(pipeline, np.asarray(latent), None)
    assert np.isfinite(latent).all() and np.abs(back - x_0).max() < 0.05
    with raises(ValueError, "lowest", "alpha_bar"):
        Denoiser(config_lib.network(found.model), params, "edm").check(np.asarray([1.0]))


# --- training ---


def test_the_loss_weight_of_edm(x64):
    """ "edm" is lambda(sigma) of table 1 on the squared error of D: the squared error of the network output."""
    rng = np.random.default_rng(0)
    x_0, eps, output = rng.normal(size=(3, 4, 8, 8, 3))
    weight = losses.weight_edm()
    for sigma in SIGMAS:
        level = level_of(sigma)
        x_t = gaussian.q_marginal(x_0, eps, level)
        predicted = gaussian.from_edm_output(x_t, output, level)
        error = weight.error_of(predicted, level) - weight.error_of(gaussian.Prediction(x_0, eps), level)
        lambda_ = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        expected = lambda_ * np.square(predicted.x_0 - x_0)
        np.testing.assert_allclose(weight.factor(level) * error**2, expected, rtol=1e-6)
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.sqrt(sigma**2 + 0.25)
        target = (x_0 - c_skip * (x_0 + sigma * eps)) / c_out
        np.testing.assert_allclose(expected, np.square(output - target), rtol=1e-6)


def run(command, *flags, cwd):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", f"ddim_jax.{command}", *flags], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_from_a_pickle_to_finetuned_weights(plain, tmp_path):
    """Sampled, converted and trained further by the commands. The licence is named, and nothing of the file runs."""
    path, network = plain
    config = ("--config", str(ROOT / "configs" / "default.py"))
    few = ("--config.sample.num_images=2", "--config.sample.batch_size=2", "--config.sample.steps=3")
    sampled = run(
        "sample",
        *config,
        f"--config.pretrained={path}",
        *few,
        "--config.sample.sampler=heun",
        "--out=out",
        cwd=tmp_path,
    )
    assert sampled.returncode == 0, sampled.stderr
    assert "CC BY-NC-SA 4.0" in sampled.stderr + sampled.stdout

    converted = run("convert", f"--from={path}", "--to=net.safetensors", cwd=tmp_path)
    assert converted.returncode == 0, converted.stderr
    expected, again = read(path)[2], read(tmp_path / "net.safetensors")[2]
    jax.tree.map(np.testing.assert_array_equal, again, expected)

    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    data = ("--config.data.name=npz", "--config.data.path=images.npz")
    train = ("num_steps=4", "batch_size=8", "log_every=2", "checkpoint_every=2", "objective.weight=edm", "warmup=0")
    trained = run(
        "train",
        *config,
        f"--config.pretrained={path}",
        *data,
        *(f"--config.train.{field}" for field in train),
        "--workdir=run",
        cwd=tmp_path,
    )
    assert trained.returncode == 0, trained.stderr
    _, module, params = read(tmp_path / "run")
    change = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), params, expected)
    assert 0 < max(jax.tree.leaves(change)) < 0.1


def test_what_diffusers_cannot_hold(pair):
    """A diffusers folder holds eps-, x_0- and v-predictions of a UNet2DModel."""
    model = dataclasses.asdict(read(pair[0])[0].model)
    words = ("model.prediction", "edm") if model["name"] == "unet" else ("model.name", model["name"])
    with raises(CheckpointError, *words):
        diffusers_export.unet_config(model)


# --- files that are not supported, hostile or damaged ---


def changed(folder, change):
    """A pickle of a network that `change` has altered."""
    network = edm_model.network_of("DDPM++")
    change(network)
    return edm_model.save(folder / "changed.pkl", network)


def attribute(name, value, module=""):
    return lambda network: setattr(network.get_submodule(module), name, value)


def argument(**values):
    return lambda network: network.model._init_kwargs.update(values)


def of_class(name):
    return lambda network: setattr(network, "__class__", type(name, (type(network),), {}))


UNSUPPORTED = {
    "sigma_data": (attribute("sigma_data", 1.0), ("ema.sigma_data", "1.0")),
    "sigma_min": (attribute("sigma_min", 0.01), ("ema.sigma_min", "0.01")),
    "sigma_max": (attribute("sigma_max", 50.0), ("ema.sigma_max", "50.0")),
    "labels": (attribute("label_dim", 3), ("ema.label_dim", "3")),
    "preconditioning": (of_class("VPPrecond"), ("VPPrecond", "EDMPrecond")),
    "an unknown argument": (argument(rotary=True), ("rotary", "supported", "model_channels")),
    "the type of an argument": (argument(num_blocks="4"), ("num_blocks", "'4'")),
    "a huge argument": (argument(model_channels=10**9), ("model_channels", "1000000000")),
    "a fraction": (argument(num_blocks=1.5), ("num_blocks", "1.5")),
    "infinity": (argument(label_dropout=math.inf), ("label_dropout", "inf")),
    "too many levels": (argument(channel_mult=[1] * 100), ("channel_mult",)),
    "other outputs": (argument(out_channels=6), ("out_channels", "6", "3")),
    "the embedding": (argument(embedding_type="learned"), ("embedding", "learned")),
    "arguments without names": (attribute("_init_args", (8,), "model"), ("ema.model", "arguments")),
    "the scale of a block": (attribute("skip_scale", 1.0, "model.enc.8x8_block0"), ("8x8_block0.skip_scale", "1.0")),
    "the heads of a block": (attribute("num_heads", 4, "model.enc.4x4_block0"), ("4x4_block0.num_heads", "4")),
    "the groups of a norm": (
        attribute("num_groups", 1, "model.enc.8x8_block0.norm0"), ("8x8_block0.norm0.num_groups", "1")
    ),
    "the filter": (argument(resample_filter=[1, 3, 3, 1]), ("resample_filter",)),
    "the shape of a weight": (
        lambda network: setattr(
            network.model.map_layer0, "weight", torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        ),
        ("map_layer0.weight", "(3, 3)"),
    ),
    "another class of module": (
        lambda network: network.model.enc.__setitem__("8x8_block0", torch.nn.Identity()), ("Identity",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named(name, tmp_path):
    change, words = UNSUPPORTED[name]
    path = changed(tmp_path, change)
    with raises((CheckpointError, ConfigError), str(path), *words):
        read(path)


def refused(path, *words):
    with pytest.raises((CheckpointError, DamagedError)) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 1500, message[:300]
    assert all(word in message for word in words), message


class Called:
    """Pickled as a call of this function with these arguments."""

    def __init__(self, function, *arguments, state=None):
        self.made = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.made


def flag(path):
    open(path, "w").close()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_of_a_pickle_runs(protocol, tmp_path):
    """Calls, states of objects, and the source code of classes: none is executed, wherever it is in the file."""
    written = tmp_path / "executed"
    network = edm_model.network_of("DDPM++")
    source = f"open({str(written)!r}, 'w')"
    for value in (
        Called(flag, str(written)),
        Called(eval, source),
        Called(os.system, f"touch {written}"),
        Called(dict, state=Called(flag, str(written))),
    ):
        path = edm_model.write(tmp_path / "net.pkl", {"ema": network, "more": value}, protocol)
        refused(path)
        path = edm_model.write(tmp_path / "net.pkl", {"ema": value}, protocol)
        refused(path)
        network.model.extra = value
        refused(edm_model.write(tmp_path / "net.pkl", {"ema": network}, protocol))
        del network.model.extra
    original, edm_model.SOURCE = edm_model.SOURCE, source
    try:
        path = edm_model.write(tmp_path / "net.pkl", {"ema": network}, protocol)
    finally:
        edm_model.SOURCE = original
    if protocol < 4:  # the published files have protocol 4; in earlier ones a set is a call
        refused(path)
    else:
        assert read(path)[2]  # the source code is not read
    assert not written.exists()


def test_a_module_that_contains_itself(tmp_path):
    network = edm_model.network_of("DDPM++")
    block = network.model.enc["8x8_block0"]
    block._modules["again"] = block
    refused(edm_model.write(tmp_path / "net.pkl", {"ema": network}), "ema.model")


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80\x04N.", b"\x80\x04}.", b"PK\x03\x04", b"not a pickle", b"\x80\x04N.N."]
)
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    (tmp_path / "net.pkl").write_bytes(content)
    refused(tmp_path / "net.pkl")


def test_a_storage_beyond_the_file(plain, tmp_path):
    """A byte string whose length is beyond the end of the file, and one that overlaps the rest of the pickle."""
    content = plain[0].read_bytes()
    place = content.index(b"B", 2000)
    for length in (1 << 31, len(content), 2**32 - 1):
        damaged = content[: place + 1] + length.to_bytes(4, "little") + content[place + 5 :]
        (tmp_path / "net.pkl").write_bytes(damaged)
        refused(tmp_path / "net.pkl")


def test_more_storages_than_a_network_has(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_STORAGES", 10)
    refused(edm_model.save(tmp_path / "net.pkl", edm_model.network_of("DDPM++")), "10 storages")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file(plain, data, tmp_path_factory):
    """Refused in one line, or read as a network of the same shapes; a pickle has no checksums."""
    content = altered(data, bytearray(plain[0].read_bytes()), WAYS, 4)
    path = tmp_path_factory.mktemp("damaged") / "net.pkl"
    path.write_bytes(content)
    try:
        edm.open_file(path)
    except (CheckpointError, DamagedError) as error:
        assert "\n" not in str(error) and str(path) in str(error)
