"""Appendix A, against distributions that are computed by enumeration."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from messages import raises
from test_update import KEY, MODEL

from ddim_jax import data, discrete, samplers, schedule, trajectory
from ddim_jax.data.scaling import from_one_hot, to_one_hot
from ddim_jax.training import objectives, train_state, train_step

LINEAR = schedule.linear()
pairs = st.integers(2, 1000).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t - 1)))


def step(t, s):
    return jax.tree.map(lambda leaf: leaf[0], trajectory.transitions(LINEAR, [t], [s]))


@hypothesis.given(pairs, st.floats(0, 1), st.integers(2, 6))
def test_every_sigma_keeps_the_marginal(pair, fraction, K):
    """sum over x_t of q(x_t | x_0) q_sigma(x_s | x_t, x_0) is q(x_s | x_0), as matrices, in float64."""
    t, s = pair
    transition, classes = step(t, s), np.eye(K)
    sigma = fraction * discrete.sigma_limit(transition)
    with jax.enable_x64(True):
        each = np.asarray(discrete.posterior(classes[None], classes[:, None], transition, sigma))  # (x_0, x_t, x_s)
    np.testing.assert_allclose(each.sum(-1), 1, atol=1e-14)
    assert each.min() >= 0
    at = lambda t: LINEAR.alpha_bar[t] * classes + (1 - LINEAR.alpha_bar[t]) / K
    np.testing.assert_allclose(np.einsum("ab,abc->ac", at(t), each), at(s), atol=1e-14)


@hypothesis.given(pairs)
def test_the_limit_is_exact(pair):
    """Both of the paper's bounds hold with equality. A larger sigma would need a negative probability of a new draw."""
    t, s = pair
    transition = step(t, s)
    alpha_bar = LINEAR.alpha_bar
    limit = float(discrete.sigma_limit(transition))
    assert limit == pytest.approx(min(alpha_bar[s] / alpha_bar[t], (1 - alpha_bar[s]) / (1 - alpha_bar[t])), rel=1e-12)
    new_draw = lambda sigma: (1 - alpha_bar[s]) - (1 - alpha_bar[t]) * sigma
    assert abs(new_draw(limit)) < 1e-15 and new_draw(limit * (1 + 1e-6)) < 0


def test_draws_have_their_probabilities():
    probabilities = jnp.array([0.5, 0.0, 0.2, 0.3])
    drawn = discrete.draw(probabilities[None], jax.random.normal(jax.random.key(0), (100_000, 4)))
    np.testing.assert_array_equal(drawn.sum(1), 1)
    np.testing.assert_allclose(drawn.mean(0), probabilities, atol=5 * 0.5 / np.sqrt(100_000))
    assert drawn[:, 1].sum() == 0


# --- one variable of a known distribution: with the exact network, every number of steps draws from it ---

LAW = np.array([0.5, 0.1, 0.4])


def exact(noise_schedule, law=LAW):
    """log p(x_0 | x_t) of a variable of this distribution, by Bayes' rule."""
    return Partial(bayes, schedule.levels(noise_schedule), jnp.asarray(law))


def bayes(table, law, x_t, t):
    level = schedule.level_at(table, t, x_t)
    K = len(law)
    likelihood = level.alpha_bar * x_t + level.one_minus_alpha_bar / K  # symmetric in x_0 and x_t
    joint = law[None] * likelihood
    return jnp.log(joint / joint.sum(-1, keepdims=True))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("S", [1, 5, 200])
def test_samples_have_the_known_distribution(S, fraction):
    """The posterior is linear in x_0. So with the exact network every sigma and every S draws from the distribution."""
    count = 40_000
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    x_T = discrete.initial(keys, (3,))
    np.testing.assert_allclose(x_T.mean(0), 1 / 3, atol=0.012)
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, S))
    sampler = discrete.discrete_ddim(fraction)
    x_0 = samplers.integrate(sampler, discrete.from_log_probs(exact(LINEAR)), transitions, x_T, keys)
    np.testing.assert_array_equal(jnp.unique(x_0), [0, 1])
    np.testing.assert_allclose(x_0.mean(0), LAW, atol=5 * 0.5 / np.sqrt(count))


def test_the_largest_sigma_keeps_x_t():
    """If x_t is the predicted x_0, the largest sigma never changes it. The smallest sigma does."""
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 10))
    certain = jnp.log(jnp.array([1.0, 1e-30, 1e-30]))
    network = lambda x, t: jnp.broadcast_to(certain, x.shape)
    x = jnp.tile(jnp.array([[1.0, 0, 0]]), (5000, 1))
    for fraction, changes in ((1.0, False), (0.0, True)):
        _, path = samplers.trajectory(
            discrete.discrete_ddim(fraction), discrete.from_log_probs(network), transitions, x, jax.random.key(1)
        )
        assert bool((path.x[:, :, 0] == 0).any()) == changes
        np.testing.assert_allclose(path.x_0, jnp.broadcast_to(jnp.array([1.0, 0, 0]), (10, 5000, 3)), atol=1e-6)


@hypothesis.given(pairs, st.floats(0, 1), st.integers(0, 2**31))
@hypothesis.settings(max_examples=50)
def test_the_classification_loss_is_a_bound(pair, fraction, seed):
    rng, transition = np.random.default_rng(seed), step(*pair)
    x_0, x_t = np.eye(4)[rng.integers(0, 4, (3, 5))], np.eye(4)[rng.integers(0, 4, (3, 5))]
    log_probs = np.log(rng.dirichlet(np.full(4, 0.3), (3, 5)) * (1 - 1e-6) + 1e-6 / 4)
    sigma = fraction * discrete.sigma_limit(transition)
    with jax.enable_x64(True):
        exact_kl = np.asarray(discrete.kl(x_t, x_0, log_probs, transition, sigma))
        bound = np.asarray(discrete.classification_bound(x_0, log_probs, transition, sigma))
        q, p = (np.asarray(discrete.posterior(x_t, x, transition, sigma)) for x in (x_0, np.exp(log_probs)))
    with np.errstate(divide="ignore", invalid="ignore"):
        by_hand = np.nansum(np.where(q > 0, q * np.log(q / p), 0), axis=(1, 2))
    np.testing.assert_allclose(exact_kl, by_hand, rtol=1e-9, atol=1e-12)
    assert (exact_kl >= -1e-12).all() and (exact_kl <= bound + 1e-9).all()


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0])
def test_the_objective_by_enumeration(fraction):
    """J_sigma of each x_0 for an inexact network, as a sum over all x_t, against the mean of the estimates. It bounds
    -log p(x_0) of the process, which is a product of matrices.
    """
    noise_schedule, K = schedule.linear(8, 0.05, 0.3), 3
    transitions = trajectory.descend(noise_schedule, [0, 2, 5, 8])
    wrong = exact(noise_schedule, np.array([0.2, 0.3, 0.5]))
    classes, alpha_bar = np.eye(K), noise_schedule.alpha_bar
    at = lambda t: alpha_bar[t] * classes + (1 - alpha_bar[t]) / K
    total, chain = (at(8) * np.log(at(8) * K)).sum(1), np.full(K, 1 / K)
    for t, s in [(8, 5), (5, 2), (2, 0)]:
        predicted = np.exp(np.asarray(wrong(jnp.asarray(classes), jnp.int32(t)), np.float64))  # (x_t, x_0)
        ab_t, ab_s = alpha_bar[t], alpha_bar[s]
        kept = fraction * (1 - ab_s) / (1 - ab_t)
        same, new_draw = kept * classes, np.full((K, K), max((1 - ab_s) - (1 - ab_t) * kept, 0) / K)
        p = same + (ab_s - kept * ab_t) * predicted + new_draw  # (x_t, x_s)
        for x_0 in range(K):
            q = same + (ab_s - kept * ab_t) * classes[x_0][None] + new_draw
            cost = np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / np.where(p > 0, p, 1)), 0).sum(1)
            total[x_0] += at(t)[x_0] @ cost
        chain = chain @ p
    count = 20_000
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    for x_0 in range(K):
        found = discrete.j_sigma(
            wrong, transitions, jnp.tile(jnp.asarray(classes[x_0], jnp.float32), (count, 1)), keys, fraction
        )
        assert float(found.mean()) == pytest.approx(total[x_0], abs=6 * float(found.std()) / np.sqrt(count) + 1e-4)
        assert total[x_0] >= -np.log(chain[x_0])


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_sigma_beyond_its_limit_is_refused(value):
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    denoise = discrete.from_log_probs(exact(LINEAR))
    with raises(ValueError, "fraction", f"got {value}"):
        sampler = discrete.discrete_ddim(value)
        samplers.integrate(sampler, denoise, transitions, jnp.ones((1, 3)), jax.random.key(0))
    with raises(ValueError, "transitions", "discrete_ddim"):
        discrete.discrete_ddim().check(trajectory.ascend(LINEAR, trajectory.uniform(1000, 5)))


def test_one_hot_grey_levels_are_decoded():
    images = data.load("digits").images[:50]
    for numpy in (np, jnp):
        one_hot = to_one_hot(17, numpy.asarray(images))
        assert one_hot.shape == (50, 8, 8, 17) and (one_hot.sum(-1) == 1).all()
        np.testing.assert_array_equal(from_one_hot(one_hot), images)
    assert to_one_hot(2, np.array([[[[127]], [[128]]]], np.uint8))[0, :, 0].tolist() == [[1, 0], [0, 1]]


@pytest.mark.slow
def test_the_initial_loss_is_the_logarithm_of_the_number_of_classes(mesh):
    """At first all logits are 0. A few updates learn that the borders are black."""
    model = MODEL.clone(image_channels=17, dropout=0.0)
    optimizer = optax.adam(5e-3)
    objective = objectives.classification(model, LINEAR, 17)
    update = jax.jit(train_step.build(objective, optimizer, ema_decay=0.9))
    state, images = train_state.init(model, optimizer, KEY), data.load("digits").images[:64]
    costs = []
    for _ in range(12):
        state, metrics = update(state, images, None, KEY)
        costs.append(float(metrics.loss))
    assert costs[0] == pytest.approx(np.log(17), rel=1e-5) and costs[-1] < 0.8 * costs[0]
