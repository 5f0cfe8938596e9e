"""Section 4.3: DDIM as Euler in sigma_bar, the probability-flow ODE, and likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from messages import raises

from ddim_jax import ode, oracle, samplers, schedule, trajectory
from ddim_jax.models import convolution

LINEAR = schedule.linear()


@pytest.mark.parametrize("S", [1, 7, 100])
def test_ddim_is_euler_in_sigma_bar(S, x64):
    eps_fn = lambda x, t: jnp.sin(3 * x) + 0.1 * jnp.cos(0.01 * t) * x
    x, transitions = (
        jax.random.normal(jax.random.key(0), (5, 4)),
        trajectory.descend(LINEAR, trajectory.uniform(1000, S)),
    )
    ddim, euler = (samplers.integrate(one, eps_fn, transitions, x) for one in (samplers.ddim(), ode.SigmaEuler()))
    np.testing.assert_allclose(ddim, euler, rtol=1e-12, atol=1e-12)


# The standard deviation of samples for data N(0, 0.5^2), T = 1000, uniform tau. A step is linear in x, so the standard
# deviation is the product of the slopes. Computed in float64 with NumPy from the equations, independently of this code.
STDS = {"ddim": (0.370, 0.431, 0.471, 0.485, 0.498), "flow": (2.885, 1.272, 0.732, 0.605, 0.510)}


@pytest.mark.parametrize("name", STDS)
def test_steps_in_t_need_many_more(name, x64):
    sampler = samplers.ddim() if name == "ddim" else ode.FlowEuler()
    eps_fn = oracle.gaussian(LINEAR, 0.0, 0.5)
    for S, expected in zip((10, 20, 50, 100, 1000), STDS[name], strict=True):
        transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, S))
        slope = samplers.integrate(sampler, eps_fn, transitions, jnp.ones((1, 1)))
        assert abs(float(slope[0, 0])) == pytest.approx(expected, abs=6e-4)


def test_the_flow_has_no_step_from_level_0():
    with raises(ValueError, "transitions", "0"):
        transitions = trajectory.ascend(LINEAR, trajectory.uniform(1000, 5))
        samplers.integrate(ode.FlowEuler(), lambda x, t: x, transitions, jnp.ones((1, 1)))


def normal(x, mean, std):
    return (-((x - mean) ** 2) / (2 * std**2) - np.log(2 * np.pi * std**2) / 2).sum(1)


def test_the_likelihood_of_gaussian_data(x64):
    """Against the density of the data, and more precisely against that of the exact flow from N(0, I)."""
    mean, std = np.array([0.3, -1.0, 0.1]), np.array([0.5, 0.2, 1.5])
    x_0 = jnp.asarray(mean + std * np.random.default_rng(0).normal(size=(5, 3)))
    found = ode.log_likelihood(oracle.gaussian(LINEAR, mean, std), LINEAR, trajectory.uniform(1000, 1000), x_0)
    np.testing.assert_allclose(found, normal(np.asarray(x_0), mean, std), atol=0.05)
    alpha_bar = LINEAR.alpha_bar[1000]  # the flow is affine: x_0 = mean + std (x_T - sqrt(ab) mean) / scale
    scale = np.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
    flow = normal(np.asarray(x_0), mean - std * np.sqrt(alpha_bar) * mean / scale, std / scale)
    np.testing.assert_allclose(found, flow, atol=0.01)


def test_the_trace_estimate_is_unbiased():
    x_0 = jnp.tile(jnp.array([[0.4, -0.3]]), (3000, 1))
    args = oracle.gaussian(LINEAR, 0.3, 0.5), LINEAR, trajectory.uniform(1000, 50)
    exact, drawn = ode.log_likelihood(*args, x_0[:1]), ode.log_likelihood(*args, x_0, jax.random.key(0))
    assert drawn.shape == (3000,) and float(drawn.std()) > 0.05
    assert float(drawn.mean()) == pytest.approx(float(exact[0]), abs=5 * float(drawn.std()) / np.sqrt(3000))


def test_the_likelihood_of_a_network_without_forward_mode_derivatives():
    """Winograd's form of a wide convolution defines a VJP, and no JVP."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 128, 128)) / 100
    x_0 = jax.random.normal(jax.random.key(1), (4, 16, 16, 128))
    of = lambda form: Partial(lambda kernel, x, t: form(x, kernel), kernel)
    winograd, direct = (
        ode.log_likelihood(of(form), schedule.linear(), [0, 500, 1000], x_0, jax.random.key(2))
        for form in (convolution.winograd, convolution.direct)
    )
    np.testing.assert_allclose(winograd, direct, rtol=1e-4)
