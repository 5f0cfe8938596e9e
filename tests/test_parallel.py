"""Parallel-in-time sampling equals sequential sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meshes
from jax.sharding import NamedSharding, PartitionSpec
from messages import raises

from ddim_jax import ode, oracle, parallel, registry, samplers, schedule, trajectory

LINEAR = schedule.linear()
MEANS, STDS = np.array([[1.0, -0.5], [-2.0, 0.3], [0.2, 2.0]]), np.array([0.3, 0.5, 0.2])
EPS_FN = oracle.mixture(LINEAR, MEANS, STDS)


def both(sampler, S=60, count=3, keys=None, **kwargs):
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, S))
    x = jax.random.normal(jax.random.key(0), (count, 2), jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
    sequential = samplers.integrate(sampler, EPS_FN, transitions, x, keys)
    return sequential, parallel.integrate(sampler, EPS_FN, transitions, x, keys, **kwargs)


@pytest.mark.parametrize("window", [0, 1, 7, 20])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_result_is_that_of_sequential_sampling(eta, window, x64):
    expected, found = both(samplers.ddim(eta), keys=jax.random.key(1) if eta else None, window=window, tolerance=1e-10)
    np.testing.assert_allclose(found.x, expected, atol=1e-7)
    assert int(found.rounds) == 60 if window == 1 else int(found.rounds) < 60


def test_fewer_rounds_for_a_larger_tolerance(x64):
    rounds, errors = [], []
    for tolerance in (1e-1, 1e-3, 1e-6, 0.0):
        expected, found = both(samplers.ddim(), 200, tolerance=tolerance)
        rounds.append(int(found.rounds))
        errors.append(float(jnp.abs(found.x - expected).max()))
    assert rounds == sorted(rounds) and rounds[1] < 40 and rounds[-1] <= 200
    assert errors[1] < 2e-2 and errors[2] < 1e-4 and errors[3] < 1e-12


@pytest.mark.parametrize("S, window", [(1, 0), (7, 3), (23, 40)])
def test_any_window_over_any_number_of_steps(S, window):
    """With the tolerance 0 it is the sequential result, in at most S rounds."""
    expected, found = both(samplers.ddim(), S, window=window, tolerance=0.0)
    np.testing.assert_allclose(found.x, expected, atol=2e-5)
    assert 1 <= int(found.rounds) <= S


@pytest.mark.parametrize("sampler", [samplers.ddpm_hat(), registry.SAMPLERS["heun"](), ode.SigmaEuler()])
def test_every_sampler_without_state(sampler):
    key = jax.random.key(1) if sampler.stochastic else None
    expected, found = both(sampler, keys=key, window=16, tolerance=1e-5)
    np.testing.assert_allclose(found.x, expected, atol=1e-3)
    assert int(found.rounds) < 60


def test_encoding_in_parallel():
    transitions = trajectory.ascend(LINEAR, trajectory.uniform(1000, 40))
    x = jnp.asarray(MEANS, jnp.float32)
    expected = samplers.integrate(samplers.ddim(), EPS_FN, transitions, x)
    found = parallel.integrate(samplers.ddim(), EPS_FN, transitions, x, tolerance=1e-5)
    np.testing.assert_allclose(found.x, expected, atol=1e-3)
    assert int(found.rounds) < 40


def test_the_window_divided_over_devices():
    mesh = meshes()[1]
    divided = NamedSharding(mesh, PartitionSpec("data"))
    expected, found = both(samplers.ddim(), window=16, tolerance=1e-4, sharding=divided)
    _, one_device = both(samplers.ddim(), window=16, tolerance=1e-4)
    np.testing.assert_allclose(found.x, one_device.x, atol=1e-5)
    np.testing.assert_allclose(found.x, expected, atol=1e-2)
    assert found.rounds == one_device.rounds


def test_errors_name_the_argument():
    five, x = trajectory.descend(LINEAR, trajectory.uniform(1000, 5)), jnp.ones((1, 2))
    with raises(ValueError, "sampler", "PLMS"):
        parallel.integrate(registry.SAMPLERS["plms"](), EPS_FN, five, x)
    with raises(ValueError, "window", "got -1"):
        parallel.integrate(samplers.ddim(), EPS_FN, five, x, window=-1)
    with raises(ValueError, "key", "DDIM"):
        parallel.integrate(samplers.ddim(1.0), EPS_FN, five, x)
