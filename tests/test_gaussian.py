import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_jax import gaussian, registry, schedule, trajectory

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)
pairs = st.integers(2, 1000).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t - 1)))


def one(t, s):
    """The transition t -> s, scalar leaves."""
    return jax.tree.map(lambda leaf: leaf[0], trajectory.descend(LINEAR, [0, s, t]))


def test_sigma_of_eta_one_half():
    """Eq. (16) at t = 500, s = 400 with eta = 0.5, computed with 50 decimal digits from the 500 betas:
    alpha_bar_400 = 0.19514..., alpha_bar_500 = 0.07858..., so sigma = 0.5 sqrt(0.80485... / 0.92141...) sqrt(1 -
    0.07858... / 0.19514...).
    """
    assert np.sqrt(gaussian.sigma_squared(0.5, one(500, 400))) == pytest.approx(0.3611555457648620, rel=1e-12)


@given(pairs, st.floats(0, 1))
def test_sigma_is_within_its_bound_and_proportional_to_eta(pair, eta):
    transition = one(*pair)
    sigma2 = gaussian.sigma_squared(eta, transition)
    assert 0 <= sigma2 <= transition.one_minus_alpha_bar_s
    assert sigma2 == pytest.approx(eta**2 * gaussian.sigma_squared(1.0, transition), abs=1e-15)


def test_float32_keeps_the_bound_at_eta_one():
    """1 - alpha_bar_s - sigma^2 is never below 0 in float32, for any pair. Else its square root would be NaN."""
    t, s = np.triu_indices(1001, 1)
    transitions = jax.tree.map(lambda leaf: leaf.astype(np.float32), trajectory.transitions(LINEAR, s, t))
    assert (transitions.one_minus_alpha_bar_s - gaussian.sigma_squared(np.float32(1), transitions) >= 0).all()


@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (1000, 999)])
def test_eta_one_is_the_posterior_of_ddpm(t, s, x64):
    """Against Ho et al. 2020, Eq. (6) and (7), in terms of beta."""
    alpha_bar = LINEAR.alpha_bar
    beta = 1 - alpha_bar[t] / alpha_bar[s]
    x_t, x_0 = np.array([[0.3], [-2.0]]), np.array([[0.5], [-0.1]])
    mean, variance = gaussian.q_sigma(x_t, x_0, one(t, s), gaussian.sigma_squared(1.0, one(t, s)))
    expected = (np.sqrt(alpha_bar[s]) * beta * x_0 + np.sqrt(1 - beta) * (1 - alpha_bar[s]) * x_t) / (1 - alpha_bar[t])
    np.testing.assert_allclose(mean, expected, rtol=1e-9)
    assert variance == pytest.approx((1 - alpha_bar[s]) / (1 - alpha_bar[t]) * beta, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("build_tau", [trajectory.uniform, trajectory.quadratic])
def test_lemma_1_by_moments(eta, build_tau):
    """x_T from q(x_T | x_0), then q_sigma over all steps of tau. Every level has the mean and variance of (4)."""
    count, x_0 = 200_000, 0.7
    rng = np.random.default_rng(0)
    transitions = trajectory.descend(LINEAR, build_tau(1000, 7))
    level = schedule.Level(1000, transitions.alpha_bar_t[0], transitions.one_minus_alpha_bar_t[0])
    x = gaussian.q_marginal(np.full(count, x_0), rng.standard_normal(count), level)
    for i in range(7):
        transition = jax.tree.map(lambda leaf: leaf[i], transitions)  # noqa: B023
        mean, variance = gaussian.q_sigma(x, x_0, transition, gaussian.sigma_squared(eta, transition))
        x = np.asarray(mean + np.sqrt(variance) * rng.standard_normal(count), np.float64)
        noise = float(transition.one_minus_alpha_bar_s)
        assert x.mean() == pytest.approx(np.sqrt(transition.alpha_bar_s) * x_0, abs=5 * np.sqrt(noise / count) + 1e-6)
        assert x.var() == pytest.approx(noise, abs=5 * noise * np.sqrt(2 / count) + 1e-6)


@given(pairs, st.floats(0, 1))
def test_both_directions_have_the_same_joint_distribution(pair, eta):
    """The mean and covariance of (x_s, x_t) given x_0, from q(x_t) q_sigma(x_s | x_t), and from q(x_s) and (8)."""
    with jax.enable_x64(True):
        transition = one(*pair)
        sigma2 = gaussian.sigma_squared(eta, transition)
        x_0 = np.array(0.6)

        def joint(conditional, known, other):
            """Mean and covariance of (known, other): known has the marginal (4), and `conditional` is affine in it."""
            (_, noise), mean = known, np.sqrt(known[0]) * x_0
            at_mean, variance = conditional(mean, x_0, transition, sigma2)
            slope = conditional(mean + 1, x_0, transition, sigma2)[0] - at_mean
            return np.array([mean, at_mean]), np.array(
                [[noise, slope * noise], [slope * noise, slope**2 * noise + variance]]
            )

        t, s = (
            (transition.alpha_bar_t, transition.one_minus_alpha_bar_t),
            (transition.alpha_bar_s, transition.one_minus_alpha_bar_s),
        )
        down_mean, down_cov = joint(gaussian.q_sigma, t, s)
        up_mean, up_cov = joint(gaussian.q_sigma_forward, s, t)
    np.testing.assert_allclose(down_mean[::-1], up_mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(down_cov[::-1, ::-1], up_cov, rtol=1e-7, atol=1e-12)


@given(st.integers(1, 1000), st.floats(-2, 2), st.floats(-3, 3))
def test_every_parameterisation_gives_the_same_x_0_and_eps(t, x_0, eps):
    with jax.enable_x64(True):
        level = schedule.Level(t, TABLE.alpha_bar[t], TABLE.one_minus_alpha_bar[t])
        x_t = gaussian.q_marginal(x_0, eps, level)
        outputs = {"eps": eps, "x0": x_0, "v": gaussian.predict_v(x_0, eps, level)}
        sigma, x_sigma = np.sqrt(level.one_minus_alpha_bar / level.alpha_bar), x_t / np.sqrt(level.alpha_bar)
        outputs["edm"] = (x_0 - 0.25 / (sigma**2 + 0.25) * x_sigma) * np.sqrt(sigma**2 + 0.25) / (0.5 * sigma)
        assert set(outputs) == set(registry.PREDICTIONS)
        for name, value in outputs.items():
            prediction = registry.PREDICTIONS[name].prediction(x_t, value, level)
            assert tuple(prediction) == pytest.approx((x_0, eps), abs=1e-9)
        assert gaussian.predict_x0(x_t, eps, level) == pytest.approx(x_0, abs=1e-9)


def test_clipping_keeps_x0_and_eps_consistent(x64):
    """eps is computed again from the clipped x_0, unless keep_eps is set."""
    x = jnp.linspace(-3.0, 3.0, 7)[:, None]
    level = schedule.level_at(TABLE, 400, x)
    free = gaussian.predict_x0(x, 0.1 * x, level)
    x_0, eps = gaussian.clip_x0(lambda x, t: 0.1 * x)(x, level)
    assert (abs(free) > 1).any() and (abs(free) < 1).any()
    np.testing.assert_allclose(x_0, np.clip(free, -1, 1), rtol=1e-12)
    np.testing.assert_allclose(gaussian.q_marginal(x_0, eps, level), x, rtol=1e-12, atol=1e-12)
    kept = gaussian.clip_x0(lambda x, t: 0.1 * x, keep_eps=True)(x, level)
    np.testing.assert_array_equal(kept.x_0, x_0)
    np.testing.assert_array_equal(kept.eps, 0.1 * x)


def test_dynamic_thresholding_of_imagen(x64):
    """The bound of each image is a quantile of its own absolute values, in [1, maximum]."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 3)) * np.array([0.1, 0.5, 0.6, 40.0]).reshape(4, 1, 1, 1))
    level = schedule.level_at(TABLE, 400, x)
    free = np.asarray(gaussian.predict_x0(x, 0.1 * x, level))
    x_0, eps = gaussian.threshold_x0(lambda x, t: 0.1 * x, 0.9, 3.0)(x, level)
    bounds = []
    for image, before in zip(np.asarray(x_0), free, strict=True):
        s = min(max(np.quantile(abs(before), 0.9), 1), 3)
        bounds.append(s)
        np.testing.assert_allclose(image, np.clip(before, -s, s) / s, rtol=1e-10, atol=1e-12)
    assert bounds[0] == 1 and 1 < bounds[2] < 3 and bounds[3] == 3
    np.testing.assert_allclose(gaussian.q_marginal(x_0, eps, level), x, rtol=1e-12, atol=1e-12)
