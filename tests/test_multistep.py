"""Solvers of higher order against the exact solution. test_parity compares them with those of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import raises

from ddim_jax import multistep, registry, samplers, trajectory
from experiments import solvers


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        return solvers.run(*solvers.REFERENCE)


def error(name, steps, exact):
    return np.sqrt(np.square(solvers.run(name, steps) - exact).mean())


# The corrector of UniPC raises the order 2 of its predictor by one.
ORDERS = {"ddim": 1, "heun": 2, "ab2": 2, "ab4": 4, "plms": 2, "dpm_solver_pp_2m": 2, "dpm_solver_pp_3m": 3, "unipc": 3}


def test_the_order_of_every_deterministic_sampler():
    assert {name: solvers.sampler(name).order for name in solvers.SOLVERS} == ORDERS


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_the_order_is_the_fitted_one(name, exact, x64):
    """The slope of the error over the number of steps."""
    errors = [error(name, steps, exact) for steps in solvers.FITTED]
    slope = np.polyfit(np.log(solvers.FITTED), np.log(errors), 1)[0]
    assert -slope == pytest.approx(solvers.sampler(name).order, abs=0.15)


def test_at_twenty_calls_the_best_is_far_below_ddim(exact, x64):
    errors = {name: error(name, solvers.steps_of(name, 20), exact) for name in solvers.SOLVERS}
    assert min(errors.values()) < errors["ddim"] / 5 and max(errors, key=errors.get) == "ddim", errors


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4, unique_by=lambda value: round(value, 1)),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
)
def test_the_polynomial_goes_through_all_points(at, outputs):
    with jax.enable_x64(True):
        found = multistep.polynomial(multistep.Memory(jnp.asarray(at), jnp.asarray(outputs)[:, None]))
    values = [sum(float(c[0]) * (u - at[0]) ** k for k, c in enumerate(found)) for u in at]
    np.testing.assert_allclose(values, outputs, atol=1e-6)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_the_initial_memory_has_no_weight(known):
    """The polynomial through the known points and the initial memory is that through the known points."""
    at, outputs = jnp.array([1.0, 1.5, 2.5]), jnp.array([[3.0], [-1.0], [2.0]])[..., None]
    _, initial = multistep.ab4().init(jnp.zeros((1, 1)))
    join = lambda new, old: jnp.concatenate([new[:known], old])[:4]
    memory = multistep.Memory(join(at, initial.at), join(outputs, initial.outputs))
    found = [float(c[0, 0]) for c in multistep.polynomial(memory)]
    fewer = multistep.polynomial(multistep.Memory(at[:known], outputs[:known]))
    assert len(found) == len(memory.at) == min(4, known + 3)
    np.testing.assert_allclose(found, [float(c[0, 0]) for c in fewer] + [0] * (len(found) - known), atol=1e-6)


def test_an_unknown_order_is_refused():
    with raises(ValueError, "order", "2", "3", "got 4"):
        multistep.dpm_solver_pp(4)


@pytest.mark.parametrize("name", [name for name in solvers.SOLVERS if name != "ddim"])
def test_steps_that_skip_a_level_or_ascend_are_refused(name):
    noise_schedule = registry.SCHEDULES["linear"]()
    sampler = registry.build(registry.SAMPLERS[name], {})
    for transitions in (
        trajectory.transitions(noise_schedule, [900, 700, 500, 300, 100], [700, 500, 300, 200, 0]),
        trajectory.ascend(noise_schedule, trajectory.uniform(1000, 10)),
    ):
        with raises(ValueError, "transitions"):
            samplers.integrate(sampler, lambda x, t: x, transitions, jnp.ones((1, 2)))
