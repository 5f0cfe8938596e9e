"""Appendix A, against laws that are computed by enumeration."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ddim_jax import data, discrete, samplers, schedule, trajectory
from ddim_jax.data.scaling import from_one_hot, to_one_hot
from ddim_jax.training import objectives, train_step

LINEAR = schedule.linear()
pairs = st.integers(2, 1000).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t - 1)))


def step(t, s):
    return jax.tree.map(lambda leaf: leaf[0], trajectory.transitions(LINEAR, [t], [s]))


@hypothesis.given(pairs, st.floats(0, 1), st.integers(2, 6))
def test_every_sigma_keeps_the_marginal(pair, share, K):
    """sum over x_t of q(x_t | x_0) q_sigma(x_s | x_t, x_0) is q(x_s | x_0), as matrices, in float64."""
    t, s = pair
    transition, classes = step(t, s), np.eye(K)
    sigma = share * discrete.sigma_limit(transition)
    with jax.enable_x64(True):
        each = np.asarray(discrete.posterior(classes[None], classes[:, None], transition, sigma))  # (x_0, x_t, x_s)
    np.testing.assert_allclose(each.sum(-1), 1, atol=1e-14)
    assert each.min() >= 0
    at = lambda t: LINEAR.alpha_bar[t] * classes + (1 - LINEAR.alpha_bar[t]) / K
    np.testing.assert_allclose(np.einsum("ab,abc->ac", at(t), each), at(s), atol=1e-14)


@hypothesis.given(pairs)
def test_the_limit_is_exact(pair):
    """Both of the paper's bounds hold there and nothing is drawn anew; a hair beyond would be less than never."""
    t, s = pair
    transition = step(t, s)
    alpha_bar = LINEAR.alpha_bar
    limit = float(discrete.sigma_limit(transition))
    assert limit == pytest.approx(min(alpha_bar[s] / alpha_bar[t], (1 - alpha_bar[s]) / (1 - alpha_bar[t])), rel=1e-12)
    anew = lambda sigma: (1 - alpha_bar[s]) - (1 - alpha_bar[t]) * sigma
    assert abs(anew(limit)) < 1e-15 and anew(limit * (1 + 1e-6)) < 0


def test_draws_have_their_probabilities():
    probabilities = jnp.array([0.5, 0.0, 0.2, 0.3])
    drawn = discrete.draw(probabilities[None], jax.random.normal(jax.random.key(0), (100_000, 4)))
    np.testing.assert_array_equal(drawn.sum(1), 1)
    np.testing.assert_allclose(drawn.mean(0), probabilities, atol=5 * 0.5 / np.sqrt(100_000))
    assert drawn[:, 1].sum() == 0


# --- one place with a known law: the exact network, and by it exact draws in any number of steps ---

LAW = np.array([0.5, 0.1, 0.4])


def exact(noise_schedule, law=LAW):
    """log p(x_0 | x_t) of a place drawn from the law, by Bayes' rule."""
    return Partial(_bayes, schedule.levels(noise_schedule), jnp.asarray(law))


def _bayes(table, law, x_t, t):
    level = schedule.level_at(table, t, x_t)
    K = len(law)
    likelihood = level.alpha_bar * x_t + level.one_minus_alpha_bar / K  # symmetric in x_0 and x_t
    joint = law[None] * likelihood
    return jnp.log(joint / joint.sum(-1, keepdims=True))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("S", [1, 5, 200])
def test_a_place_with_a_known_law(S, share):
    """The posterior is linear in x_0, so with the exact network every sigma and every S draws the law itself."""
    count = 40_000
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    x_T = discrete.initial(keys, (3,))
    np.testing.assert_allclose(x_T.mean(0), 1 / 3, atol=0.012)
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, S))
    sampler = discrete.discrete_ddim(share)
    x_0 = samplers.integrate(sampler, discrete.from_log_probs(exact(LINEAR)), transitions, x_T, keys)
    np.testing.assert_array_equal(jnp.unique(x_0), [0, 1])
    np.testing.assert_allclose(x_0.mean(0), LAW, atol=5 * 0.5 / np.sqrt(count))


def test_the_largest_sigma_keeps_what_it_has():
    """Of an x_t that already is what the network predicts, every step keeps it there; others forget it."""
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 10))
    certain = jnp.log(jnp.array([1.0, 1e-30, 1e-30]))
    network = lambda x, t: jnp.broadcast_to(certain, x.shape)
    x = jnp.tile(jnp.array([[1.0, 0, 0]]), (5000, 1))
    for share, moves in ((1.0, False), (0.0, True)):
        _, path = samplers.trajectory(
            discrete.discrete_ddim(share), discrete.from_log_probs(network), transitions, x, jax.random.key(1)
        )
        assert bool((path.x[:, :, 0] == 0).any()) == moves
        np.testing.assert_allclose(path.x_0, jnp.broadcast_to(jnp.array([1.0, 0, 0]), (10, 5000, 3)), atol=1e-6)


@hypothesis.given(pairs, st.floats(0, 1), st.integers(0, 2**31))
@hypothesis.settings(max_examples=50)
def test_the_classification_loss_is_a_bound(pair, share, seed):
    rng, transition = np.random.default_rng(seed), step(*pair)
    x_0, x_t = np.eye(4)[rng.integers(0, 4, (3, 5))], np.eye(4)[rng.integers(0, 4, (3, 5))]
    said = np.log(rng.dirichlet(np.full(4, 0.3), (3, 5)) * (1 - 1e-6) + 1e-6 / 4)
    sigma = share * discrete.sigma_limit(transition)
    with jax.enable_x64(True):
        exact_kl = np.asarray(discrete.kl(x_t, x_0, said, transition, sigma))
        bound = np.asarray(discrete.classification_bound(x_0, said, transition, sigma))
        q, p = (np.asarray(discrete.posterior(x_t, x, transition, sigma)) for x in (x_0, np.exp(said)))
    with np.errstate(divide="ignore", invalid="ignore"):
        by_hand = np.nansum(np.where(q > 0, q * np.log(q / p), 0), axis=(1, 2))
    np.testing.assert_allclose(exact_kl, by_hand, rtol=1e-9, atol=1e-12)
    assert (exact_kl >= -1e-12).all() and (exact_kl <= bound + 1e-9).all()


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_objective_by_enumeration(share):
    """J_sigma of each x_0 with a network that is wrong, as a sum over all x_t, beside the mean of the estimates; and it
    bounds what the process really gives x_0, a product of matrices.
    """
    noise_schedule, K = schedule.linear(8, 0.05, 0.3), 3
    transitions = trajectory.descend(noise_schedule, [0, 2, 5, 8])
    wrong = exact(noise_schedule, np.array([0.2, 0.3, 0.5]))
    classes, alpha_bar = np.eye(K), noise_schedule.alpha_bar
    at = lambda t: alpha_bar[t] * classes + (1 - alpha_bar[t]) / K
    total, chain = (at(8) * np.log(at(8) * K)).sum(1), np.full(K, 1 / K)
    for t, s in [(8, 5), (5, 2), (2, 0)]:
        said = np.exp(np.asarray(wrong(jnp.asarray(classes), jnp.int32(t)), np.float64))  # (x_t, x_0)
        ab_t, ab_s = alpha_bar[t], alpha_bar[s]
        kept = share * (1 - ab_s) / (1 - ab_t)
        same, anew = kept * classes, np.full((K, K), max((1 - ab_s) - (1 - ab_t) * kept, 0) / K)
        p = same + (ab_s - kept * ab_t) * said + anew  # (x_t, x_s)
        for x_0 in range(K):
            q = same + (ab_s - kept * ab_t) * classes[x_0][None] + anew
            cost = np.where(q > 0, q * np.log(np.where(q > 0, q, 1) / np.where(p > 0, p, 1)), 0).sum(1)
            total[x_0] += at(t)[x_0] @ cost
        chain = chain @ p
    count = 20_000
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    for x_0 in range(K):
        found = discrete.j_sigma(
            wrong, transitions, jnp.tile(jnp.asarray(classes[x_0], jnp.float32), (count, 1)), keys, share
        )
        assert float(found.mean()) == pytest.approx(total[x_0], abs=6 * float(found.std()) / np.sqrt(count) + 1e-4)
        assert total[x_0] >= -np.log(chain[x_0])


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_sigma_beyond_its_limit_is_refused(share):
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    with pytest.raises(ValueError, match=rf"share must be in \[0, 1\], got {share}"):
        samplers.integrate(
            discrete.discrete_ddim(share),
            discrete.from_log_probs(exact(LINEAR)),
            transitions,
            jnp.ones((1, 3)),
            jax.random.key(0),
        )
    with pytest.raises(ValueError, match="discrete_ddim cannot ascend"):
        discrete.discrete_ddim().check(trajectory.ascend(LINEAR, trajectory.uniform(1000, 5)))


def test_grey_levels_come_back():
    images = data.load("digits").images[:50]
    for numpy in (np, jnp):
        one_hot = to_one_hot(17, numpy.asarray(images))
        assert one_hot.shape == (50, 8, 8, 17) and (one_hot.sum(-1) == 1).all()
        np.testing.assert_array_equal(from_one_hot(one_hot), images)
    assert to_one_hot(2, np.array([[[[127]], [[128]]]], np.uint8))[0, :, 0].tolist() == [[1, 0], [0, 1]]


@pytest.mark.slow
def test_a_network_that_knows_nothing_pays_the_logarithm_of_the_classes(mesh):
    """At first all logits are 0; a few updates learn that the borders are black."""
    import optax
    from test_update import KEY, MODEL

    from ddim_jax.training import train_state

    model = MODEL.clone(image_channels=17, dropout=0.0)
    optimizer = optax.adam(5e-3)
    objective = objectives.classification(model, LINEAR, 17)
    made = jax.jit(train_step.build(objective, optimizer, ema_decay=0.9))
    state, images = train_state.init(model, optimizer, KEY), data.load("digits").images[:64]
    costs = []
    for _ in range(12):
        state, metrics = made(state, images, None, KEY)
        costs.append(float(metrics.loss))
    assert costs[0] == pytest.approx(np.log(17), rel=1e-5) and costs[-1] < 0.8 * costs[0]
