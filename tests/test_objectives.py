"""Loss weights, time distributions, optimizers, learning rates and moving averages, against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import meshes
from messages import raises
from test_commands import leaves
from tiny import ONE_LEVEL

from configs import smoke
from ddim_jax import config as config_lib
from ddim_jax import losses, schedule, training
from ddim_jax.models.network import Functions
from ddim_jax.training import objectives, optimizers, times
from ddim_jax.utils.errors import ConfigError

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)
VALUES = smoke.get_config().to_dict()
VALUES["model"] |= ONE_LEVEL | dict(middle_attention=False)


def changed(**fields):
    """The smoke config with these fields of config.train; a double underscore is a dot."""
    values = VALUES
    for name, value in fields.items():
        values = config_lib.with_value(values, f"train.{name.replace('__', '.')}", value)
    return config_lib.parse(values)


# --- loss weights ---

GAMMAS = {  # the weights of the error of eps, as functions of alpha_bar
    "one": lambda ab: np.ones_like(ab),
    "x0": lambda ab: (1 - ab) / ab,
    "v": lambda ab: 1 / ab,
    "min_snr": lambda ab: np.minimum(ab / (1 - ab), 5) / (ab / (1 - ab)),
    "p2": lambda ab: 1 / (1 + ab / (1 - ab)),
    "edm": lambda ab: 1 + 4 * (1 - ab) / ab,
}


def test_every_weight_is_listed():
    assert GAMMAS.keys() == losses.WEIGHTS.keys()


@pytest.mark.parametrize(
    "weight, gamma",
    [
        *((losses.WEIGHTS[name](), gamma) for name, gamma in GAMMAS.items()),
        (losses.weight_min_snr(0.3), lambda ab: np.minimum(ab / (1 - ab), 0.3) / (ab / (1 - ab))),
        (losses.weight_p2(0.5, 2.0), lambda ab: (0.5 + ab / (1 - ab)) ** -2.0),
        (lambda level: level.one_minus_alpha_bar**0.5, lambda ab: (1 - ab) ** 0.5),
    ],
)
def test_the_loss_is_gamma_times_the_error_of_eps(weight, gamma, x64):
    """For a network of a known error."""
    x_0, eps, wrong = (jax.random.normal(key, (6, 4), jnp.float64) for key in jax.random.split(jax.random.key(0), 3))
    t = np.array([1, 10, 100, 300, 700, 1000])
    found = losses.l_gamma(lambda x, t: wrong, TABLE, x_0, t, eps, weight)
    np.testing.assert_allclose(found, gamma(LINEAR.alpha_bar[t]) * ((wrong - eps) ** 2).mean(1), rtol=1e-9)


# --- times ---

T = 20


def drawn(distribution, state=None, count=20_000, seed=0):
    state = distribution.init(T) if state is None else state
    return distribution.draw(state, jax.random.key(seed), (count,), T)


def test_uniform_times():
    t, weights = drawn(times.uniform())
    assert weights is None and jnp.issubdtype(t.dtype, jnp.integer)
    np.testing.assert_allclose(np.bincount(t, minlength=T + 1)[1:] / len(t), 1 / T, atol=0.008)
    t, _ = drawn(times.real())
    assert 1 <= t.min() < 1.01 and T - 0.01 < t.max() <= T and float(t.mean()) == pytest.approx((T + 1) / 2, abs=0.2)


def test_logit_normal_times():
    """Their logit has the normal distribution."""
    t, _ = drawn(times.logit_normal(0.4, 1.7))
    u = (np.asarray(t, np.float64) - 1) / (T - 1)
    logit = np.log(u / (1 - u))
    assert logit.mean() == pytest.approx(0.4, abs=0.05) and logit.std() == pytest.approx(1.7, abs=0.05)


def test_importance_is_learned_from_the_losses():
    """Nichol and Dhariwal's p_t, and the weighted mean of the losses is that under uniform t."""
    distribution, loss_of = times.importance(history=4, uniform_fraction=0.01), np.linspace(0.1, 3, T) ** 2
    state = distribution.init(T)
    t, weights = drawn(distribution, state)
    np.testing.assert_allclose(
        np.bincount(t, minlength=T + 1)[1:] / len(t), 1 / T, atol=0.008
    )  # uniform before the first loss
    np.testing.assert_allclose(weights, 1, rtol=1e-5)
    for _ in range(4):
        state = distribution.observe(state, jnp.arange(1, T + 1), jnp.asarray(loss_of))
    t, weights = drawn(distribution, state)
    p = 0.99 * loss_of / loss_of.sum() + 0.01 / T
    np.testing.assert_allclose(np.bincount(t, minlength=T + 1)[1:] / len(t), p, atol=0.01)
    assert float((weights * loss_of[t - 1]).mean()) == pytest.approx(loss_of.mean(), rel=0.02)


def test_importance_keeps_the_last_losses_of_every_time():
    """Against a loop over the images, also where a batch has a t more often than the length of the history."""
    history, rng = 3, np.random.default_rng(0)
    distribution, seen = times.importance(history), {t: [] for t in range(1, T + 1)}
    state, observe = distribution.init(T), jax.jit(distribution.observe)
    for _ in range(12):
        t, loss = rng.integers(1, 6, 16), rng.uniform(0.1, 1, 16).astype(np.float32)
        loss[3] = np.nan  # it is ignored
        state = observe(state, jnp.asarray(t), jnp.asarray(loss))
        for one, value in zip(t, loss, strict=True):
            seen[one] += [value] if np.isfinite(value) else []
    for t in range(1, 6):
        np.testing.assert_array_equal(np.sort(state.losses[t - 1]), np.sort(seen[t][-history:]))


def test_importance_resumes_exactly(tmp_path):
    """The checkpoints contain the history of the losses."""
    init, apply = lambda key: jnp.eye(3), lambda params, x, time, labels, train, rngs: x @ params
    network, x_0 = Functions((3,), 0, init, apply), np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    objective = objectives.noise_prediction(network, schedule.linear(8), time=times.importance(history=1))
    fit = lambda num_steps, name: training.fit(
        *(network, objective, optax.adam(1e-2), x_0),
        **dict(num_steps=num_steps, batch_size=32, workdir=tmp_path / name, mesh=meshes()[0], progress=False),
    )
    fit(10, "parts")
    parts, whole = fit(20, "parts"), fit(20, "whole")
    np.testing.assert_array_equal(parts.params, whole.params)
    np.testing.assert_array_equal(parts.losses, whole.losses[10:])
    resumed, expected = (leaves(tmp_path / name)[1] for name in ("parts", "whole"))
    assert any("objective" in leaf for leaf in resumed) and resumed.keys() == expected.keys()
    for leaf in resumed:
        np.testing.assert_array_equal(resumed[leaf], expected[leaf], err_msg=leaf)


# --- learning rates and moving averages ---


def test_learning_rates():
    at = lambda rate, k: float(rate(jnp.asarray(k)))
    for name in optimizers.RATES:
        rate = optimizers.RATES[name](0.1, 4, 100)
        np.testing.assert_allclose([at(rate, k) for k in range(4)], [0.025, 0.05, 0.075, 0.1], rtol=1e-6, err_msg=name)
    assert optimizers.constant(0.1, 0, 100) == 0.1
    cosine = optimizers.cosine(0.1, 4, 100, end=0.2)
    assert at(cosine, 4) == pytest.approx(0.1) and at(cosine, 100) == pytest.approx(0.02)
    assert at(cosine, 52) == pytest.approx(0.06)  # the middle
    falling = optimizers.inverse_sqrt(0.1, 25, 1000)
    assert at(falling, 100 + 24) == pytest.approx(0.1 * np.sqrt(25 / 124), rel=0.02)


def test_moving_averages():
    assert optimizers.ema_constant(0.9)(7) == 0.9
    warm = optimizers.ema_warmup(0.9)
    assert [float(warm(k)) for k in (0, 1, 1000)] == pytest.approx([0.1, 2 / 11, 0.9])


@pytest.mark.parametrize("name", [*optimizers.OPTIMIZERS, "optax:adabelief"])
def test_every_optimizer_descends(name):
    """As built from a config, with every schedule of the learning rate."""
    loss = lambda params: sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
    for rate in optimizers.RATES:
        config = changed(optimizer={"name": name, "schedule": rate}, learning_rate=0.05, warmup=2, num_steps=50)
        optimizer = config_lib.optimizer(config.train)
        params = {"w": jnp.full((3, 4), 2.0), "b": jnp.full(4, -1.0)}
        state, before = optimizer.init(params), float(loss(params))

        @jax.jit
        def update(params, state, optimizer=optimizer):
            steps, state = optimizer.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(jnp.add, params, steps), state

        for _ in range(50):
            params, state = update(params, state)
        assert float(loss(params)) < 0.85 * before, rate


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"optimizer__name": "adan"}, ("config.train.optimizer.name", "'adan'", "'adam'")),
        ({"optimizer__beta": 0.9}, ("config.train.optimizer", "beta", "b1")),
        ({"optimizer__b1": "x"}, ("config.train.optimizer.b1", "float", "'x'")),
        ({"optimizer__weight_decay": 0.1}, ("config.train.optimizer", "weight_decay")),
        ({"optimizer__schedule": "cosin"}, ("config.train.optimizer.schedule", "'cosin'", "'cosine'")),
        (
            {"optimizer__schedule": "cosine", "optimizer__schedule_options": {"edn": 0.1}},
            ("config.train.optimizer.schedule_options", "edn", "'end'"),
        ),
        ({"objective__weight": "min_snp"}, ("config.train.objective.weight", "'min_snp'", "'min_snr'")),
        (
            {"objective__weight": "p2", "objective__weight_options": {"k": -1.0}},
            ("config.train.objective.weight_options", "k", "got -1.0"),
        ),
        ({"objective__time": "lognormal"}, ("config.train.objective.time", "'lognormal'", "'logit_normal'")),
        (
            {"objective__time": "importance", "objective__time_options": {"history": 0}},
            ("config.train.objective.time_options", "history", "got 0"),
        ),
        ({"objective__name": "noise"}, ("config.train.objective.name", "'noise'", "noise_prediction")),
        ({"objective__options": {"delta": 1}}, ("config.train.objective", "delta")),
        ({"ema_schedule": "warm"}, ("config.train.ema_schedule", "'warm'", "'warmup'")),
    ],
)
def test_an_error_names_the_field(fields, words):
    with raises(ConfigError, *words):
        config = changed(**fields)
        config_lib.objective(config), config_lib.optimizer(config.train), config_lib.ema_decay(config.train)


def test_a_config_of_an_earlier_version_is_converted():
    """train.gamma and train.real_time are now train.objective.weight and train.objective.time."""
    old = dataclasses.asdict(config_lib.parse(VALUES))
    for field in ("objective", "optimizer", "ema_schedule"):
        del old["train"][field]
    old["train"] |= {"gamma": "v", "real_time": True}
    found = config_lib.parse_saved(old).train
    assert (found.objective.weight, found.objective.time, found.optimizer.name) == ("v", "real", "adam")
    assert found.optimizer == config_lib.parse(VALUES).train.optimizer


def test_zero_terminal_snr_through_a_config():
    values = config_lib.with_value(VALUES, "schedule.zero_terminal_snr", True)
    with raises(ConfigError, "config.schedule.zero_terminal_snr"):
        config_lib.parse(values)
    config = config_lib.parse(config_lib.with_value(values, "model.prediction", "v"))
    noise_schedule = config_lib.noise_schedule(config.schedule)
    process = config_lib.process(config.sample, noise_schedule)
    assert noise_schedule.alpha_bar[-1] == 0 and process.transitions.alpha_bar_t[0] == 0
