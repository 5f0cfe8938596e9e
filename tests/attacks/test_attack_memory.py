"""A network or a batch that cannot fit into memory is refused before any of it is made; what fits never is."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import pytest
from attacking import holds, refused, refuses
from conftest import meshes
from processes import run
from test_generate import make, params_of

from ddim_jax import generate, memory, sharding, train
from ddim_jax.errors import ConfigError

SLOW = pytest.mark.slow


def with_fields(config, **sections):
    """The config with fields of its sections replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


@hypothesis.given(st.integers(10**9, 10**30), st.sampled_from([0, 1]), st.booleans())
@hypothesis.settings(max_examples=20)
def test_a_batch_that_no_machine_holds(batch, mesh, training):
    config, _ = make()
    if training:
        config = with_fields(config, train=dict(batch_size=batch))
        refuses(lambda: train.check_memory(config, meshes()[mesh]), "config.train.batch_size", errors=(ConfigError,))
    else:
        config = with_fields(config, sample=dict(batch_size=batch, num_images=batch))
        call = lambda: memory.check_sampling(config, meshes()[mesh], config.sample.num_images)
        refuses(call, "config.sample.batch_size", memory.SWITCH, errors=(ConfigError,))


@pytest.mark.parametrize("channels", [2**17, 2**24])
def test_a_network_that_no_machine_holds(channels, monkeypatch):
    config, _ = make(channels=channels)
    for check in (
        lambda: memory.check_sampling(config, meshes()[0], 1),
        lambda: train.check_memory(config, meshes()[0]),
    ):
        refuses(check, "config.model", memory.SWITCH, errors=(ConfigError,))
        with monkeypatch.context() as patch:
            patch.setenv(memory.SWITCH, "1")
            holds(check() is None)


def test_a_batch_larger_than_what_is_drawn_is_as_large_as_that():
    config, _ = make()
    config = with_fields(config, sample=dict(batch_size=10**12, num_images=10))
    holds(memory.check_sampling(config, meshes()[0], 10) is None)


@pytest.mark.parametrize("batch, channels", [(8, 8), pytest.param(64, 8, marks=SLOW), pytest.param(16, 32, marks=SLOW)])
def test_what_fits_is_never_refused(batch, channels, monkeypatch):
    """The estimate stays below what the compiled program of sampling needs, as the compiler says."""
    config, process = make(eta=0.0, num_images=batch, batch_size=batch, channels=channels)
    mesh, params = meshes()[0], params_of(config)
    keys, x = generate.start(config, sharding.split_batch(mesh, jax.numpy.arange(batch)))
    transitions = jax.tree.map(jax.numpy.asarray, process.transitions)
    lowered = generate.samplers._scan.lower(
        process.sampler, generate.denoiser(config, params), transitions, x, None, keep=False
    )
    needed = lowered.compile().memory_analysis()
    total = needed.argument_size_in_bytes + needed.output_size_in_bytes + needed.temp_size_in_bytes
    monkeypatch.setattr(memory, "available", lambda mesh: total)
    holds(memory.check_sampling(config, mesh, batch) is None)
    monkeypatch.setattr(memory, "available", lambda mesh: total // 10)
    refuses(lambda: memory.check_sampling(config, mesh, batch), "need at least", errors=(ConfigError,))


def test_devices_that_do_not_say(monkeypatch):
    config, _ = make()
    config = with_fields(config, sample=dict(batch_size=10**12, num_images=10**12))
    monkeypatch.setattr(memory, "available", lambda mesh: None)
    holds(memory.check_sampling(config, meshes()[0], 10**12) is None)


def test_the_commands_refuse_before_they_begin(tmp_path):
    out, digits = tmp_path / "out", ("--config", "configs/digits.py")
    large = ("--config.sample.num_images=2000000000", "--config.sample.batch_size=2000000000")
    refused(run("ddim_jax.sample", *digits, *large, "--out", out), "config.sample.batch_size")
    process = run("ddim_jax.train", *digits, "--config.train.batch_size=2000000000", "--workdir", out)
    refused(process, "config.train.batch_size")
    holds(not out.exists(), "the folder was made")
