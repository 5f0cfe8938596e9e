"""Schedules as functions of real t, and any number of steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import raises
from test_update import KEY, MODEL, begun

from configs import digits
from ddim_jax import config as config_lib
from ddim_jax import gaussian, ode, oracle, registry, samplers, schedule, trajectory
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.models.network import Functions
from ddim_jax.training import objectives, times, train_step

LINEAR, VP, LOG_SNR = schedule.linear(), schedule.vp(), schedule.log_snr()
ALL = {"linear": LINEAR, "cosine": schedule.cosine(), "vp": VP, "log_snr": LOG_SNR}


@given(st.floats(0, 1000))
def test_between_two_levels_of_a_table_lies_their_weighted_geometric_mean(t):
    below, fraction = min(int(t), 999), t - min(int(t), 999)
    alpha_bar = LINEAR.alpha_bar[below] ** (1 - fraction) * LINEAR.alpha_bar[below + 1] ** fraction
    level = LINEAR.level(np.float64(t))
    assert float(level.alpha_bar) == pytest.approx(alpha_bar, rel=1e-12)
    assert float(level.one_minus_alpha_bar) == pytest.approx(1 - alpha_bar, abs=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_an_integer_t_is_a_level(name):
    noise_schedule, t = ALL[name], np.arange(1001)
    for level in (noise_schedule.level(t), noise_schedule.level(t.astype(float))):
        np.testing.assert_allclose(level.alpha_bar, noise_schedule.alpha_bar, rtol=1e-12)
        np.testing.assert_allclose(level.one_minus_alpha_bar, 1 - noise_schedule.alpha_bar, atol=1e-15)
    assert noise_schedule.level(np.array([0.0])) == schedule.Level(np.array([0.0]), np.array([1.0]), np.array([0.0]))


@pytest.mark.parametrize("name", ALL)
def test_small_levels_have_all_digits_in_float32(name):
    """Against float64, and for 1 - alpha_bar, where a subtraction would cancel."""
    noise_schedule, t = ALL[name], np.array([0, 0.01, 0.5, 1, 1.75, 12.5, 333.3, 999.9, 1000], np.float32)
    exact = noise_schedule.level(t.astype(np.float64))
    found = jax.jit(lambda table, t: schedule.level_at(table, t, jnp.zeros((9, 2))))(schedule.levels(noise_schedule), t)
    for actual, expected in zip(found[1:], exact[1:], strict=True):
        assert actual.shape == (9, 1) and actual.dtype == jnp.float32
        np.testing.assert_allclose(actual[:, 0], expected, rtol=3e-5)


def test_vp_is_the_integral_of_its_rate():
    """By the trapezoidal rule, which is exact for a line. And against the linear schedule with 100 times the steps."""
    t = np.linspace(0, 1000, 501)
    rate = 1e-4 + (0.02 - 1e-4) * t / 1000
    integral = np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(t))])
    np.testing.assert_allclose(VP.level(t).alpha_bar, np.exp(-integral), rtol=1e-12)
    fine = schedule.linear(100_000, 1e-6, 2e-4).alpha_bar[::100]
    np.testing.assert_allclose(VP.alpha_bar, fine, rtol=1e-3)


def test_log_snr_is_a_line():
    level = schedule.log_snr(10, 6.0, -4.0).level(np.array([0.5, 2.5, 5.0, 10.0]))
    np.testing.assert_allclose(np.log(level.alpha_bar / level.one_minus_alpha_bar), [5.5, 3.5, 1.0, -4.0], rtol=1e-12)
    with raises(ValueError, "log_snr_min", "log_snr_max"):
        schedule.log_snr(10, 1.0, 2.0)


EVEN = {
    "time": lambda down: down.t,
    "log_snr": lambda down: down.lambda_t,
    "sigma": lambda down: np.sqrt(1 / down.alpha_bar_t - 1),
    "karras": lambda down: (1 / down.alpha_bar_t - 1) ** (1 / 14),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spacing", registry.SPACINGS)
@pytest.mark.parametrize("S", [1, 2, 50, 1700])
def test_levels_are_evenly_spaced(spacing, S, name):
    """In the quantity of the spacing's name, from T on, also for more steps than T."""
    tau = registry.SPACINGS[spacing](ALL[name], S)
    assert len(tau) == S + 1 and tau[0] == 0 and tau[-1] == 1000 and (np.diff(tau) > 0).all()
    if spacing != "time" and S > 1:
        assert tau[1] == 1
    assert trajectory.descend(ALL[name], tau).lambda_step[-1] == np.inf
    gaps = np.diff(EVEN[spacing](trajectory.descend(ALL[name], tau)))
    np.testing.assert_allclose(gaps, gaps.mean() if S > 1 else 0, rtol=1e-6)


@pytest.mark.parametrize("spacing", registry.SPACINGS)
def test_no_steps_are_refused(spacing):
    with raises(ValueError, "num_steps", "got 0"):
        registry.SPACINGS[spacing](LINEAR, 0)


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_more_steps_than_T_converge(name, x64):
    """To the exact flow of Gaussian data, with order one, also for S > T."""
    noise_schedule, mean, std, x = ALL[name], 0.3, 0.5, jnp.asarray([[1.7]])
    last = noise_schedule.alpha_bar[1000]
    exact = mean + std * (1.7 - np.sqrt(last) * mean) / np.sqrt(last * std**2 + 1 - last)
    eps_fn, counts = oracle.gaussian(noise_schedule, mean, std), [500, 1000, 2000, 4000]
    ends = [
        samplers.integrate(
            samplers.ddim(), eps_fn, trajectory.descend(noise_schedule, trajectory.time(noise_schedule, S)), x
        )
        for S in counts
    ]
    errors = [abs(float(end[0, 0]) - exact) for end in ends]
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(1, abs=0.05)


DETERMINISTIC = [name for name in registry.SAMPLERS if not registry.build(registry.SAMPLERS[name], {}).stochastic]


@pytest.mark.parametrize("spacing", ["log_snr", "karras"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_solver_accepts_levels_that_are_not_integers(name, spacing):
    mean, std, x = 0.3, 0.5, jnp.asarray([[1.7]])
    last = VP.alpha_bar[1000]
    exact = mean + std * (1.7 - np.sqrt(last) * mean) / np.sqrt(last * std**2 + 1 - last)
    transitions = trajectory.descend(VP, registry.SPACINGS[spacing](VP, 60))
    sampler = registry.build(registry.SAMPLERS[name], {})
    end = samplers.integrate(sampler, oracle.gaussian(VP, mean, std), transitions, x)
    assert float(end[0, 0]) == pytest.approx(exact, abs=0.1 if name == "ddim" else 0.02)


@pytest.mark.parametrize("name", ["linear", "vp", "log_snr"])
def test_noise_between_the_levels_is_independent(name):
    """eta = 1 in 1,500 steps draws N(0.3, 0.5^2): no noise is used twice, and every image has its own."""
    noise_schedule, count = ALL[name], 4000
    keys = samplers.image_keys(jax.random.key(0), jnp.arange(count))
    transitions = trajectory.descend(noise_schedule, trajectory.log_snr(noise_schedule, 1500))
    x_T = samplers.initial_noise(keys, (1,))
    draw = functools.partial(
        samplers.integrate, samplers.ddim(1.0), oracle.gaussian(noise_schedule, 0.3, 0.5), transitions
    )
    x = draw(x_T, keys)
    assert float(x.mean()) == pytest.approx(0.3, abs=5 * 0.5 / np.sqrt(count))
    assert float(x.std()) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(2 * count) + 0.01)
    np.testing.assert_array_equal(x[7:9], draw(x_T[7:9], keys[7:9]))


def test_every_real_level_has_its_own_noise():
    key = jax.random.key(3)
    draws = [gaussian.noise(key[None], t, (1,))[0, 0] for t in (0, 1, 2, 1000, 1.5, 1.5001, 999.75)]
    assert len({float(draw) for draw in draws}) == 7


def test_the_likelihood_converges_with_more_steps(x64):
    """To that of the exact flow of the VP process from N(0, I)."""
    std, x_0 = 0.5, jnp.asarray([[0.4], [-1.1]])
    alpha_bar = VP.alpha_bar[1000]
    scale = std / np.sqrt(alpha_bar * std**2 + 1 - alpha_bar)
    exact = np.asarray(-((x_0[:, 0] / scale) ** 2) / 2 - np.log(2 * np.pi * scale**2) / 2)
    found = [
        np.asarray(ode.log_likelihood(oracle.gaussian(VP, 0.0, std), VP, trajectory.karras(VP, S), x_0))
        for S in (100, 1600)
    ]
    assert np.abs(found[1] - exact).max() < 1e-3 < np.abs(found[0] - exact).max()


def test_a_network_is_passed_real_timesteps():
    apply = lambda params, x, time, labels, train, rngs: x * 0 + time.reshape(-1, 1)
    echo = Functions((1,), 0, lambda key: {}, apply)

    table, x = schedule.levels(LINEAR), jnp.ones((3, 1))
    eps = lambda t: Denoiser(echo, {})(x, schedule.level_at(table, t, x)).eps
    np.testing.assert_allclose(eps(jnp.array([0.25, 1.5, 999.75]))[:, 0], [0, 0.5, 998.75])
    np.testing.assert_allclose(eps(jnp.float32(17.5))[:, 0], 16.5)


@pytest.mark.slow
def test_training_draws_real_t(mesh):
    """The loss of an update is the one at the real t that the same key draws."""
    frozen = optax.set_to_zero()
    objective = objectives.noise_prediction(MODEL, schedule.vp(100), weight="x0", time=times.real())
    update = train_step.build(objective, frozen, ema_decay=0.9)
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    state = begun(mesh, MODEL, frozen)
    _, metrics = jax.jit(update)(state, images, None, KEY)
    t_key, eps_key, _ = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    t = jax.random.uniform(t_key, (64,), minval=1, maxval=100)
    level = schedule.vp(100).level(np.asarray(t, np.float64))
    # The initial network predicts 0. So the error is eps, weighted by (1 - ab) / ab.
    square = np.square(np.asarray(jax.random.normal(eps_key, images.shape))).mean((1, 2, 3))
    each = square * level.one_minus_alpha_bar / level.alpha_bar
    assert float(metrics.loss) == pytest.approx(each.mean(), rel=1e-4)
    np.testing.assert_array_equal(metrics.bin_counts, np.histogram((t - 1) * 4 / 100, [0, 1, 2, 3, 4])[0])


@settings(max_examples=20)
@given(st.lists(st.floats(0.0078125, 1000, width=32), min_size=1, max_size=12, unique=True))
def test_a_config_may_list_any_levels(levels):
    levels = sorted(levels)
    values = digits.get_config().to_dict()
    values["sample"].update(tau=",".join(map(repr, levels)), sampler="ddpm")
    config = config_lib.parse(values)
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    np.testing.assert_array_equal(process.tau, [0, *levels])
    assert np.isfinite(process.transitions.posterior_variance).all()


def test_more_steps_than_T_by_config():
    values = digits.get_config().to_dict()
    values["sample"].update(tau="karras", steps=2500)
    values["schedule"]["name"] = "vp"
    config = config_lib.parse(values)
    assert len(config_lib.process(config.sample, config_lib.noise_schedule(config.schedule)).tau) == 2501
