import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax import gaussian, losses, oracle, schedule

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)


@pytest.mark.parametrize("t", [1, 100, 700])
def test_the_oracle_reaches_the_smallest_loss(t):
    """For data N(m, s^2) the variance of eps given x_t is ab s^2 / (ab s^2 + 1 - ab): no network can have less,
    the oracle has it.
    """
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
    """A network that is wrong by a known amount, its errors measured in each space by hand."""
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
    assert set(expected) == set(losses.GAMMAS)
    for gamma, error in expected.items():
        np.testing.assert_allclose(
            losses.l_gamma(lambda x, t: wrong, TABLE, x_0, t, eps, gamma), (error**2).mean(1), rtol=1e-9
        )


def test_the_network_is_asked_about_x_t():
    """Eq. (4) at the level of each image."""
    seen = {}
    x_0, eps, t = jnp.ones((3, 2, 2, 1)), jnp.full((3, 2, 2, 1), 2.0), jnp.asarray([1, 500, 1000])
    losses.l_gamma(lambda x, t: seen.update(x=x, t=t) or x, TABLE, x_0, t, eps)
    alpha_bar = LINEAR.alpha_bar[np.asarray(t)]
    np.testing.assert_allclose(seen["x"][:, 0, 0, 0], np.sqrt(alpha_bar) + 2 * np.sqrt(1 - alpha_bar), rtol=1e-5)
    assert (seen["t"] == t).all()
