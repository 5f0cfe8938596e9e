import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_jax import registry, schedule

NAMED = [name for name, build in registry.SCHEDULES.items() if "num_steps" in inspect.signature(build).parameters]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("num_steps", [1, 10, 1000])
def test_every_schedule_falls_from_one(name, num_steps):
    alpha_bar = registry.SCHEDULES[name](num_steps).alpha_bar
    assert alpha_bar.shape == (num_steps + 1,) and alpha_bar.dtype == np.float64
    assert alpha_bar[0] == 1 and (np.diff(alpha_bar) < 0).all() and alpha_bar[-1] > 0


def test_linear_is_the_published_one():
    """beta_1 and beta_T as Ho et al. give them, and alpha_bar_T by a sum of logarithms instead of a product."""
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


def test_cosine_is_the_curve_until_the_last_beta():
    """Nichol and Dhariwal, Eq. (17), where no beta is cut: all but the last level."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = schedule.cosine().alpha_bar
    t = np.arange(999)
    np.testing.assert_allclose(alpha_bar[:999], f(t) / f(0), rtol=1e-9)
    assert 1 - alpha_bar[1000] / alpha_bar[999] == pytest.approx(0.999)


@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=50))
def test_from_betas_gives_them_back(betas):
    alpha_bar = schedule.from_betas(betas).alpha_bar
    np.testing.assert_allclose(1 - alpha_bar[1:] / alpha_bar[:-1], betas, atol=1e-14)


@pytest.mark.parametrize(
    "betas, said",
    [
        ([0.1, 0.0], r"beta\[2\] = 0.0"),
        ([1.0, 0.1], "beta"),
        ([], "at least one"),
        ([[0.1]], "shape"),
        ([float("nan")], "nan"),
        ([0.9] * 100, "float32"),
    ],
)
def test_betas_outside_their_range_are_refused(betas, said):
    with pytest.raises(ValueError, match=said):
        schedule.from_betas(betas)


@pytest.mark.parametrize("name", NAMED)
def test_no_steps_are_refused(name):
    with pytest.raises(ValueError, match="num_steps"):
        registry.SCHEDULES[name](0)


def test_a_falling_range_of_betas_is_refused():
    with pytest.raises(ValueError, match="beta_start <= beta_end"):
        schedule.linear(10, 0.02, 1e-4)


def test_levels_keep_what_float32_loses():
    """1 - alpha_bar_1 = 1e-4 has four digits if it is subtracted in float32."""
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
