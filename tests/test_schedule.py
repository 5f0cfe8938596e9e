import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import raises

from ddim_jax import registry, schedule

NAMED = [name for name, build in registry.SCHEDULES.items() if "num_steps" in inspect.signature(build).parameters]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_every_schedule_decreases_from_one(name, num_steps):
    alpha_bar = registry.SCHEDULES[name](num_steps).alpha_bar
    assert alpha_bar.shape == (num_steps + 1,) and alpha_bar.dtype == np.float64
    assert alpha_bar[0] == 1 and (np.diff(alpha_bar) < 0).all() and alpha_bar[-1] > 0


def test_linear_is_that_of_ho_et_al():
    """beta_1 and beta_T, and alpha_bar_T by a sum of logarithms instead of a product."""
    alpha_bar = schedule.linear().alpha_bar
    assert alpha_bar[1] == 1 - 1e-4
    assert 1 - alpha_bar[1000] / alpha_bar[999] == pytest.approx(0.02, rel=1e-12)
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    assert np.log(alpha_bar[1000]) == pytest.approx(sum(np.log1p(-beta) for beta in betas), rel=1e-12)


def test_scaled_linear_and_sigmoid_at_points_known_by_symmetry():
    beta = lambda noise_schedule, t: 1 - noise_schedule.alpha_bar[t] / noise_schedule.alpha_bar[t - 1]
    middle = beta(schedule.scaled_linear(101, 1e-4, 0.04), 51)
    assert middle == pytest.approx(((0.01 + 0.2) / 2) ** 2)  # the mean of the roots, squared
    assert beta(schedule.sigmoid(101, 1e-4, 0.04), 51) == pytest.approx((1e-4 + 0.04) / 2)  # the logistic curve at 0


def test_cosine_is_that_of_nichol_and_dhariwal():
    """Their Eq. (17) for all levels but the last, whose beta is bounded."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = schedule.cosine().alpha_bar
    t = np.arange(999)
    np.testing.assert_allclose(alpha_bar[:999], f(t) / f(0), rtol=1e-9)
    assert 1 - alpha_bar[1000] / alpha_bar[999] == pytest.approx(0.999)


@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=50))
def test_from_betas_has_these_betas(betas):
    alpha_bar = schedule.from_betas(betas).alpha_bar
    np.testing.assert_allclose(1 - alpha_bar[1:] / alpha_bar[:-1], betas, atol=1e-14)


@pytest.mark.parametrize(
    "betas, words",
    [
        ([0.1, 0.0], ("beta", "2", "0.0")),
        ([1.0, 0.1], ("beta", "1", "1.0")),
        ([], ("betas",)),
        ([[0.1]], ("betas", "shape")),
        ([float("nan")], ("betas", "got nan")),
        ([0.9] * 100, ("float32",)),
    ],
)
def test_betas_outside_their_range_are_refused(betas, words):
    with raises(ValueError, *words):
        schedule.from_betas(betas)


@pytest.mark.parametrize("name", NAMED)
def test_no_steps_are_refused(name):
    with raises(ValueError, "num_steps", "got 0"):
        registry.SCHEDULES[name](0)


def test_beta_end_below_beta_start_is_refused():
    with raises(ValueError, "beta_start", "beta_end", "0.02", "0.0001"):
        schedule.linear(10, 0.02, 1e-4)


def test_levels_have_all_digits_in_float32():
    """1 - alpha_bar_1 = 1e-4 would have four correct digits after a subtraction in float32."""
    noise_schedule = schedule.linear()
    level = schedule.level_at(schedule.levels(noise_schedule), jnp.asarray(1), jnp.zeros((2, 3)))
    assert abs(float(level.one_minus_alpha_bar) / 1e-4 - 1) < 1e-7
    assert abs(float(1 - level.alpha_bar) / 1e-4 - 1) > 1e-5


def test_level_at_broadcasts_against_a_batch():
    table = schedule.levels(schedule.linear())
    x = jnp.zeros((3, 4, 4, 1))
    assert schedule.level_at(table, jnp.asarray(5), x).alpha_bar.shape == ()
    level = schedule.level_at(table, jnp.asarray([0, 5, 1000]), x)
    assert level.alpha_bar.shape == (3, 1, 1, 1)
    np.testing.assert_allclose(level.alpha_bar[:, 0, 0, 0], table.alpha_bar[[0, 5, 1000]], rtol=1e-6)
