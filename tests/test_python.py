"""Training, sampling and evaluation from Python, without a config."""

import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import meshes
from flax import nnx
from messages import raises

import ddim_jax as dj
from ddim_jax import data, evaluation, samplers, sampling, schedule, training
from ddim_jax.models.network import Functions, make
from ddim_jax.training import objectives
from ddim_jax.utils.errors import CheckpointError

LINEAR = schedule.linear(100, 1e-3, 0.2)  # alpha_bar[T] is 2e-5


def test_the_package_has_names_and_a_version():
    for name in dj.__all__:
        assert getattr(dj, name) is not None, name
    assert dj.__version__.count(".") >= 1 and set(dj.__all__) <= set(dir(dj))
    assert (pathlib.Path(dj.__file__).parent / "py.typed").exists()
    with raises(AttributeError, "'smaple'"):
        dj.smaple  # noqa: B018


def test_importing_the_package_imports_no_library():
    code = "import sys, ddim_jax; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(dj.__file__).parents[1])


# --- points in the plane, with networks of any library ---

MEAN, STD = np.array([1.0, -0.5]), np.array([0.3, 0.8])
POINTS = (MEAN + STD * np.random.default_rng(0).normal(size=(4000, 2))).astype(np.float32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, time, labels=None, train=False):
        h = jnp.concatenate([x, time[:, None] / 100, jnp.sin(time[:, None] / 10)], axis=1)
        for _ in range(2):
            h = nn.silu(nn.Dense(32)(h))
        return nn.Dense(2)(h)


class NNX(nnx.Module):
    def __init__(self, width: int = 32, *, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)
        self.middle, self.dropout = nnx.Linear(width, width, rngs=rngs), nnx.Dropout(0.01, rngs=rngs)

    def __call__(self, x, time):
        h = jnp.concatenate([x, time[:, None] / 100, jnp.sin(time[:, None] / 10)], axis=1)
        return self.last(nnx.silu(self.middle(self.dropout(nnx.silu(self.first(h))))))


def functions():
    def init(key):
        sizes = (4, 32), (32, 32), (32, 2)
        keys = jax.random.split(key, 3)
        return [jax.random.normal(k, size) / np.sqrt(size[0]) for k, size in zip(keys, sizes, strict=True)]

    def apply(params, x, time, labels, train, rngs):
        h = jnp.concatenate([x, time[:, None] / 100, jnp.sin(time[:, None] / 10)], axis=1)
        for weights in params[:-1]:
            h = jax.nn.silu(h @ weights)
        return h @ params[-1]

    return init, apply


NETWORKS = {
    "Linen": lambda: make(Linen, {}, (2,), 0),
    "NNX": lambda: make(NNX, {"width": 32}, (2,), 0),
    "functions": lambda: Functions((2,), 0, *functions()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_any_library_learns_points(name):
    """The samples have the mean and the deviation of the data."""
    network = NETWORKS[name]()
    objective = objectives.noise_prediction(network, LINEAR)
    fitted = training.fit(
        *(network, objective, optax.adam(3e-3), POINTS),
        **dict(num_steps=1500, batch_size=128, ema_decay=0.99, mesh=meshes()[0], progress=False),
    )
    assert fitted.losses[-100:].mean() < 0.75 * fitted.losses[:20].mean()
    model = dj.Denoiser(network, fitted.ema_params)
    x_0 = sampling.sample(model, LINEAR, (2,), 2000, steps=50, batch_size=2000)
    np.testing.assert_allclose(x_0.mean(0), MEAN, atol=0.15)
    np.testing.assert_allclose(x_0.std(0), STD, atol=0.15)


def test_dropout_of_nnx_acts_in_training_only():
    network = NETWORKS["NNX"]()
    params, x, time = network.init(jax.random.key(0)), jnp.ones((8, 2)), jnp.arange(8)
    call = lambda train, key: network.apply(params, x, time, None, train, {"dropout": jax.random.key(key)})
    np.testing.assert_array_equal(call(False, 1), call(False, 2))
    assert jnp.abs(call(True, 1) - call(True, 2)).max() > 0
    np.testing.assert_array_equal(call(True, 1), call(True, 1))


def test_fit_resumes_exactly(tmp_path):
    network = NETWORKS["functions"]()
    defaults = dict(batch_size=32, workdir=tmp_path / "run", checkpoint_every=20, mesh=meshes()[0], progress=False)
    run = lambda **options: training.fit(
        network, objectives.noise_prediction(network, LINEAR), optax.adam(1e-3), POINTS, **(defaults | options)
    )
    run(num_steps=20)
    resumed = run(num_steps=50)
    whole = run(num_steps=50, workdir=None)
    assert len(resumed.losses) == 30 and len(whole.losses) == 50
    jax.tree.map(np.testing.assert_array_equal, (resumed.params, resumed.ema_params), (whole.params, whole.ema_params))
    for options in ({"seed": 1}, {"batch_size": 64}):
        with raises(CheckpointError, str(tmp_path / "run"), *options):
            run(num_steps=60, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(num_steps=0), ("num_steps", "got 0")),
        (dict(batch_size=12), ("batch_size", "8", "got 12")),
        (dict(source=np.zeros((10, 3), np.float32)), ("source", "(2,)", "(3,)")),
    ],
)
def test_an_error_names_the_argument(options, words):
    network = NETWORKS["functions"]()
    arguments = dict(source=POINTS, num_steps=1, batch_size=16) | options
    with raises(ValueError, *words):
        training.fit(network, objectives.noise_prediction(network, LINEAR), optax.adam(1e-3), **arguments)


# --- trained networks ---


def test_a_shipped_network_is_sampled_and_evaluated():
    network = dj.load("digits")
    assert network.shape == (8, 8, 1) and network.num_classes == 0 and not network.clips
    x_0 = sampling.sample(network.denoiser, network.schedule, network.shape, 360, steps=10, batch_size=360)
    drawn = np.round(np.clip((x_0 + 1) * 127.5, 0, 255)).astype(np.uint8)
    real = data.load("digits", split="train")
    found = evaluation.evaluate(drawn, real, features="digits", metrics=("fid", "confidence"), batch_size=200)
    noise = np.random.default_rng(0).integers(0, 256, drawn.shape, np.uint8)
    assert found["fid"] < 0.2 * evaluation.evaluate(noise, real, features="digits", batch_size=200)["fid"]
    fewer = sampling.sample(network.denoiser, network.schedule, network.shape, 10, steps=10, batch_size=3)
    np.testing.assert_allclose(fewer, x_0[:10], atol=1e-4)


def test_classes_are_labels():
    network = dj.load("digits_conditional")
    labels = np.repeat([3, 8], 4)
    x_0 = sampling.sample(network.denoiser, network.schedule, network.shape, 8, steps=5, labels=labels)
    same = sampling.sample(network.denoiser, network.schedule, network.shape, 8, steps=5, labels=labels, batch_size=3)
    np.testing.assert_allclose(x_0, same, atol=1e-4)
    other = sampling.sample(network.denoiser, network.schedule, network.shape, 8, steps=5, labels=labels[::-1])
    assert np.abs(x_0 - other).max() > 0.1


def test_a_missing_checkpoint_is_named():
    with raises(CheckpointError, "/no/such/place"):
        dj.load("/no/such/place")


def test_a_sampler_and_custom_timesteps():
    """The result is that of `integrate`."""
    network = dj.load("digits")
    tau = [0, 10, 200, 999]
    x_0 = sampling.sample(network.denoiser, network.schedule, network.shape, 4, sampler=dj.ddpm(), tau=tau, seed=3)
    keys = samplers.image_keys(jax.random.key(3), jnp.arange(4))
    x_T = samplers.initial_noise(keys, network.shape)
    steps = dj.trajectory.descend(network.schedule, tau)
    np.testing.assert_allclose(x_0, dj.integrate(dj.ddpm(), network.denoiser, steps, x_T, keys), atol=1e-5)
