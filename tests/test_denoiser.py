"""x_0 and eps from networks that predict eps, x_0 or v."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from messages import raises

from ddim_jax import gaussian, guidance, inversion, losses, oracle, parallel, registry, samplers, schedule, trajectory
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.models.network import Network

MEAN, STD = 0.3, 0.5
COSINE = schedule.cosine()
ZERO = schedule.zero_terminal_snr(COSINE)


@dataclasses.dataclass(frozen=True, eq=False)
class Exact(Network):
    """The optimal network for data N(MEAN, STD^2), which predicts x_0 or v."""

    prediction: str
    noise_schedule: schedule.NoiseSchedule

    def apply(self, params, x, time, labels, train, rngs):
        table = schedule.levels(self.noise_schedule)
        level = schedule.level_at(table, time + 1, x)
        variance = level.alpha_bar * STD**2 + level.one_minus_alpha_bar
        gain = jnp.sqrt(level.alpha_bar) * STD**2 / variance
        x_0 = MEAN + gain * (x - jnp.sqrt(level.alpha_bar) * MEAN)
        if self.prediction == "x0":
            return x_0
        slope = jnp.sqrt(level.one_minus_alpha_bar) / variance  # of eps in x - sqrt(alpha_bar) MEAN
        eps = slope * (x - jnp.sqrt(level.alpha_bar) * MEAN)
        return jnp.sqrt(level.alpha_bar) * eps - jnp.sqrt(level.one_minus_alpha_bar) * x_0


def exact(prediction, noise_schedule):
    lowest = jax.tree.map(jnp.asarray, noise_schedule.level(1))
    return Denoiser(Exact((1,), 0, prediction, noise_schedule), {}, prediction, lowest=lowest)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("noise_schedule", [COSINE, ZERO], ids=["cosine", "zero terminal SNR"])
def test_x_0_at_T_is_precise_in_float32(prediction, noise_schedule):
    """A conversion to eps and back had an error of 2.4e-3 on the cosine schedule."""
    x = np.random.default_rng(0).normal(size=(50, 3))

    def x_0(dtype):
        x_T = jnp.asarray(x, dtype)
        level = schedule.level_at(schedule.levels(noise_schedule), noise_schedule.num_steps, x_T)
        return exact(prediction, noise_schedule)(x_T, level).x_0

    found = x_0(jnp.float32)
    with jax.enable_x64(True):
        expected = np.asarray(x_0(jnp.float64))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("tau", ["uniform", "trailing"])
def test_the_law_of_samples_without_signal_at_T(prediction, tau, x64):
    """With the optimal network each step is affine. So the mean and the deviation of the samples are known: with many
    steps they are those of the data.
    """
    transitions = trajectory.descend(ZERO, registry.TAUS[tau](1000, 500))
    x_T = jnp.asarray([[0.0], [1.0]])
    low, high = samplers.integrate(samplers.ddim(), exact(prediction, ZERO), transitions, x_T)[:, 0]
    assert float(low) == pytest.approx(MEAN, abs=1e-3) and float(high - low) == pytest.approx(STD, abs=5e-3)
    for eta in (0.0, 1.0):
        keys = samplers.image_keys(jax.random.key(1), jnp.arange(4000))
        noise = samplers.initial_noise(keys, (1,), jnp.float64)
        drawn = samplers.integrate(samplers.ddim(eta), exact(prediction, ZERO), transitions, noise, keys)
        assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.03) and float(drawn.std()) == pytest.approx(
            STD, abs=0.03
        )


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_encoding_to_a_level_without_signal(prediction, x64):
    """With the optimal network the latent of a value is its standard score."""
    tau, x_0 = trajectory.uniform(1000, 1000), jnp.asarray([[MEAN], [MEAN + STD], [MEAN - 2 * STD]])
    x_T = samplers.invert(exact(prediction, ZERO), ZERO, tau, x_0)
    np.testing.assert_allclose(x_T[:, 0], [0, 1, -2], atol=0.02)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("gamma", losses.WEIGHTS)
def test_training_without_signal_at_T(prediction, gamma):
    """The loss and its gradient are finite at T. The error of the optimal network is that of the posterior mean."""
    x_0, eps = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 3)), jnp.float32) for i in range(2))
    t = jnp.asarray([1, 500, 999, 1000])
    network = Partial(lambda scale, x, level: exact(prediction, ZERO).predict(x * scale, level))
    loss = lambda scale: losses.l_gamma(
        gaussian.Denoise(lambda x, level: network(scale, x, level)), schedule.levels(ZERO), x_0, t, eps, gamma
    )
    value, slope = loss(jnp.float32(1.0)), jax.jacobian(loss)(jnp.float32(1.0))
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    if gamma == "x0":
        np.testing.assert_allclose(
            value[3], ((x_0[3] - MEAN) ** 2).mean(), rtol=1e-5
        )  # the posterior mean at T is MEAN


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, time, labels=None, train=False):
        return 0.3 * x


@pytest.mark.parametrize(
    "run",
    [
        lambda f, down: samplers.integrate(samplers.ddim(), f, down, jnp.ones((2, 3))),
        lambda f, down: samplers.integrate(samplers.ddim(), gaussian.clip_x0(f), down, jnp.ones((2, 3))),
        lambda f, down: samplers.integrate(
            samplers.ddim(), guidance.guided(exact("v", ZERO), f, 2.0), down, jnp.ones((2, 3))
        ),
        lambda f, down: losses.l_gamma(
            f, schedule.levels(ZERO), jnp.ones((2, 3)), jnp.asarray([1, 2]), jnp.ones((2, 3))
        ),
    ],
    ids=["integrate", "clip_x0", "guided", "l_gamma"],
)
@pytest.mark.parametrize("model", [lambda x, t: 0.3 * x, Denoiser(Linear(), {})], ids=["eps_fn", "Denoiser"])
def test_a_network_of_eps_is_refused_without_signal(run, model):
    down = trajectory.descend(ZERO, trajectory.uniform(1000, 5))
    with raises(ValueError, "alpha_bar = 0"):
        run(model, down)


def test_methods_that_divide_by_alpha_bar_refuse_a_schedule_that_ends_at_0():
    down, x, model = trajectory.descend(ZERO, trajectory.uniform(1000, 8)), jnp.ones((2, 3)), exact("v", ZERO)
    for name in ("heun", "ab2", "plms", "dpm_solver_pp_2m", "unipc"):
        with raises(ValueError, "transitions", "alpha_bar"):
            samplers.integrate(registry.SAMPLERS[name](), model, down, x)
    for run in (
        lambda: parallel.integrate(samplers.ddim(), model, down, x),
        lambda: inversion.invert(model, ZERO, trajectory.uniform(1000, 8), x),
        *(lambda name=name: registry.SPACINGS[name](ZERO, 5) for name in ("log_snr", "sigma", "karras")),
    ):
        with raises(ValueError, "alpha_bar"):
            run()


def test_encoding_with_a_network_of_x_0_needs_the_lowest_level():
    model = Denoiser(Linear(), {}, "x0")
    with raises(ValueError, "lowest", "alpha_bar"):
        samplers.invert(model, COSINE, [0, 500, 1000], jnp.ones((2, 3)))


def test_encoding_at_the_next_timestep_with_a_network_of_x_0(x64):
    """One step from t = 0, Eq. (13): x_0 is the image, eps follows from the network's output at the lowest level."""
    model, lowest = exact("x0", COSINE), COSINE.level(1)
    x, s = np.random.default_rng(0).normal(size=(2, 3)), 500
    output = model.network.apply({}, x, jnp.full(2, s - 1), None, False, None)
    eps = gaussian.predict_eps(x, output, lowest)
    x_s = samplers.invert(model, COSINE, [0, s], x, evaluate_at="next")
    np.testing.assert_allclose(x_s, gaussian.q_marginal(x, eps, COSINE.level(s)), rtol=1e-12)


def test_no_combinator_holds_a_schedule():
    """Their leaves are their own arguments: bounds, a scale, pixels."""
    model = oracle.gaussian(schedule.vp())
    held = lambda combined: sum(np.size(leaf) for leaf in jax.tree.leaves(combined))
    own = held(gaussian.as_denoise(model))
    assert held(gaussian.clip_x0(model)) == own + 2 and held(gaussian.threshold_x0(model, 0.9, 2.0)) == own + 2
    assert held(guidance.guided(model, model, 2.0)) == 2 * own + 1
    assert held(guidance.inpainted(model, jnp.ones((2, 3)), np.ones((1, 3), bool))) == own + 6 + 3


def test_zero_terminal_snr_is_that_of_lin(x64):
    """Algorithm 1 of Lin et al. 2023: sqrt(alpha_bar) is shifted and scaled; its first value is unchanged."""
    for noise_schedule in (schedule.linear(), schedule.scaled_linear(beta_start=0.00085, beta_end=0.012), COSINE):
        before, after = (
            np.sqrt(noise_schedule.alpha_bar[1:]),
            np.sqrt(schedule.zero_terminal_snr(noise_schedule).alpha_bar),
        )
        assert after[0] == 1 and after[-1] == 0 and after[1] == pytest.approx(before[0], rel=1e-12)
        np.testing.assert_allclose(
            np.diff(after[1:]) / np.diff(before), np.full(999, before[0] / (before[0] - before[-1]))
        )
    np.testing.assert_allclose(schedule.from_betas([0.1, 0.5, 1.0]).alpha_bar, [1, 0.9, 0.45, 0])


def test_between_the_last_two_levels_alpha_bar_falls_to_0():
    table = schedule.levels(ZERO)
    t = np.array([998.5, 999.0, 999.25, 999.75, 1000.0])
    host, traced = ZERO.level(t), jax.jit(lambda t: table.at(t, jnp.float32))(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(host.alpha_bar[1:] / ZERO.alpha_bar[999], [1, 0.75, 0.25, 0])
    np.testing.assert_allclose(traced.alpha_bar, host.alpha_bar, rtol=1e-4)
    np.testing.assert_allclose(traced.one_minus_alpha_bar, host.one_minus_alpha_bar, rtol=1e-6)
