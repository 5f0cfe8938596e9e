import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import meshes
from jax.tree_util import Partial
from messages import raises
from tiny import model_for

from ddim_jax import gaussian, guidance, oracle, registry, samplers, schedule, trajectory
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.utils import sharding

LINEAR = schedule.linear()
MIXTURE = (np.array([[1.0, -0.5], [-2.0, 0.3], [0.2, 2.0]]), np.array([0.3, 0.5, 0.2]))


def close(value, recorded, digits):
    """Equal to all recorded digits."""
    assert float(value) == pytest.approx(recorded, abs=0.51 * 10**-digits)


# --- closed forms ---

# The final mean and standard deviation for data N(0.3, 0.5^2), the optimal eps, x_T ~ N(0, 1) and official-uniform tau.
# A step is affine in x and in the noise, so both moments are exact. Computed in float64 with NumPy from the equations,
# independently of this code.
MOMENTS = {
    ("ddim", 0.0): {
        10: (0.298155, 0.374128),
        20: (0.298660, 0.433734),
        50: (0.298911, 0.472439),
        100: (0.298986, 0.485981),
        1000: (0.299050, 0.498495),
    },
    ("ddim", 0.5): {
        10: (0.299088, 0.367083),
        20: (0.299506, 0.425680),
        50: (0.299685, 0.466651),
        100: (0.299733, 0.482262),
        1000: (0.299773, 0.497977),
    },
    ("ddim", 1.0): {
        10: (0.299980, 0.333263),
        20: (0.299992, 0.391464),
        50: (0.299996, 0.444123),
        100: (0.299996, 0.468256),
        1000: (0.299997, 0.496110),
    },
    ("ddpm_hat", 0.0): {
        10: (0.299980, 0.589025),
        20: (0.299992, 0.544063),
        50: (0.299996, 0.517229),
        100: (0.299996, 0.508490),
        1000: (0.299997, 0.500752),
    },
}


@pytest.mark.parametrize("name, eta", MOMENTS)
@pytest.mark.parametrize("S", [10, 20, 50, 100, 1000])
def test_moments_of_gaussian_data(name, eta, S, x64):
    sampler = registry.build(registry.SAMPLERS[name], {"eta": eta})
    transitions = trajectory.descend(LINEAR, trajectory.official_uniform(1000, S))
    denoise = gaussian.from_eps(oracle.gaussian(LINEAR, 0.3, 0.5))
    probes, noise = (
        jnp.asarray([[0.0], [1.0], [0.0]]),
        jnp.asarray([[0.0], [0.0], [1.0]]),
    )  # offset, slope in x, slope in noise

    def body(moments, transition):
        out, _ = sampler.step(probes, sampler.init(probes), transition, denoise, noise)
        offset, slope, scale = out[0, 0], out[1, 0] - out[0, 0], out[2, 0] - out[0, 0]
        mean, variance = moments
        return (offset + slope * mean, slope**2 * variance + scale**2), None

    (mean, variance), _ = jax.lax.scan(body, (jnp.zeros(()), jnp.ones(())), jax.tree.map(jnp.asarray, transitions))
    close(mean, MOMENTS[name, eta][S][0], 6)
    close(jnp.sqrt(variance), MOMENTS[name, eta][S][1], 6)


@pytest.mark.parametrize("name, eta", MOMENTS)
def test_integrate_has_these_moments(name, eta):
    """The moments of 40,000 samples at S = 10."""
    count, sampler = 40_000, registry.build(registry.SAMPLERS[name], {"eta": eta})
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    x = samplers.integrate(
        sampler,
        oracle.gaussian(LINEAR, 0.3, 0.5),
        trajectory.descend(LINEAR, trajectory.official_uniform(1000, 10)),
        samplers.initial_noise(keys, (1,)),
        keys,
    )
    mean, std = MOMENTS[name, eta][10]
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / np.sqrt(count))
    assert float(x.std()) == pytest.approx(std, abs=5 * std / np.sqrt(2 * count))


def deterministic_sample():
    return jnp.asarray(np.arange(768).reshape(3, 8, 8, 4).transpose(3, 0, 1, 2) / 768, jnp.float32)


def golden_network(x, t):
    return x * (t - 1) / t  # x t / (t + 1) in 0-based time


@pytest.mark.parametrize(
    "prediction, beta_start, total, mean",
    [("eps", 1e-4, 172.0067, 0.223967), ("v", 1e-4, 52.5302, 0.0684), ("eps", 0.01, 149.8295, 0.1951)],
)
def test_the_golden_loop_of_diffusers(prediction, beta_start, total, mean):
    """The sums in diffusers' own tests of its DDIM scheduler: T = 1000, linear, "leading", 10 steps, eta = 0."""
    noise_schedule = schedule.linear(beta_start=beta_start)
    denoise = gaussian.Denoise(
        lambda x, level: registry.PREDICTIONS[prediction].prediction(x, golden_network(x, level.t), level)
    )
    x = samplers.integrate(
        samplers.ddim(),
        denoise,
        trajectory.descend(noise_schedule, trajectory.leading(1000, 10)),
        deterministic_sample(),
    )
    assert float(jnp.abs(x).sum()) == pytest.approx(total, abs=1e-2)
    assert float(jnp.abs(x).mean()) == pytest.approx(mean, abs=1e-3)


def test_the_golden_inverse_loop_of_diffusers():
    """Its inverse scheduler evaluates the network at the next timestep."""
    x = samplers.invert(
        golden_network, LINEAR, trajectory.leading(1000, 10), deterministic_sample(), evaluate_at="next"
    )
    assert float(jnp.abs(x).sum()) == pytest.approx(671.6816, abs=1e-2)
    assert float(jnp.abs(x).mean()) == pytest.approx(0.8746, abs=1e-3)


# --- convergence ---


def test_ddim_converges_with_order_one(x64):
    """Against the exact flow of Eq. (14) for Gaussian data, which keeps (x - sqrt(ab) m) / sqrt(ab s^2 + 1 - ab)."""
    mean, std, x = 0.3, 0.5, jnp.asarray([[1.7]])
    last = LINEAR.alpha_bar[1000]
    exact = mean + std * (1.7 - np.sqrt(last) * mean) / np.sqrt(last * std**2 + 1 - last)
    counts = [25, 50, 100, 200]
    errors = [
        abs(
            float(
                samplers.integrate(
                    samplers.ddim(),
                    oracle.gaussian(LINEAR, mean, std),
                    trajectory.descend(LINEAR, trajectory.uniform(1000, S)),
                    x,
                )[0, 0]
            )
            - exact
        )
        for S in counts
    ]
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(1, abs=0.1)


def test_the_reconstruction_error_falls_like_one_over_S(x64):
    rng = np.random.default_rng(0)
    component = rng.integers(0, 3, 200)
    x_0 = jnp.asarray(MIXTURE[0][component] + MIXTURE[1][component][:, None] * rng.normal(size=(200, 2)))
    eps_fn, counts, errors = oracle.mixture(LINEAR, *MIXTURE), [25, 50, 100, 200], []
    for S in counts:
        tau = trajectory.uniform(1000, S)
        latent = samplers.invert(eps_fn, LINEAR, tau, x_0)
        decoded = samplers.integrate(samplers.ddim(), eps_fn, trajectory.descend(LINEAR, tau), latent)
        errors.append(float(jnp.abs(decoded - x_0).mean()))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.02


def test_encoding_is_not_noising(x64):
    """x_T of Gaussian data is the end of the exact flow from x_0, not a sample of Eq. (4)."""
    mean, std, last = 0.3, 0.5, LINEAR.alpha_bar[1000]
    x_0 = jnp.asarray([[-0.4], [0.3], [1.1]])
    latent = samplers.invert(oracle.gaussian(LINEAR, mean, std), LINEAR, trajectory.uniform(1000, 1000), x_0)
    exact = np.sqrt(last) * mean + np.sqrt(last * std**2 + 1 - last) * (x_0 - mean) / std
    np.testing.assert_allclose(latent, exact, atol=2e-2)


# --- a variance that the network predicts ---


def learned(f, model=None):
    return gaussian.with_variance(oracle.mixture(LINEAR, *MIXTURE) if model is None else model, f)


@pytest.mark.parametrize("tau", [trajectory.uniform(1000, 7), trajectory.quadratic(1000, 30)], ids=len)
@pytest.mark.parametrize("f, same", [(0.0, samplers.ddpm), (1.0, samplers.ddpm_hat)])
def test_the_ends_of_a_learned_variance(f, same, tau, x64):
    """The fraction 0 is DDPM with the posterior variance, 1 is sigma-hat."""
    down, x = trajectory.descend(LINEAR, tau), jax.random.normal(jax.random.key(0), (5, 2), jnp.float64)
    drawn = samplers.integrate(samplers.ddpm_learned(), learned(f), down, x, jax.random.key(1))
    expected = samplers.integrate(same(), oracle.mixture(LINEAR, *MIXTURE), down, x, jax.random.key(1))
    np.testing.assert_allclose(drawn, expected, rtol=1e-11, atol=1e-12)


class Doubled(nn.Module):
    """eps, and v: a network with a learned variance."""

    @nn.compact
    def __call__(self, x, time, labels=None, train=False):
        return jnp.concatenate([0.3 * x + 0.1, jnp.sin(x + time[:, None].astype(x.dtype) / 100)], axis=-1)


@pytest.mark.parametrize("clip", [False, True])
def test_a_learned_variance_is_an_independent_loop(clip, x64):
    """Nichol and Dhariwal 2021, Eq. (15), in NumPy, over the respaced betas of their code: beta' = 1 - ab_t / ab_s."""
    tau, keys = trajectory.uniform(1000, 25), samplers.image_keys(jax.random.key(3), jnp.arange(4))
    x = np.asarray(samplers.initial_noise(keys, (3,), jnp.float64))
    denoiser = Denoiser(Doubled(), {})
    model = gaussian.clip_x0(denoiser, -0.8, 0.8) if clip else denoiser
    drawn = samplers.integrate(samplers.ddpm_learned(), model, trajectory.descend(LINEAR, tau), jnp.asarray(x), keys)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])[tau]
    for i in reversed(range(1, len(tau))):
        beta, posterior = 1 - alpha_bar[i] / alpha_bar[i - 1], None
        eps, v = 0.3 * x + 0.1, np.sin(x + (tau[i] - 1) / 100)
        x_0 = (x - np.sqrt(1 - alpha_bar[i]) * eps) / np.sqrt(alpha_bar[i])
        x_0 = np.clip(x_0, -0.8, 0.8) if clip else x_0
        posterior = beta * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i])
        mean = np.sqrt(alpha_bar[i - 1]) * beta / (1 - alpha_bar[i]) * x_0
        mean = mean + np.sqrt(1 - beta) * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * x
        noise = np.asarray(gaussian.noise(keys, int(tau[i]), (3,), jnp.float64))
        f = (v + 1) / 2
        x = mean + (np.exp((f * np.log(beta) + (1 - f) * np.log(posterior)) / 2) * noise if i > 1 else 0)
    np.testing.assert_allclose(drawn, x, rtol=1e-10, atol=1e-11)


def test_a_learned_variance_through_combinators(x64):
    """The variance is that of the conditional denoiser. Bounds on x_0 do not change it."""
    x, level = jnp.full((2, 3), 0.5), trajectory.descend(LINEAR, [0, 500]).level_t
    level = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), level)
    model = learned(0.25, lambda x, t: 0.5 * x)
    for combined in (
        gaussian.clip_x0(model),
        gaussian.clip_x0(model, keep_eps=True),
        guidance.guided(model, lambda x, t: 0 * x, 2.0),
        guidance.inpainted(model, jnp.zeros((2, 3)), jnp.ones((2, 3), bool)),
    ):
        np.testing.assert_array_equal(combined(x, level).variance_fraction, np.full((2, 3), 0.25))
    assert guidance.guided(lambda x, t: 0 * x, model, 2.0)(x, level).variance_fraction is None


def test_without_a_learned_variance():
    down, x = trajectory.descend(LINEAR, trajectory.uniform(1000, 3)), jnp.ones((2, 2))
    with raises(ValueError, "ddpm_learned", "model"):
        samplers.integrate(samplers.ddpm_learned(), lambda x, t: x, down, x, jax.random.key(0))
    with raises(ValueError, "transitions", "ddpm_learned"):
        up = trajectory.ascend(LINEAR, trajectory.uniform(1000, 3))
        samplers.integrate(samplers.ddpm_learned(), learned(0.5), up, x, jax.random.key(0))


# --- numbers of steps, and trajectories ---


@pytest.mark.parametrize("S", [1, 300, 1000])
@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_any_number_of_steps(name, S):
    """One step, 300 steps, which do not divide 1000, and 1000 steps. A multistep method refuses fewer steps than its
    order.
    """
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, S))
    assert len(transitions.t) == S
    x = samplers.initial_noise(samplers.image_keys(jax.random.key(0), jnp.arange(2000)), (1,))
    sampler = registry.build(registry.SAMPLERS[name], {})
    model = model_for(sampler, oracle.gaussian(LINEAR, 0.3, 0.5))
    draw = lambda: samplers.integrate(sampler, model, transitions, x, jax.random.key(1))
    if S < sampler.min_steps:
        with raises(ValueError, "transitions", str(sampler.min_steps), "got 1"):
            draw()
        return
    out = draw()
    std = 0.0 if S == 1 else 0.5
    assert float(out.mean()) == pytest.approx(0.3, abs=0.05) and float(out.std()) == pytest.approx(std, abs=0.05)


@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_trajectory_is_integrate_with_all_steps(name):
    eps_fn, sampler = oracle.mixture(LINEAR, *MIXTURE), registry.build(registry.SAMPLERS[name], {})
    transitions = trajectory.descend(LINEAR, trajectory.quadratic(1000, 12))
    x, key = jax.random.normal(jax.random.key(0), (4, 2)), jax.random.key(1)
    model = model_for(sampler, eps_fn)
    last, path = samplers.trajectory(sampler, model, transitions, x, key)
    assert path.x.shape == (13, 4, 2) and path.x_0.shape == (12, 4, 2)
    np.testing.assert_allclose(last, samplers.integrate(sampler, model, transitions, x, key), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(path.x[0], x)
    np.testing.assert_array_equal(path.x[-1], last)
    table = schedule.levels(LINEAR)
    for i in (0, 5, 11):  # Eq. (4) of the predicted x_0 is x_t
        level, t = schedule.level_at(table, transitions.t[i], x), int(transitions.t[i])
        np.testing.assert_allclose(
            gaussian.q_marginal(path.x_0[i], eps_fn(path.x[i], t), level), path.x[i], rtol=1e-4, atol=1e-4
        )
    if name not in ("ab2", "ab4", "plms"):  # the last step of the others ends at the predicted x_0
        np.testing.assert_allclose(path.x_0[-1], last, rtol=1e-5)


# --- the noise of an image ---


IMAGES = np.random.default_rng(0).normal(size=(50, 8, 8, 1))


@pytest.mark.parametrize("name", registry.SAMPLERS)
@pytest.mark.parametrize(
    "eps_fn",
    [
        pytest.param(oracle.gaussian(LINEAR, IMAGES[0], 0.5), marks=pytest.mark.slow),
        oracle.mixture(LINEAR, IMAGES, np.full(50, 0.2)),
        pytest.param(oracle.finite(LINEAR, IMAGES), marks=pytest.mark.slow),
    ],
    ids=["gaussian", "mixture", "finite"],
)
def test_image_i_is_the_same_in_every_batch(name, eps_fn):
    """Its key and its noise bit for bit. The images to 1e-5, because XLA chooses another order of summation for another
    batch size.
    """
    sampler = registry.build(registry.SAMPLERS[name], {"eta": 0.5})
    model = model_for(sampler, eps_fn)
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 25))

    def draw(index):
        keys = samplers.image_keys(jax.random.key(7), jnp.asarray(index))
        x = samplers.initial_noise(keys, (8, 8, 1))
        drawn = [jax.random.key_data(keys), x, gaussian.noise(keys, jnp.int32(500), (8, 8, 1))]
        return *map(np.asarray, drawn), np.asarray(samplers.integrate(sampler, model, transitions, x, keys))

    whole = draw(range(8))
    assert len(np.unique(whole[-1], axis=0)) == 8
    for parts in ([[0, 1, 2], [3, 4, 5], [6, 7]], [[i] for i in range(8)]):
        *exact, images = (np.concatenate(leaves) for leaves in zip(*map(draw, parts), strict=True))
        for actual, expected in zip(exact, whole[:-1], strict=True):
            np.testing.assert_array_equal(actual, expected)
        np.testing.assert_allclose(images, whole[-1], atol=1e-5)


def test_one_key_gives_the_keys_of_a_batch():
    eps_fn, transitions = oracle.gaussian(LINEAR, 0.3, 0.5), trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    x, key = jnp.zeros((4, 3)), jax.random.key(3)
    runs = [
        samplers.integrate(samplers.ddpm(), eps_fn, transitions, x, k)
        for k in (key, samplers.image_keys(key, jnp.arange(4)), jax.random.PRNGKey(3))
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])  # a legacy uint32 key is the same key
    with raises(ValueError, "key", "4"):
        samplers.integrate(samplers.ddpm(), eps_fn, transitions, x, jax.random.split(key, 3))


def test_the_noise_of_steps_and_images_is_independent():
    """With eps = 0 the steps of DDPM only scale and add noise. The noise of different steps must be uncorrelated."""
    noise_schedule = schedule.from_betas(np.full(4, 0.01))
    transitions = trajectory.descend(noise_schedule, range(5))
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(5000))
    _, path = samplers.trajectory(
        samplers.ddpm_hat(), lambda x, t: jnp.zeros_like(x), transitions, samplers.initial_noise(keys, (1,)), keys
    )
    scale = np.sqrt(1 - transitions.beta)[:, None]  # eps = 0: x_s = x_t sqrt(alpha_bar_s / alpha_bar_t) + noise
    noise = np.asarray(path.x)[1:4, :, 0] - np.asarray(path.x)[:3, :, 0] / scale[:3]
    correlations = np.corrcoef(np.concatenate([np.asarray(path.x)[:1, :, 0], noise]))
    assert abs(correlations - np.eye(4)).max() < 5 / np.sqrt(5000)
    np.testing.assert_allclose(noise.std(), 0.1, rtol=0.05)


def test_deterministic_sampling_draws_nothing():
    """Its program has no random bits, and it needs no key. A stochastic sampler without a key is refused."""
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    run = lambda x, key=None: samplers.integrate(samplers.ddim(0.0), lambda x, t: x, transitions, x, key)
    assert "random" not in str(jax.make_jaxpr(run)(jnp.ones((2, 3))))
    assert not samplers.ddim(0.0).stochastic and samplers.ddim(0.1).stochastic and samplers.ddpm_hat().stochastic
    np.testing.assert_array_equal(run(jnp.ones((2, 3))), run(jnp.ones((2, 3)), jax.random.key(0)))
    for sampler in (samplers.ddpm(), samplers.ddpm_hat(), samplers.ddim(0.1)):
        with raises(ValueError, "key"):
            samplers.integrate(sampler, lambda x, t: x, transitions, jnp.ones((2, 3)))


# --- compiled once ---


def test_new_values_trace_nothing_new():
    traces = []

    def network(params, x, t):
        traces.append(None)
        return params * x / (1 + t)

    transitions = lambda *levels: trajectory.descend(LINEAR, [0, *levels])
    run = lambda params, eta, levels, seed=0: samplers.integrate(
        samplers.ddim(eta), Partial(network, params), transitions(*levels), jnp.ones((2, 3)), jax.random.key(seed)
    )
    run(jnp.asarray(1.0), 0.5, (5, 10, 400))
    first = len(traces)
    results = [
        run(jnp.asarray(2.0), 0.5, (5, 10, 400)),
        run(jnp.asarray(2.0), 0.7, (5, 10, 400)),
        run(jnp.asarray(2.0), 0.0, (5, 10, 400)),
        run(jnp.asarray(2.0), 0.7, (1, 500, 1000)),
        run(jnp.asarray(2.0), 0.7, (1, 500, 1000), seed=1),
    ]
    assert len(traces) == first > 0
    assert len({result.tobytes() for result in map(np.asarray, results)}) == 5  # and each value was used
    run(jnp.asarray(1.0), 0.5, (5, 10))
    assert len(traces) > first  # the test would see a new trace


def test_a_plain_function_is_traced_once():
    traces = []

    def eps_fn(x, t):
        traces.append(None)
        return x

    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    samplers.integrate(samplers.ddim(), eps_fn, transitions, jnp.ones((2, 3)))
    first = len(traces)
    samplers.integrate(samplers.ddim(), eps_fn, transitions, 2 * jnp.ones((2, 3)))
    assert len(traces) == first


def test_eta_can_be_mapped_and_a_run_differentiated():
    """An ablation over eta under vmap, and the gradient through the whole run with respect to x_T."""
    eps_fn, transitions = oracle.gaussian(LINEAR, 0.3, 0.5), trajectory.descend(LINEAR, trajectory.uniform(1000, 5))
    run = lambda eta, x: samplers.integrate(samplers.ddim(eta), eps_fn, transitions, x, jax.random.key(0))
    x, etas = jnp.ones((2, 3)), jnp.asarray([0.1, 0.5, 1.0])
    np.testing.assert_allclose(
        jax.vmap(run, (0, None))(etas, x), jnp.stack([run(float(eta), x) for eta in etas]), rtol=1e-5
    )
    slope = jax.grad(lambda x: run(0.5, x).sum())(x)
    np.testing.assert_allclose(slope, run(0.5, x + 1) - run(0.5, x), rtol=1e-3)  # the run is affine in x


@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_memory_does_not_grow_with_S(name):
    sampler, x = registry.build(registry.SAMPLERS[name], {}), jnp.ones((64, 32, 32, 3))
    model = model_for(sampler, golden_network)
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(64))

    def peak(S):
        transitions = jax.tree.map(jnp.asarray, trajectory.descend(LINEAR, trajectory.uniform(1000, S)))
        run = jax.jit(lambda transitions, x, keys: samplers.integrate(sampler, model, transitions, x, keys))
        return run.lower(transitions, x, keys).compile().memory_analysis().temp_size_in_bytes

    tables = 8 * 4 * 990  # the leaves of the transitions themselves
    assert peak(10) > x.nbytes  # the analysis is not 0
    assert peak(1000) <= peak(10) + 2 * tables


# --- errors ---


def test_eta_out_of_its_range_is_refused():
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 10))
    limit = samplers.max_eta(transitions)
    assert 1 <= limit < 1.2
    run = lambda eta: samplers.integrate(
        samplers.DDIM(eta), lambda x, t: x, transitions, jnp.ones((1, 2)), jax.random.key(0)
    )
    assert np.isfinite(run(limit * (1 - 1e-6))).all()
    with raises(ValueError, "eta", "got 1.2"):
        run(1.2)
    for build in (samplers.ddim, run):
        with raises(ValueError, "eta", "got -0.1"):
            build(-0.1)
        with raises(ValueError, "eta", "got nan"):
            build(float("nan"))


def test_a_stochastic_sampler_cannot_encode():
    up = trajectory.ascend(LINEAR, trajectory.uniform(1000, 5))
    for sampler in (samplers.ddim(0.5), samplers.ddpm_hat()):
        with raises(ValueError, "deterministic"):
            samplers.integrate(sampler, lambda x, t: x, up, jnp.ones((1, 2)), jax.random.key(0))
    with raises(ValueError, "evaluate_at", "'nxt'", "'next'"):
        samplers.invert(lambda x, t: x, LINEAR, [0, 5], jnp.ones((1, 2)), evaluate_at="nxt")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_dtype_of_x_is_kept(dtype, x64):
    transitions = trajectory.descend(LINEAR, trajectory.uniform(1000, 3))
    for sampler in (samplers.ddim(0.3), samplers.ddpm_hat()):
        out = samplers.integrate(
            sampler, oracle.gaussian(LINEAR), transitions, jnp.ones((2, 2), dtype), jax.random.key(0)
        )
        assert out.dtype == dtype


@pytest.mark.slow
def test_every_sampler_keeps_a_gaussian_marginal_at_full_length():
    """1,000 steps with the oracle draw from the distribution of the data, for every entry of SAMPLERS."""
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(20_000))
    x = samplers.initial_noise(keys, (1,))
    for build in registry.SAMPLERS.values():
        sampler = registry.build(build, {})
        out = samplers.integrate(
            sampler,
            model_for(sampler, oracle.gaussian(LINEAR, 0.3, 0.5)),
            trajectory.descend(LINEAR, trajectory.uniform(1000, 1000)),
            x,
            keys,
        )
        assert float(out.mean()) == pytest.approx(0.3, abs=0.02) and float(out.std()) == pytest.approx(0.5, abs=0.02)


def test_registry_names_the_nearest():
    with raises(ValueError, "'ddpm-hat'", "'ddpm_hat'"):
        registry.lookup(registry.SAMPLERS, "ddpm-hat")
    assert registry.build(samplers.ddim, {"eta": 0.25, "steps": 3}).eta == 0.25


def test_eight_devices_draw_what_one_draws():
    eps_fn, transitions = oracle.mixture(LINEAR, *MIXTURE), trajectory.descend(LINEAR, trajectory.uniform(1000, 25))

    def draw(mesh):
        keys = samplers.image_keys(jax.random.key(7), sharding.split_batch(mesh, np.arange(16)))
        return samplers.integrate(samplers.ddpm(), eps_fn, transitions, samplers.initial_noise(keys, (2,)), keys)

    one, eight = (draw(mesh) for mesh in meshes())
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_allclose(sharding.to_host(eight), sharding.to_host(one), atol=1e-5)
