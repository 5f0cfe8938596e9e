import importlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import COMPILATIONS
from messages import raises
from tiny import UNET, random_params

from ddim_jax import config as config_lib
from ddim_jax import samplers, schedule, trajectory
from ddim_jax.models import network as network_lib
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.models.unet import Attention, Dropout, GroupNorm, UNet, depth_to_space, sinusoid, space_to_depth

CONFIGS = sorted(
    file.stem for file in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py") if file.stem != "__init__"
)


def test_the_cifar10_network_has_the_published_number_of_parameters():
    like = network_lib.param_shapes(UNet())
    assert sum(leaf.size for leaf in jax.tree.leaves(like)) == 35_746_307


@pytest.mark.slow
def test_a_patch_is_a_position():
    """Pixel (2 i + a, 2 j + b) is channel (a, b) of position (i, j). A network of patches is a network of positions."""
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    patches = np.asarray(space_to_depth(x, 2))
    assert patches.shape == (2, 4, 4, 12)
    for i, j, a, b in [(0, 0, 0, 0), (1, 3, 0, 1), (3, 2, 1, 0), (3, 3, 1, 1)]:
        np.testing.assert_array_equal(patches[:, i, j].reshape(2, 2, 2, 3)[:, a, b], x[:, 2 * i + a, 2 * j + b])
    np.testing.assert_array_equal(depth_to_space(patches, 2), x)

    of_positions = UNET.clone(image_size=4, image_channels=12)
    of_pixels = UNET.clone(image_size=8, image_channels=3, patch_size=2)
    params, time = random_params(of_positions), jnp.array([3, 40])
    of_pixels.check()
    out = of_pixels.apply({"params": params}, x, time)
    np.testing.assert_array_equal(out, depth_to_space(of_positions.apply({"params": params}, patches, time), 2))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_network(name):
    values = importlib.import_module(f"configs.{name}").get_config().to_dict()
    config = config_lib.parse(values)
    assert config.name == name
    model = config_lib.network(config.model).module
    config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    size = (2, config.model.image_size, config.model.image_size, config.model.image_channels)
    params = network_lib.param_shapes(model)
    labels = jnp.zeros(2, int) if model.num_classes else None
    apply = lambda params, x: model.apply({"params": params}, x, jnp.zeros(2), labels)
    out = jax.eval_shape(apply, params, jnp.zeros(size))
    assert out.shape == size and out.dtype == jnp.float32
    expected = {
        "cifar10": 35_746_307,
        "lsun_bedroom256": 113_673_219,
        "lsun_church256": 113_673_219,
    }  # diffusers' ddpm-*: its counts
    if name in expected:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected[name]


def test_sinusoid_is_sin_before_cos_at_ten_thousand_to_the_power(x64):
    time = np.array([0, 1, 10, 999])
    out = np.asarray(sinusoid(jnp.asarray(time, jnp.float64), 8))
    for i, power in enumerate([0, 1 / 3, 2 / 3, 1]):
        np.testing.assert_allclose(out[:, i], np.sin(time / 10000**power), atol=1e-12)
        np.testing.assert_allclose(out[:, 4 + i], np.cos(time / 10000**power), atol=1e-12)


def test_sinusoid_with_the_defaults_of_diffusers(x64):
    """cos before sin, and the lowest frequency above 1/10000."""
    time = np.array([0, 1, 10, 999])
    out = np.asarray(sinusoid(jnp.asarray(time, jnp.float64), 8, shift=0.0, cos_first=True))
    for i, power in enumerate([0, 1 / 4, 2 / 4, 3 / 4]):
        np.testing.assert_allclose(out[:, i], np.cos(time / 10000**power), atol=1e-12)
        np.testing.assert_allclose(out[:, 4 + i], np.sin(time / 10000**power), atol=1e-12)


def test_group_norm_is_flax_s():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, 12)) * 3 + 7
    reference = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False)
    params = {"params": {"scale": jnp.linspace(-1, 2, 12), "bias": jnp.linspace(3, -1, 12)}}
    np.testing.assert_allclose(GroupNorm(4, 1e-6).apply(params, x), reference.apply(params, x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999999])
def test_dropout_keeps_the_mean_and_the_rate(rate):
    x = jnp.ones((64, 16, 16, 32))
    drop = lambda seed, x=x: Dropout(rate).apply({}, x, True, rngs={"dropout": jax.random.key(seed)})
    kept, n = np.asarray(drop(0)) != 0, x.size
    assert abs((~kept).mean() - rate) < 2**-16 + 5 * (rate * (1 - rate) / n) ** 0.5
    np.testing.assert_allclose(np.asarray(drop(0))[kept], 1 / (1 - int(rate * 2**16) / 2**16), rtol=1e-6)
    # Neighbours use the two halves of one random word. They must be independent, and independent of another key.
    for other in (np.roll(kept, 1, -1), np.roll(kept, 1, 0), np.asarray(drop(1)) != 0):
        together = (~kept & ~other).mean()
        assert abs(together - rate**2) < 2**-15 + 5 * (rate**2 * (1 - rate**2) / n) ** 0.5
    np.testing.assert_array_equal(Dropout(rate).apply({}, x, False), x)


def test_attention_by_hand():
    """softmax(q k / sqrt(c)) v for each head, with loops."""
    module = Attention(groups=2, epsilon=1e-6, head_channels=4, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 8))
    params = jax.tree.map(
        lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        module.init(jax.random.key(1), x)["params"],
    )
    out = np.asarray(module.apply({"params": params}, x))
    h = np.asarray(GroupNorm(2, 1e-6).apply({"params": params["norm"]}, x)).reshape(2, 9, 8)
    q, k, v = (
        h @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"]) for name in ("query", "key", "value")
    )
    mixed = np.zeros((2, 9, 8))
    for b in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            for i in range(9):
                weights = np.exp(q[b, i, head] @ k[b, :, head].T / 2)
                mixed[b, i, head] = weights @ v[b, :, head] / weights.sum()
    expected = np.asarray(x) + (
        mixed @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
    ).reshape(x.shape)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_downsampling_pads_right_and_bottom():
    """The stride-2 convolution at (i, j) reads rows 2i .. 2i+2 and columns 2j .. 2j+2 of its input, and zeros beyond
    the end.
    """
    params = random_params(UNET)
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 1))
    _, kept = UNET.apply({"params": params}, x, jnp.zeros(1), capture_intermediates=True, mutable=["intermediates"])
    kept = kept["intermediates"]
    before, after = (
        np.asarray(kept["down_0_block_0"]["__call__"][0])[0],
        np.asarray(kept["down_0_halve"]["__call__"][0])[0],
    )
    kernel, bias = np.asarray(params["down_0_halve"]["kernel"]), np.asarray(params["down_0_halve"]["bias"])
    padded = np.zeros((9, 9, 8))
    padded[:8, :8] = before
    for i, j in [(0, 0), (1, 2), (3, 3)]:
        np.testing.assert_allclose(
            after[i, j],
            np.einsum("hwi,hwio->o", padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel) + bias,
            rtol=1e-4,
            atol=1e-4,
        )


def test_bfloat16_computes_near_float32_with_float32_parameters():
    params, x = random_params(UNET), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    exact = jax.jit(UNET.apply)({"params": params}, x, jnp.full(2, 10))
    low = UNET.clone(dtype=jnp.bfloat16)
    shapes = network_lib.param_shapes(low)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    rough = jax.jit(low.apply)({"params": params}, x, jnp.full(2, 10))
    assert rough.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(rough - exact).max() / jnp.abs(exact).max()) < 0.05


def test_classes_and_time_matter_and_are_required():
    model = UNET.clone(num_classes=3)
    params, x = random_params(model), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    apply = jax.jit(model.apply)
    run = lambda time, labels: apply({"params": params}, x, jnp.full(2, time), labels)
    assert jnp.abs(run(5, jnp.asarray([0, 1])) - run(5, jnp.asarray([0, 2]))).max(axis=(1, 2, 3))[0] == 0
    assert jnp.abs(run(5, jnp.asarray([0, 1])) - run(5, jnp.asarray([0, 2]))).max(axis=(1, 2, 3))[1] > 1e-3
    assert jnp.abs(run(5, jnp.asarray([0, 1])) - run(500, jnp.asarray([0, 1]))).max() > 1e-3
    with raises(ValueError, "num_classes", "3"):
        run(5, None)
    with raises(ValueError, "num_classes", "0"):
        UNET.apply({"params": random_params(UNET)}, x, jnp.zeros(2), jnp.asarray([0, 1]))


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(image_size=10, channel_mult=(1, 2, 2)), ("image_size", "10", "2")),
        (dict(image_size=2, channel_mult=(1, 1, 1)), ("image_size", "2", "4")),
        (dict(image_size=8, patch_size=4, channel_mult=(1, 1, 1)), ("image_size", "8", "16")),
        (dict(attention_resolutions=(5,)), ("attention_resolutions", "5", "[8, 4]")),
        (dict(groups=3), ("groups", "3", "8")),
        (dict(head_channels=5), ("head_channels", "5", "16")),
        (dict(frequency_shift=4.0), ("frequency_shift", "channels", "8", "4.0")),
        (dict(channels=7, groups=7), ("channels", "7")),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    UNET.check()
    with raises(ValueError, *words):
        UNET.clone(**sizes).check()


def test_the_denoiser_counts_time_from_zero():
    """Level t is timestep t - 1. At level 0, where encoding starts, the network is evaluated as at level 1."""

    class Echo(nn.Module):
        def __call__(self, x, time, labels=None, train=False):
            return jnp.broadcast_to(time.astype(jnp.float32)[:, None], x.shape)

    table, x = schedule.levels(schedule.linear()), jnp.zeros((3, 2))
    eps = lambda t: Denoiser(Echo(), {})(x, schedule.level_at(table, t, x)).eps
    assert eps(jnp.asarray([1, 500, 1000]))[:, 0].tolist() == [0, 499, 999]
    assert eps(0)[0, 0] == 0 and eps(1000)[0, 0] == 999


def test_a_network_of_the_same_shape_compiles_nothing_new():
    transitions = trajectory.descend(schedule.linear(), [0, 10, 1000])
    x = jnp.ones((2, 8, 8, 1))

    def integrate(model, seed):
        params = random_params(model, seed)
        del COMPILATIONS[:]
        return samplers.integrate(samplers.ddim(), Denoiser(model, params), transitions, x), len(COMPILATIONS)

    first, _ = integrate(UNET.clone(), 0)
    second, compilations = integrate(UNET.clone(), 1)
    assert np.abs(second - first).max() > 0 and compilations == 0
    assert integrate(UNET.clone(dtype=jnp.bfloat16), 0)[1] > 0  # another network is compiled
