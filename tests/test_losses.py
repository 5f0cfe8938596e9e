import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import raises

from ddim_jax import gaussian, losses, oracle, schedule, trajectory

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)


@pytest.mark.parametrize("t", [1, 100, 700])
def test_the_oracle_has_the_smallest_loss(t):
    """For data N(m, s^2) the smallest loss is the variance of eps given x_t, ab s^2 / (ab s^2 + 1 - ab)."""
    count, mean, std = 400_000, 0.3, 0.5
    rng = np.random.default_rng(0)
    x_0, eps = (jnp.asarray(rng.normal(*law, (count, 1)), jnp.float32) for law in ((mean, std), (0, 1)))
    alpha_bar = LINEAR.alpha_bar[t]
    floor = alpha_bar * std**2 / (alpha_bar * std**2 + 1 - alpha_bar)
    loss = lambda eps_fn: np.asarray(losses.l_gamma(eps_fn, TABLE, x_0, jnp.full(count, t), eps))
    best = loss(oracle.gaussian(LINEAR, mean, std))
    assert best.shape == (count,)
    assert best.mean() == pytest.approx(floor, abs=5 * best.std() / np.sqrt(count))
    assert loss(oracle.gaussian(LINEAR, mean, 1.3 * std)).mean() > best.mean()


def test_gamma_turns_the_error_of_eps_into_the_error_of_x0_and_v(x64):
    """For a network of a known error."""
    key = jax.random.key(0)
    x_0, eps, wrong = (jax.random.normal(k, (5, 4), jnp.float64) for k in jax.random.split(key, 3))
    t = jnp.asarray([1, 10, 100, 500, 1000])
    level = schedule.level_at(TABLE, t, x_0)
    x_t = gaussian.q_marginal(x_0, eps, level)
    x_0_wrong = gaussian.predict_x0(x_t, wrong, level)
    expected = {
        "one": wrong - eps,
        "x0": x_0_wrong - x_0,
        "v": gaussian.predict_v(x_0_wrong, wrong, level) - gaussian.predict_v(x_0, eps, level),
    }
    for gamma, error in expected.items():
        np.testing.assert_allclose(
            losses.l_gamma(lambda x, t: wrong, TABLE, x_0, t, eps, gamma), (error**2).mean(1), rtol=1e-9
        )


def test_the_network_is_evaluated_at_x_t():
    """Eq. (4) at the level of each image."""
    seen = {}
    x_0, eps, t = jnp.ones((3, 2, 2, 1)), jnp.full((3, 2, 2, 1), 2.0), jnp.asarray([1, 500, 1000])
    losses.l_gamma(lambda x, t: seen.update(x=x, t=t) or x, TABLE, x_0, t, eps)
    alpha_bar = LINEAR.alpha_bar[np.asarray(t)]
    np.testing.assert_allclose(seen["x"][:, 0, 0, 0], np.sqrt(alpha_bar) + 2 * np.sqrt(1 - alpha_bar), rtol=1e-5)
    assert (seen["t"] == t).all()


# --- J_sigma ---


def random_eps_fns():
    weights = np.random.default_rng(0).normal(size=(3, 3))
    return [lambda x, t, w=w: jnp.tanh(w[0] * x + w[1]) * w[2] + 0.001 * t for w in weights]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_theorem_one(eta, x64):
    """J_sigma, from the means of both Gaussians of every step, is L_gamma with the exact weights plus a constant that
    does not depend on the network.
    """
    transitions = trajectory.descend(LINEAR, trajectory.quadratic(1000, 12))
    sigma2 = losses.sigma2_of(transitions, eta)
    x_0, keys = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3))), jax.random.split(jax.random.key(2), 4)
    constants = []
    for eps_fn in random_eps_fns():
        bound, weighted = 0.0, 0.0
        for i, gamma in enumerate(losses.gamma_exact(transitions, sigma2)):
            step = jax.tree.map(lambda leaf, i=i: leaf[i], transitions)
            eps = jnp.stack([jax.random.normal(jax.random.fold_in(key, step.t), (3,)) for key in keys])
            x_t = gaussian.q_marginal(x_0, eps, step.level_t)
            predicted = eps_fn(x_t, step.t)
            f = gaussian.predict_x0(x_t, predicted, step.level_t)
            if step.s:
                (mean_q, variance), (mean_p, _) = (gaussian.q_sigma(x_t, x, step, sigma2[i]) for x in (x_0, f))
                bound += ((mean_q - mean_p) ** 2).sum(1) / (2 * variance)
            else:
                density = -((x_0 - f) ** 2) / (2 * sigma2[i]) - np.log(2 * np.pi * sigma2[i]) / 2
                bound -= density.sum(1)
            weighted += gamma * ((predicted - eps) ** 2).sum(1)
        first = jax.tree.map(lambda leaf: leaf[0], transitions)
        variance = first.one_minus_alpha_bar_t
        bound += (first.alpha_bar_t * x_0**2 + variance - 1 - np.log(variance)).sum(1) / 2
        found = losses.j_sigma(eps_fn, transitions, x_0, keys, eta)
        np.testing.assert_allclose(found, bound, rtol=1e-10)
        constants.append(np.asarray(found - weighted))
    np.testing.assert_allclose(constants[1:], [constants[0]] * 2, rtol=1e-8)


def test_the_exact_weights_are_ho_s_at_eta_one():
    """`beta^2 / (2 sigma^2 (1 - beta) (1 - ab))` (Ho et al. 2020, Eq. 12). The printed weights of the paper differ."""
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 1000))
    sigma2 = losses.sigma2_of(transitions, 1.0)
    beta, ab = transitions.beta[:-1], transitions.alpha_bar_t[:-1]
    exact = losses.gamma_exact(transitions, sigma2)
    np.testing.assert_allclose(exact[:-1], beta**2 / (2 * sigma2[:-1] * (1 - beta) * (1 - ab)), rtol=1e-8)
    assert (losses.gamma_paper(transitions, sigma2, 1)[:-1] / exact[:-1]).min() > 1000


@pytest.mark.parametrize("S", [10, 1000])
def test_the_bound_of_gaussian_data(S, x64):
    """Its mean in closed form, with the exact eps of error `ab s^2 / (ab s^2 + 1 - ab)` at t. It is above -log p."""
    mean, std, count = 0.3, 0.5, 4000
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, S))
    sigma2, ab, one_minus = (
        losses.sigma2_of(transitions, 1.0),
        transitions.alpha_bar_t,
        transitions.one_minus_alpha_bar_t,
    )
    errors = ab * std**2 / (ab * std**2 + one_minus)
    prior = (ab[0] * (mean**2 + std**2) + one_minus[0] - 1 - np.log(one_minus[0])) / 2
    expected = prior + (losses.gamma_exact(transitions, sigma2) * errors).sum() + np.log(2 * np.pi * sigma2[-1]) / 2
    x_0 = jnp.asarray(np.random.default_rng(0).normal(mean, std, (count, 1)))
    bounds = np.asarray(
        losses.j_sigma(oracle.gaussian(LINEAR, mean, std), transitions, x_0, jax.random.split(KEY, count))
    )
    assert bounds.mean() == pytest.approx(expected, abs=5 * bounds.std() / np.sqrt(count))
    assert expected > (np.log(2 * np.pi * std**2) + 1) / 2  # the entropy of the data


KEY = jax.random.key(3)


@pytest.mark.parametrize("std", [0.5, 0.01, 0.002])
def test_the_probabilities_of_pixels_sum_to_one(std):
    values = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)[:, None]
    for mean in (-1.2, -0.999, 0.003, 0.7, 1.0):
        nats = losses.decoder_nats_of_pixels(values, jnp.float32(mean), jnp.float32(std**2))
        assert np.isfinite(nats).all() and float(jnp.exp(-nats).sum()) == pytest.approx(1, abs=2e-3)


def test_a_bin_has_the_density_times_its_width():
    """For a Gaussian that is wide relative to the bins."""
    values = jnp.asarray(np.arange(100, 150) / 127.5 - 1, jnp.float32)[:, None]
    pixels = losses.decoder_nats_of_pixels(values, jnp.float32(0.1), jnp.float32(0.04))
    density = losses.decoder_nats(values, jnp.float32(0.1), jnp.float32(0.04))
    np.testing.assert_allclose(pixels, density - np.log(2 / 255), atol=2e-3)


def test_errors_of_j_sigma_name_the_argument():
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    with raises(ValueError, "eta", "got 0.0"):
        losses.j_sigma(lambda x, t: x, transitions, jnp.ones((1, 2)), KEY[None], eta=0.0)
    with raises(ValueError, "decoder", "'laplace'", "gaussian", "pixels"):
        losses.j_sigma(lambda x, t: x, transitions, jnp.ones((1, 2)), KEY[None], decoder="laplace")
