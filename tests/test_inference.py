"""The chain of q_sigma in both directions: the same joint distribution, and Eq. (4) at every level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import raises

from ddim_jax import inference_process, schedule, trajectory

LINEAR = schedule.linear()
COUNT = 40_000


def chains(tau, eta, x_0=0.7):
    """Samples of all levels given x_0, backward and forward: (2, S, COUNT)."""
    x = jnp.full((COUNT, 1), x_0)
    drawn = (
        walk(LINEAR, tau, x, jax.random.key(5), eta) for walk in (inference_process.backward, inference_process.forward)
    )
    return np.stack([np.asarray(path[..., 0]) for path in drawn])


@settings(max_examples=6)
@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=4, unique=True).map(sorted),
    st.sampled_from([0.3, 0.8, 1.0]),
)
def test_both_directions_have_the_same_joint_distribution(levels, eta):
    """The correlations of all levels are equal. The means and variances are those of Eq. (4)."""
    paths = chains(np.array([0, *levels]), eta)
    alpha_bar = LINEAR.alpha_bar[levels[::-1]]
    tolerance = 5 * np.sqrt(2 / COUNT)
    for path in paths:
        scaled = (path - np.sqrt(alpha_bar)[:, None] * 0.7) / np.sqrt(1 - alpha_bar)[:, None]
        np.testing.assert_allclose(scaled.mean(1), 0, atol=tolerance)
        np.testing.assert_allclose(scaled.var(1), 1, atol=tolerance)
    np.testing.assert_allclose(*(np.corrcoef(path) for path in paths), atol=2 * tolerance)


def test_eta_0_is_one_eps_and_eta_1_is_markov():
    """At eta 0 all levels have the same eps. At eta 1 it is a Markov chain: q(x_t | x_s) does not depend on x_0."""
    tau = trajectory.uniform(1000, 4)
    alpha_bar = LINEAR.alpha_bar[tau[:0:-1]]
    for path in chains(tau, 0.0):
        eps = (path - np.sqrt(alpha_bar)[:, None] * 0.7) / np.sqrt(1 - alpha_bar)[:, None]
        np.testing.assert_allclose(eps, eps[:1].repeat(4, 0), atol=2e-2)
    for path in chains(tau, 1.0):
        for x_t, x_s, ab_t, ab_s in zip(path[:-1], path[1:], alpha_bar[:-1], alpha_bar[1:], strict=True):
            fresh = (x_t - np.sqrt(ab_t / ab_s) * x_s) / np.sqrt(1 - ab_t / ab_s)
            assert fresh.mean() == pytest.approx(0, abs=0.03) and fresh.std() == pytest.approx(1, abs=0.03)
            assert np.corrcoef(fresh, x_s)[0, 1] == pytest.approx(0, abs=0.03)


def test_an_eta_beyond_its_range_is_refused():
    for walk in (inference_process.backward, inference_process.forward):
        with raises(ValueError, "eta", "got 50.0"):
            walk(LINEAR, trajectory.uniform(1000, 10), jnp.zeros((2, 1)), jax.random.key(0), 50.0)
