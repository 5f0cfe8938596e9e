from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import raises

from ddim_jax import registry, schedule, trajectory

EXACT = [name for name in registry.TAUS if not name.startswith("official")]
sizes = st.integers(1, 1200).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


@pytest.mark.parametrize("name", registry.TAUS)
@given(size=sizes)
def test_every_tau_ascends_from_zero_within_T(name, size):
    T, S = size
    tau = registry.TAUS[name](T, S)
    assert tau[0] == 0 and (np.diff(tau) > 0).all() and tau[-1] <= T
    if name in EXACT:
        assert len(tau) == S + 1
    if name in ("uniform", "quadratic", "trailing"):
        assert tau[-1] == T


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("T", [1, 7, 1000])
def test_T_steps_visit_all_levels(name, T):
    assert registry.TAUS[name](T, T).tolist() == list(range(T + 1))


@given(size=sizes)
def test_uniform_is_the_floor_of_exact_fractions(size):
    T, S = size
    assert trajectory.uniform(T, S).tolist() == [int(Fraction(T, S) * i) for i in range(S + 1)]


def test_quadratic_where_the_parabola_is_steep_enough():
    """c = 1000 / 20^2 = 2.5: floor(2.5 i^2) by hand."""
    assert trajectory.quadratic(1000, 20)[:8].tolist() == [0, 2, 10, 22, 40, 62, 90, 122]
    assert trajectory.quadratic(1000, 10).tolist() == [0, 10, 40, 90, 160, 250, 360, 490, 640, 810, 1000]
    assert trajectory.quadratic(1000, 50)[:6].tolist() == [0, 1, 2, 3, 6, 10]  # c = 0.4 repeats 0 and then 1


def test_the_spacings_of_diffusers():
    """0-based time steps for T = 1000, S = 10, as its documentation lists them, one added."""
    assert trajectory.leading(1000, 10).tolist() == [0, 1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
    assert trajectory.trailing(1000, 10).tolist() == list(range(0, 1001, 100))
    assert trajectory.linspace(1000, 10).tolist() == [0, 1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]


def test_the_official_step_sets():
    """The lengths in the official code: `range(0, 1000, 1000 // S)`, and the distinct entries of its quadratic list."""
    assert len(trajectory.official_uniform(1000, 300)) - 1 == 334
    assert trajectory.official_uniform(1000, 10).tolist() == [0, *range(1, 1000, 100)]
    for S, repeated in [(10, 0), (20, 0), (50, 1), (100, 4), (1000, 312)]:
        tau = trajectory.official_quadratic(1000, S)
        assert len(tau) - 1 == S - repeated and tau[-1] in (800, 801)


def test_S_of_300_gives_300_steps_to_T():
    tau = trajectory.uniform(1000, 300)
    assert len(tau) == 301 and tau[-1] == 1000


@pytest.mark.parametrize("name", registry.TAUS)
@pytest.mark.parametrize("S", [0, -1, 1001])
def test_a_number_of_steps_outside_1_to_T_is_refused(name, S):
    with raises(ValueError, "num_steps", "1..1000", f"got {S}"):
        registry.TAUS[name](1000, S)


@pytest.mark.parametrize(
    "levels, words",
    [
        ([5, 3], ("5", "3")),
        ([3, 3], ("3",)),
        ([], ("step",)),
        ([1001], ("1..1000", "got 1001")),
        ([-1, 4], ("0", "-1")),
        ([2.5, 2.5], ("2.5",)),
        ([1000.5], ("1..1000", "got 1000.5")),
        ([float("nan")], ("got nan",)),
        ([float("inf")], ("got inf",)),
        ([0], ("step",)),
    ],
)
def test_levels_that_do_not_ascend_are_refused(levels, words):
    with raises(ValueError, "tau", *words):
        trajectory.explicit(1000, levels)


def test_explicit_takes_any_ascending_levels():
    assert (
        trajectory.explicit(1000, [1, 7, 1000]).tolist()
        == trajectory.explicit(1000, [0, 1, 7, 1000]).tolist()
        == [0, 1, 7, 1000]
    )


def published_respacing(T, spec):
    """What the READMEs of improved-diffusion and guided-diffusion describe, in plain Python, in 0-based time."""
    if isinstance(spec, str):
        wanted = int(spec.removeprefix("ddim"))
        return next((list(range(0, T, r)) for r in range(1, T + 1) if len(range(0, T, r)) == wanted), None)
    kept, begin = [], 0
    for i, count in enumerate(spec):
        length = T // len(spec) + (1 if i < T % len(spec) else 0)
        if count > length:
            return None
        position = 0.0
        for _ in range(count):
            kept.append(begin + round(position))
            position += (length - 1) / (count - 1) if count > 1 else 1
        begin += length
    return kept


@given(T=st.integers(1, 1100), sections=st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_respaced_is_the_published_spacing(T, sections):
    expected = published_respacing(T, sections)
    if expected is None:
        with raises(ValueError, "sections"):
            trajectory.respaced(T, sections)
        return
    assert trajectory.respaced(T, sections).tolist() == [0, *(t + 1 for t in expected)]
    assert trajectory.parse(T, f"respaced:{','.join(map(str, sections))}").tolist() == [0, *(t + 1 for t in expected)]


@given(size=sizes)
def test_with_stride_is_the_published_spacing(size):
    T, S = size
    expected = published_respacing(T, f"ddim{S}")
    if expected is None:
        with raises(ValueError, "num_steps", f"got {S}"):
            trajectory.with_stride(T, S)
        return
    assert trajectory.parse(T, f"ddim{S}").tolist() == [0, *(t + 1 for t in expected)]


def test_published_numbers_of_steps():
    """250 of 4000 and 1000 timesteps, and the example of their READMEs: 10, 15 and 20 of 300."""
    assert [len(trajectory.parse(T, "respaced:250")) - 1 for T in (1000, 4000)] == [250, 250]
    tau = trajectory.parse(300, "respaced:10,15,20")
    assert [sum((tau > low) & (tau <= low + 100)) for low in (0, 100, 200)] == [10, 15, 20]
    assert trajectory.parse(1000, "ddim50").tolist() == [0, *range(1, 1000, 20)]


@pytest.mark.parametrize("text", ["", "ddim", "ddim5x", "respaced:", "respaced:x", "quadratic", "a:b", "ddim-5"])
def test_other_texts_are_not_numbers(text):
    assert trajectory.parse(1000, text) is None


@pytest.mark.parametrize(
    "text", ["ddim0", "ddim300", "ddim1001", "respaced:1001", "respaced:0,5", "respaced:" + "9" * 50]
)
def test_respacing_that_does_not_exist(text):
    with raises(ValueError):
        trajectory.parse(1000, text)


def test_descend_and_ascend_are_the_same_pairs():
    noise_schedule, tau = schedule.linear(), [0, 3, 10, 400]
    down, up = trajectory.descend(noise_schedule, tau), trajectory.ascend(noise_schedule, tau)
    assert list(zip(down.t, down.s, strict=True)) == [(400, 10), (10, 3), (3, 0)]
    assert list(zip(up.t, up.s, strict=True)) == [(0, 3), (3, 10), (10, 400)]
    assert down.alpha_bar_s[-1] == 1 and down.one_minus_alpha_bar_s[-1] == 0 and down.posterior_variance[-1] == 0
    assert (up.posterior_variance == 0).all() and (up.beta == 0).all()


@given(st.integers(2, 1000))
def test_differences_have_all_digits(t):
    """beta and the posterior variance of t -> t - 1 from the betas, as exact fractions."""
    betas = [Fraction(float(beta)) for beta in np.linspace(1e-4, 0.02, 1000)]
    keep = Fraction(1)
    for beta in betas[: t - 1]:
        keep *= (1 - beta).limit_denominator(10**18)
    down = trajectory.descend(schedule.linear(), [0, t - 1, t])
    exact = (1 - keep) / (1 - keep * (1 - betas[t - 1])) * betas[t - 1]
    assert float(down.beta[0]) == pytest.approx(float(betas[t - 1]), rel=1e-11)
    assert float(down.posterior_variance[0]) == pytest.approx(float(exact), rel=1e-11)


def test_tau_is_shifted_and_truncated():
    tau = trajectory.leading(1000, 4)
    assert trajectory.shift_and_truncate(1000, tau).tolist() == tau.tolist() == [0, 1, 251, 501, 751]
    assert trajectory.shift_and_truncate(1000, tau, offset=1, end=1).tolist() == [1, 2, 252, 502, 752]
    assert trajectory.shift_and_truncate(1000, tau, end=1).tolist() == [1, 251, 501, 751]  # no step from 1 to 1
    with raises(ValueError, "tau", "1..1000", "got 1001"):
        trajectory.shift_and_truncate(1000, tau, offset=250)
    with raises(ValueError, "tau", "step"):
        trajectory.shift_and_truncate(1000, [0, 1], end=1)


def test_a_run_ends_above_level_0_only_with_end():
    noise_schedule = schedule.linear()
    down = trajectory.descend(noise_schedule, [1, 2, 500], end=1)
    assert list(zip(down.t, down.s, strict=True)) == [(500, 2), (2, 1)]
    assert down.alpha_bar_s[-1] == noise_schedule.alpha_bar[1]
    assert trajectory.ascend(noise_schedule, [1, 2, 500], end=1).t.tolist() == [1, 2]
    with raises(ValueError, "tau", "0", "got 1"):
        trajectory.descend(noise_schedule, [1, 2, 500])
    with raises(ValueError, "tau", "1", "got 0"):
        trajectory.descend(noise_schedule, [0, 2, 500], end=1)


def test_any_pairs_are_steps():
    steps = trajectory.transitions(schedule.linear(), [1000, 889, 3], [900, 789, 5])
    assert steps.t.tolist() == [1000, 889, 3] and steps.beta[2] == 0 and steps.beta[0] > 0


@pytest.mark.parametrize(
    "t, s, words",
    [
        ([5], [5], ("t", "s", "5")),
        ([5, 4], [3], ("t", "s", "2", "1")),
        ([1001], [5], ("t", "0..1000", "got 1001")),
        ([5], [-1], ("s", "0..1000", "got -1")),
        (["5"], ["1"], ("t", "numbers")),
        ([5.0], [-0.5], ("s", "0..1000", "got -0.5")),
    ],
)
def test_invalid_pairs_of_levels_are_refused(t, s, words):
    with raises(ValueError, *words):
        trajectory.transitions(schedule.linear(), t, s)
