"""Solvers of higher order, against the exact solution; test_parity has them beside those of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddim_jax import multistep, registry, samplers, trajectory
from experiments import solvers


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        return solvers.run(*solvers.REFERENCE)


def error(name, steps, exact):
    return np.sqrt(np.square(solvers.run(name, steps) - exact).mean())


def test_every_deterministic_sampler_has_a_claimed_order():
    deterministic = {name for name, build in registry.SAMPLERS.items() if not registry.build(build, {}).stochastic}
    assert deterministic == set(solvers.CLAIMED)


@pytest.mark.parametrize("name", solvers.CLAIMED)
def test_the_order_is_the_claimed_one(name, exact, x64):
    """The slope of the error over the number of steps."""
    errors = [error(name, steps, exact) for steps in solvers.FITTED]
    slope = np.polyfit(np.log(solvers.FITTED), np.log(errors), 1)[0]
    assert -slope == pytest.approx(solvers.CLAIMED[name], abs=0.15)


def test_at_twenty_calls_the_best_is_far_below_ddim(exact, x64):
    errors = {name: error(name, solvers.steps_of(name, 20), exact) for name in solvers.CLAIMED}
    assert min(errors.values()) < errors["ddim"] / 5 and max(errors, key=errors.get) == "ddim", errors


@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4, unique_by=lambda value: round(value, 1)),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
)
def test_the_polynomial_goes_through_all_points(at, said):
    with jax.enable_x64(True):
        found = multistep.polynomial(multistep.Memory(jnp.asarray(at), jnp.asarray(said)[:, None]))
    values = [sum(float(c[0]) * (u - at[0]) ** k for k, c in enumerate(found)) for u in at]
    np.testing.assert_allclose(values, said, atol=1e-6)


@pytest.mark.parametrize("known", [1, 2, 3])
def test_what_was_never_said_counts_for_nothing(known):
    """With so many points, the polynomial through all four is that through the known ones."""
    at, said = jnp.array([1.0, 1.5, 2.5]), jnp.array([[3.0], [-1.0], [2.0]])
    memory = multistep._empty(jnp.zeros((1, 1), jnp.float32), 5)
    for i in reversed(range(known)):
        memory = multistep._without_last(multistep._with(memory, at[i], said[i][:, None]))
    found = [float(c[0, 0]) for c in multistep.polynomial(memory)]
    fewer = multistep.polynomial(multistep.Memory(at[:known], said[:known, :, None]))
    np.testing.assert_allclose(found, [float(c[0, 0]) for c in fewer] + [0] * (4 - known), atol=1e-6)


def test_orders_that_do_not_exist():
    with pytest.raises(ValueError, match="order must be .* 2 or 3, got 4"):
        multistep.dpm_solver_pp(4)


@pytest.mark.parametrize("name", [name for name in solvers.CLAIMED if name != "ddim"])
def test_steps_that_leave_a_level_out_or_ascend_are_refused(name):
    noise_schedule = registry.SCHEDULES["linear"]()
    sampler = registry.build(registry.SAMPLERS[name], {})
    for transitions in (
        trajectory.transitions(noise_schedule, [900, 700, 500, 300, 100], [700, 500, 300, 200, 0]),
        trajectory.ascend(noise_schedule, trajectory.uniform(1000, 10)),
    ):
        with pytest.raises(ValueError, match="descends from level to level"):
            samplers.integrate(sampler, lambda x, t: x, transitions, jnp.ones((1, 2)))
