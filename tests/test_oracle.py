import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import raises
from scipy import stats
from scipy.special import logsumexp

from ddim_jax import oracle, schedule

LINEAR = schedule.linear(100, 1e-3, 0.1)
MEANS = np.array([[1.0, -0.5], [-2.0, 0.3], [0.2, 2.0]])
STDS = np.array([0.3, 0.7, 0.1])
WEIGHTS = np.array([1.0, 2.0, 0.5])


def log_density(x, t):
    """log q(x_t = x) of the mixture, by scipy."""
    alpha_bar = LINEAR.alpha_bar[t]
    terms = [
        np.log(w / WEIGHTS.sum())
        + stats.multivariate_normal(np.sqrt(alpha_bar) * m, alpha_bar * s**2 + 1 - alpha_bar).logpdf(x)
        for m, s, w in zip(MEANS, STDS, WEIGHTS, strict=True)
    ]
    return logsumexp(terms, axis=0)


@pytest.mark.parametrize("t", [1, 30, 100])
def test_mixture_is_the_score(t, x64):
    """eps = -sqrt(1 - alpha_bar) grad log q, the gradient by central differences."""
    x = np.random.default_rng(0).normal(size=(20, 2))
    h = 1e-5
    gradient = np.stack([(log_density(x + h * e, t) - log_density(x - h * e, t)) / (2 * h) for e in np.eye(2)], axis=1)
    eps = oracle.mixture(LINEAR, MEANS, STDS, WEIGHTS)(jnp.asarray(x), t)
    np.testing.assert_allclose(eps, -np.sqrt(1 - LINEAR.alpha_bar[t]) * gradient, rtol=1e-5, atol=1e-6)


def test_gaussian_is_a_mixture_of_one(x64):
    x, t = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3))), jnp.asarray([1, 2, 50, 99, 100])
    mean = np.array([0.3, -1.0, 2.0])
    np.testing.assert_allclose(
        oracle.gaussian(LINEAR, mean, 0.4)(x, t), oracle.mixture(LINEAR, mean[None], np.array([0.4]))(x, t), rtol=1e-12
    )


def test_finite_is_the_conditional_mean_of_eps(x64):
    """E[eps | x_t = x] over the data, each point's eps being (x - sqrt(ab) x_0) / sqrt(1 - ab), weighted by its
    likelihood.
    """
    data = np.random.default_rng(1).normal(size=(6, 2, 2))
    x, t = np.random.default_rng(2).normal(size=(3, 2, 2)), 40
    alpha_bar = LINEAR.alpha_bar[t]
    eps = (x[:, None] - np.sqrt(alpha_bar) * data[None]) / np.sqrt(1 - alpha_bar)
    likelihood = np.exp(stats.norm.logpdf(eps).sum((2, 3)))
    expected = (likelihood[..., None, None] * eps).sum(1) / likelihood.sum(1)[:, None, None]
    np.testing.assert_allclose(oracle.finite(LINEAR, data)(jnp.asarray(x), t), expected, rtol=1e-10)


def test_t_may_differ_along_the_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    for eps_fn in (
        oracle.mixture(LINEAR, MEANS, STDS),
        oracle.finite(LINEAR, MEANS),
        oracle.gaussian(LINEAR, 0.3, 0.5),
    ):
        together = jax.jit(lambda f, x, t: f(x, t))(eps_fn, x, jnp.asarray([1, 50, 100]))
        for i, t in enumerate([1, 50, 100]):
            np.testing.assert_allclose(together[i], eps_fn(x[i : i + 1], t)[0], rtol=2e-5, atol=1e-5)


def test_shapes_that_disagree_are_refused():
    with raises(ValueError, "means", "stds"):
        oracle.mixture(LINEAR, MEANS, STDS[:2])
