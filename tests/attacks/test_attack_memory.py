"""The memory check raises an error for a network or a batch that cannot fit, before any allocation."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from attacking import holds, refused, refuses
from conftest import meshes
from processes import run
from tiny import make, params_of

from ddim_jax import config as config_lib
from ddim_jax import samplers, sampling
from ddim_jax.training import memory
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError

SLOW = pytest.mark.slow


def with_fields(config, **sections):
    """The config with fields of its sections replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def check_sampling(config, mesh):
    sample = config.sample
    return memory.check_sampling(config_lib.network(config.model), mesh, min(sample.batch_size, sample.num_images))


def check_training(config, mesh):
    recipe = config_lib.recipe(config)
    return memory.check_training(recipe.network, recipe.optimizer, mesh, recipe.batch_size, recipe.accumulate)


@hypothesis.given(st.integers(10**9, 10**30), st.sampled_from([0, 1]), st.booleans())
@hypothesis.settings(max_examples=20)
def test_a_batch_larger_than_any_memory(batch, mesh, training):
    config, _ = make()
    if training:
        config = with_fields(config, train=dict(batch_size=batch))
        call = lambda: check_training(config, meshes()[mesh])
        refuses(call, "config.train.batch_size", errors=(ConfigError,))
    else:
        config = with_fields(config, sample=dict(batch_size=batch, num_images=batch))
        call = lambda: check_sampling(config, meshes()[mesh])
        refuses(call, "config.sample.batch_size", memory.SWITCH, errors=(ConfigError,))


@pytest.mark.parametrize("channels", [2**17, 2**24])
def test_a_network_larger_than_any_memory(channels, monkeypatch):
    config, _ = make(channels=channels)
    for check in (
        lambda: check_sampling(config, meshes()[0]),
        lambda: check_training(config, meshes()[0]),
    ):
        refuses(check, "config.model", memory.SWITCH, errors=(ConfigError,))
        with monkeypatch.context() as patch:
            patch.setenv(memory.SWITCH, "1")
            holds(check() is None)


def test_a_batch_is_not_larger_than_the_number_of_images():
    config, _ = make()
    config = with_fields(config, sample=dict(batch_size=10**12, num_images=10))
    holds(check_sampling(config, meshes()[0]) is None)


@pytest.mark.parametrize("batch, channels", [(8, 8), pytest.param(64, 8, marks=SLOW), pytest.param(16, 32, marks=SLOW)])
def test_the_estimate_of_sampling_is_a_lower_bound(batch, channels, monkeypatch):
    """Compared with the memory analysis of the compiled program."""
    config, process = make(eta=0.0, num_images=batch, batch_size=batch, channels=channels)
    mesh, params = meshes()[0], params_of(config)
    pipeline = config_lib.pipeline(config, params, mesh, process)
    keys, x = sampling.start(pipeline, sharding.split_batch(mesh, jax.numpy.arange(batch)))
    integrate = jax.jit(lambda model, x: samplers.integrate(process.sampler, model, process.transitions, x))
    needed = integrate.lower(sampling.conditioned(pipeline), x).compile().memory_analysis()
    total = needed.argument_size_in_bytes + needed.output_size_in_bytes + needed.temp_size_in_bytes
    monkeypatch.setattr(memory, "available", lambda mesh: total)
    holds(check_sampling(config, mesh) is None)
    monkeypatch.setattr(memory, "available", lambda mesh: total // 10)
    refuses(lambda: check_sampling(config, mesh), "config.", memory.SWITCH, errors=(ConfigError,))


def test_devices_of_unknown_memory(monkeypatch):
    config, _ = make()
    config = with_fields(config, sample=dict(batch_size=10**12, num_images=10**12))
    monkeypatch.setattr(memory, "available", lambda mesh: None)
    holds(check_sampling(config, meshes()[0]) is None)


def test_the_commands_check_the_memory_first(tmp_path):
    out, digits = tmp_path / "out", ("--config", "configs/digits.py")
    large = ("--config.sample.num_images=2000000000", "--config.sample.batch_size=2000000000")
    refused(run("ddim_jax.sample", *digits, *large, "--out", out), "config.sample.batch_size")
    process = run("ddim_jax.train", *digits, "--config.train.batch_size=2000000000", "--workdir", out)
    refused(process, "config.train.batch_size")
    holds(not out.exists(), "the folder was created")
