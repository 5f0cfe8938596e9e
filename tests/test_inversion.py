"""Exact DDIM inversion: an implicit step, solved by fixed-point iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meshes
from messages import raises

from configs import digits
from ddim_jax import config as config_lib
from ddim_jax import data, inversion, oracle, samplers, sampling, schedule, trajectory
from ddim_jax.config import weights
from ddim_jax.data.scaling import to_unit

LINEAR = schedule.linear()


def reconstruction_error(eps_fn, tau, x_0, x_T):
    """The root mean square error of decoding."""
    decoded = samplers.integrate(samplers.ddim(), eps_fn, trajectory.descend(LINEAR, tau), x_T)
    return float(jnp.sqrt(jnp.mean((decoded - x_0) ** 2)))


@pytest.mark.parametrize("data_", ["gaussian", "mixture"])
def test_decoding_returns_what_was_encoded(data_, x64):
    """With the exact eps, to float64 precision. The error of the explicit step is above 1e-3."""
    means, stds = np.array([[1.0, -0.5], [-2.0, 0.3]]), np.array([0.3, 0.5])
    eps_fn = oracle.gaussian(LINEAR, 0.3, 0.5) if data_ == "gaussian" else oracle.mixture(LINEAR, means, stds)
    x_0 = jax.random.normal(jax.random.key(0), (6, 2), jnp.float64)
    tau = trajectory.uniform(1000, 20)
    found = inversion.invert(eps_fn, LINEAR, tau, x_0, refine=40)
    assert found.residual.shape == (6,) and float(found.residual.max()) < 1e-11
    assert reconstruction_error(eps_fn, tau, x_0, found.x_T) < 1e-9
    assert reconstruction_error(eps_fn, tau, x_0, samplers.invert(eps_fn, LINEAR, tau, x_0)) > 1e-3


def test_the_residual_is_that_of_the_implicit_equation(x64):
    """For a tau of one step. More iterations reduce it."""
    eps_fn, x_0 = oracle.gaussian(LINEAR, 0.3, 0.5), jnp.array([[1.3], [-0.4]])
    alpha_bar = LINEAR.alpha_bar[300]
    noise = np.sqrt((1 - alpha_bar) / alpha_bar)
    residuals = []
    for refine in (1, 2, 3):
        found = inversion.invert(eps_fn, LINEAR, [0, 300], x_0, refine)
        equation = np.sqrt(alpha_bar) * (x_0 + noise * eps_fn(found.x_T, jnp.int32(300)))
        np.testing.assert_allclose(found.residual, np.abs(equation - found.x_T)[:, 0], atol=1e-14)
        residuals.append(float(found.residual.max()))
    assert residuals[0] > residuals[1] > 100 * residuals[2]  # it is linear: two differences solve it


def test_a_function_without_a_fixed_point_keeps_the_best_iterate():
    """The residual of `x + 1` is 1 everywhere, that of `x^2 + 1` at least 3/4. It is never above that of the start. A
    fixed point from which plain iteration diverges is found, for each image separately.
    """
    x, residual = inversion.fixed_point(lambda x: x + 1, jnp.zeros((2, 3)), 10)
    np.testing.assert_allclose(residual, 1)
    start = jnp.array([[0.0], [3.0]])
    x, residual = inversion.fixed_point(lambda x: x**2 + 1, start, 30)
    np.testing.assert_allclose(residual, np.abs(x**2 + 1 - x)[:, 0], rtol=1e-6)
    assert (residual <= np.abs(start**2 + 1 - start)[:, 0]).all() and residual[1] < 1
    x, residual = inversion.fixed_point(lambda x: -5 * x + 6, jnp.array([[0.0], [3.0]]), 4)  # plain iteration diverges
    np.testing.assert_allclose(x, 1, atol=1e-4)


@pytest.mark.slow
def test_implicit_steps_reconstruct_the_digits_a_thousand_times_better():
    """The mean square error of the trained network at S = 20, against that of explicit steps."""
    config = config_lib.parse(digits.get_config().to_dict())
    mesh = meshes()[0]
    eps_fn = sampling.conditioned(config_lib.pipeline(config, weights.find(config, None, mesh).params, None))
    x_0 = jnp.asarray(to_unit(data.load("digits", split="test")[np.arange(24)].images))
    tau = trajectory.uniform(1000, 20)
    explicit = reconstruction_error(eps_fn, tau, x_0, samplers.invert(eps_fn, LINEAR, tau, x_0))
    x_T = inversion.invert(eps_fn, LINEAR, tau, x_0, refine=20).x_T
    assert explicit**2 > 1000 * reconstruction_error(eps_fn, tau, x_0, x_T) ** 2


def test_errors_name_the_argument():
    with raises(ValueError, "refine", "got 0"):
        inversion.invert(lambda x, t: x, LINEAR, trajectory.uniform(1000, 5), jnp.ones((1, 2)), refine=0)
    with raises(ValueError, "transitions", "ascend"):
        samplers.integrate(
            inversion.Implicit(3),
            lambda x, t: x,
            trajectory.descend(LINEAR, trajectory.uniform(1000, 5)),
            jnp.ones((1, 2)),
        )
