"""Invalid arguments of every public function of the mathematics: each raises an error that names the argument. Valid
arguments at the ends of their ranges give the right result.
"""

import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacking import Loud, holds, refuses
from tiny import model_for

from ddim_jax import (
    discrete,
    gaussian,
    guidance,
    inference_process,
    inversion,
    latent,
    losses,
    ode,
    oracle,
    parallel,
    registry,
    samplers,
    schedule,
    trajectory,
)
from ddim_jax.evaluation import frechet
from ddim_jax.models.denoiser import Denoiser

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)
TAU = trajectory.uniform(1000, 5)
DOWN = trajectory.descend(LINEAR, TAU)
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
KEY = jax.random.key(0)
KEYS = samplers.image_keys(KEY, jnp.arange(3))
MASK = np.array([[True, False, False, True]])
DDIM = samplers.ddim()
SLOW = pytest.mark.slow
net = lambda x, t: 0.4 * x
LEVEL = schedule.level_at(TABLE, 5, X)

# --- invalid values of each kind of argument ---

NOT_NUMBERS = st.sampled_from(["10", "", b"1", None, 1j, [], {}, (1, 2), object(), np.array(["1"]), slice(0, 1), len])
SOME_NUMBERS = NOT_NUMBERS.filter(lambda value: not isinstance(value, (list, tuple)))
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf")])
BOOLS = st.sampled_from([True, False, np.True_])
NOT_SCALARS = NOT_NUMBERS | BOOLS | st.sampled_from([np.ones(2), jnp.ones((1,)), [1.0], np.array([1])])
NOT_ARRAYS = NOT_NUMBERS | st.sampled_from([0.5, X.astype(np.int32), X > 0, X.astype(np.complex64), X.tolist()[0][0]])
NOT_SCHEDULES = st.sampled_from([TAU, TABLE, DOWN, None, "linear", 1000, LINEAR.alpha_bar, schedule.linear, KEY]) | (
    st.sampled_from(
        [
            [1.0],
            [1, 0.5, 0.5],
            [1, 0.5, 0.7],
            [0.9, 0.5],
            [1, float("nan")],
            [1, 0.0, 0.0],
            [1, -0.1],
            [1, 1e-320],
            [[1, 0.5]],
            ["1", "0.5"],
            [],
            [1.5, 1, 0.5],
        ]  # fmt: skip
    ).map(schedule.NoiseSchedule)
)
NOT_TAUS = st.sampled_from(
    [LINEAR, None, "uniform", "10", 5, ["0", "5"], [0, 5 + 1j], [0, float("nan")], [0, float("inf")], [0], [], [5, 10],
     [0, 5, 5], [0, 7, 5], [0, 1001], [-1, 5], [[0, 5]], [0, 1e-320], [0, 1e-45], [0, 500, 500 + 1e-9], [False, True],
     {0: 1}, object(), [0, [1, 2]], np.array([0, 5], object)]  # fmt: skip
)  # fmt: skip
NOT_KEYS = st.sampled_from(
    [
        0,
        1.5,
        "key",
        b"key",
        np.zeros(2),
        np.zeros(2, np.int32),
        jnp.zeros(3, jnp.uint32),
        jax.random.split(KEY, 2),
        jax.random.split(KEY, (3, 2)),
        [0, 0],
        object(),
        np.zeros((3, 3), np.uint32),
    ]  # fmt: skip
)
NOT_TABLES = st.sampled_from([LINEAR, None, TAU, "linear", LINEAR.alpha_bar, 1000, DOWN])
NOT_SAMPLERS = st.sampled_from(["ddim", None, net, samplers.ddim, samplers.DDIM, DOWN, 0.5, object(), KEY, TAU])


def integers(low, high=None):
    outside = st.integers(-(2**40), low - 1) | (st.integers(high + 1, 2**40) if high is not None else st.nothing())
    return (
        NOT_SCALARS | NOT_FINITE | outside | st.floats(low, (high or 100) + 1) | st.sampled_from([1.0, np.float32(2)])
    )


def reals(low=None, high=None, low_open=False, high_open=False):
    """Values that are not numbers of an interval."""
    below = st.floats(max_value=low, exclude_max=not low_open) if low is not None else st.nothing()
    above = st.floats(min_value=high, exclude_min=not high_open) if high is not None else st.nothing()
    return NOT_SCALARS | NOT_FINITE | below | above


# function(argument) -> (invalid values, a call with such a value, other names of which the error may contain one)
ENTRIES = {
    # schedules and taus
    "linear(num_steps)": (integers(1, 10**7), schedule.linear),
    "linear(beta_start)": (reals(0, 1, True, True), lambda v: schedule.linear(10, v, 0.9)),
    "linear(beta_end)": (reals(0, 1, True, True), lambda v: schedule.linear(10, 1e-9, v)),
    "scaled_linear(num_steps)": (integers(1, 10**7), schedule.scaled_linear),
    "sigmoid(beta_end)": (reals(0, 1, True, True), lambda v: schedule.sigmoid(10, 1e-9, v)),
    "cosine(num_steps)": (integers(1, 10**7), schedule.cosine),
    "cosine(offset)": (reals(0), lambda v: schedule.cosine(10, v)),
    "cosine(max_beta)": (reals(0, 1, True, True), lambda v: schedule.cosine(10, 0.008, v)),
    "vp(num_steps)": (integers(1, 10**7) | st.integers(10_000, 10**7), schedule.vp, "noise_schedule"),
    "vp(beta_start)": (reals(0, 1, True, True), lambda v: schedule.vp(10, v, 0.9)),
    "log_snr(num_steps)": (integers(1, 10**7), schedule.log_snr),
    "log_snr(log_snr_max)": (reals(-10, 80, True), lambda v: schedule.log_snr(10, v)),
    "log_snr(log_snr_min)": (reals(-80, 13.3, False, True), lambda v: schedule.log_snr(10, 13.3, v)),
    "from_betas(betas)": (
        NOT_NUMBERS
        | st.sampled_from([0.1, [[0.1]], [0.0], [1.0, 0.1], [0.1, float("nan")], ["0.1"], [True], [0.9] * 99, [1e-20]]),
        schedule.from_betas,
        "alpha_bar",
    ),
    "levels(noise_schedule)": (NOT_SCHEDULES, schedule.levels),
    "level(t)": (SOME_NUMBERS | st.sampled_from([-1, 1001, [5, -1], float("nan"), [True]]), LINEAR.level),
    "level of vp(t)": (SOME_NUMBERS | st.sampled_from([-1.0, 1000.5, [5, -1], float("nan")]), schedule.vp().level),
    "level_at(t)": (
        NOT_NUMBERS | st.sampled_from([-1, 1001, np.ones(2), np.array([1.0, float("nan"), 2]), True]),
        lambda v: schedule.level_at(TABLE, v, X),
    ),
    **{
        f"{name}(num_steps)": (integers(1, 1000), lambda v, build=build: build(1000, v))
        for name, build in registry.TAUS.items()
    },
    **{
        f"{name}(num_train_steps)": (integers(10, 10**7), lambda v, build=build: build(v, 10), "num_steps")
        for name, build in registry.TAUS.items()
    },
    **{
        f"{name}(num_steps), real": (integers(1, 10**7), lambda v, build=build: build(LINEAR, v))
        for name, build in registry.SPACINGS.items()
    },
    **{
        f"{name}(noise_schedule)": (NOT_SCHEDULES, lambda v, build=build: build(v, 10))
        for name, build in registry.SPACINGS.items()
    },
    "explicit(tau)": (
        st.sampled_from([None, "10", ["5"], [5, 3], [float("nan")], [], [1001], [[5]], [1e-320], [True], 5, {1: 2}]),
        lambda v: trajectory.explicit(1000, v),
    ),
    "shift_and_truncate(offset)": (
        integers(0, 200),
        lambda v: trajectory.shift_and_truncate(1000, [0, 5, 900], v),
        "tau",
    ),
    "shift_and_truncate(end)": (
        reals(0, 900, False, True),
        lambda v: trajectory.shift_and_truncate(1000, [0, 5, 900], 0, v),
        "tau",
    ),
    "descend(noise_schedule)": (NOT_SCHEDULES, lambda v: trajectory.descend(v, TAU)),
    "descend(tau)": (NOT_TAUS, lambda v: trajectory.descend(LINEAR, v)),
    "descend(end)": (reals(0, 0), lambda v: trajectory.descend(LINEAR, TAU, v), "tau"),
    "ascend(noise_schedule)": (NOT_SCHEDULES, lambda v: trajectory.ascend(v, TAU)),
    "ascend(tau)": (NOT_TAUS, lambda v: trajectory.ascend(LINEAR, v)),
    "transitions(t)": (
        NOT_NUMBERS | st.sampled_from([[5, 4], [3], [1001], [-1], [float("nan")], [1e-320], [[5]], ["5"], 5]),
        lambda v: trajectory.transitions(LINEAR, v, [3]),
    ),
    # samplers and what runs them
    "ddim(eta)": (reals(0), samplers.ddim),
    "DDIM(eta)": (reals(0, 1.1), lambda v: samplers.integrate(samplers.DDIM(v), net, DOWN, X, KEY)),
    "integrate(sampler)": (NOT_SAMPLERS, lambda v: samplers.integrate(v, net, DOWN, X)),
    "integrate(x)": (NOT_ARRAYS, lambda v: samplers.integrate(DDIM, net, DOWN, v)),
    "integrate(key)": (NOT_KEYS | st.none(), lambda v: samplers.integrate(samplers.ddpm(), net, DOWN, X, v)),
    "integrate(key), deterministic": (NOT_KEYS, lambda v: samplers.integrate(DDIM, net, DOWN, X, v)),
    "integrate(transitions)": (
        NOT_TAUS | NOT_SCHEDULES.filter(lambda v: v is not DOWN),
        lambda v: samplers.integrate(DDIM, net, v, X),
    ),
    "trajectory(x)": (NOT_ARRAYS, lambda v: samplers.trajectory(DDIM, net, DOWN, v)),
    "trajectory(model)": (
        st.sampled_from(["x_0", 3, X]),
        lambda v: samplers.trajectory(DDIM, v, DOWN, X),
    ),
    "invert(noise_schedule)": (NOT_SCHEDULES, lambda v: samplers.invert(net, v, TAU, X)),
    "invert(tau)": (NOT_TAUS, lambda v: samplers.invert(net, LINEAR, v, X)),
    "invert(x_0)": (NOT_ARRAYS, lambda v: samplers.invert(net, LINEAR, TAU, v)),
    "invert(evaluate_at)": (
        st.sampled_from(["nxt", None, 1, True, ["next"]]),
        lambda v: samplers.invert(net, LINEAR, TAU, X, v),
    ),
    "image_keys(key)": (NOT_KEYS, lambda v: samplers.image_keys(v, jnp.arange(3))),
    "image_keys(index)": (
        st.sampled_from([3, np.ones(3), np.ones((1, 1), int), [0.5], [True]]),
        lambda v: samplers.image_keys(KEY, v),
    ),
    "initial_noise(keys)": (
        NOT_KEYS.filter(lambda v: np.shape(v) != (2,)) | st.just(KEY),
        lambda v: samplers.initial_noise(v, (4,)),
    ),  # fmt: skip
    "parallel(window)": (integers(0), lambda v: parallel.integrate(DDIM, net, DOWN, X, window=v)),
    "parallel(tolerance)": (reals(0), lambda v: parallel.integrate(DDIM, net, DOWN, X, tolerance=v)),
    "parallel(sharding)": (
        st.sampled_from(["data", 1, KEY]),
        lambda v: parallel.integrate(DDIM, net, DOWN, X, sharding=v),
    ),
    "parallel(x)": (NOT_ARRAYS, lambda v: parallel.integrate(DDIM, net, DOWN, v)),
    "inversion.invert(refine)": (integers(1), lambda v: inversion.invert(net, LINEAR, TAU, X, v)),
    "inversion.invert(x_0)": (NOT_ARRAYS, lambda v: inversion.invert(net, LINEAR, TAU, v, 1)),
    "Implicit(refine)": (
        integers(1),
        lambda v: samplers.run(inversion.Implicit(v), net, trajectory.ascend(LINEAR, TAU), X),
    ),
    "fixed_point(iterations)": (integers(1), lambda v: inversion.fixed_point(lambda x: x / 2, X, v)),
    "dpm_solver_pp(order)": (integers(2, 3), registry.multistep.dpm_solver_pp),
    "log_likelihood(x_0)": (NOT_ARRAYS, lambda v: ode.log_likelihood(net, LINEAR, TAU, v)),
    "backward(eta)": (reals(0, 1.1), lambda v: inference_process.backward(LINEAR, TAU, X, KEY, v)),
    "forward(eta)": (reals(0, 1.1), lambda v: inference_process.forward(LINEAR, TAU, X, KEY, v)),
    "forward(x_0)": (NOT_ARRAYS, lambda v: inference_process.forward(LINEAR, TAU, v, KEY)),
    "forward(key)": (NOT_KEYS, lambda v: inference_process.forward(LINEAR, TAU, X, v)),
    # combinators
    "clip_x0(low)": (reals(None, 1, False, True), lambda v: gaussian.clip_x0(net, v, 1.0)),
    "clip_x0(high)": (reals(-1, None, True), lambda v: gaussian.clip_x0(net, -1.0, v)),
    "clip_x0(low), a table": (NOT_TABLES | st.just(TABLE), lambda v: gaussian.clip_x0(net, v), "low"),
    "threshold_x0(quantile)": (reals(0, 1, True, True), lambda v: gaussian.threshold_x0(net, v, 1.0)),
    "threshold_x0(maximum)": (reals(1), lambda v: gaussian.threshold_x0(net, 0.5, v)),
    "guided(scale)": (
        NOT_NUMBERS.filter(lambda v: not isinstance(v, tuple)) | NOT_FINITE | BOOLS,
        lambda v: guidance.guided(net, net, v)(X, LEVEL),
    ),  # fmt: skip
    "inpainted(mask)": (
        st.sampled_from(
            [
                np.array([[np.nan, 0, 0, 1]]),
                np.array([[2, 0, 0, 1]]),
                np.array([[0.5, 0, 0, 1]]),
                np.ones((2, 4), bool),
                np.ones((1, 3), bool),
                np.ones((1, 3, 4), bool),
                "mask",
                None,
                np.array([["a"]]),
            ]  # fmt: skip
        ),
        lambda v: guidance.inpainted(net, X, v),
    ),
    "inpainted(known)": (
        NOT_ARRAYS | st.just(np.where(MASK, np.nan, X)),
        lambda v: guidance.inpainted(net, v, MASK),
    ),
    # the rest
    "q_sigma(sigma2)": (
        reals(0, 0.7),
        lambda v: gaussian.q_sigma(X, X, jax.tree.map(lambda leaf: leaf[3], DOWN), v),
    ),
    "slerp(fraction)": (reals(0, 1), lambda v: latent.slerp(X[0], X[1], v)),
    "slerp(a)": (
        NOT_NUMBERS | st.sampled_from([X[0] * 0, X[0] * np.nan, X[0][:2], X[0].astype(int)]),
        lambda v: latent.slerp(v, X[1], 0.5),
    ),
    "line(count)": (integers(2), lambda v: latent.line(X[0], X[1], v)),
    "grid(rows)": (integers(2), lambda v: latent.grid(np.ones((4, 2), np.float32), v, 2)),
    "grid(columns)": (integers(2), lambda v: latent.grid(np.ones((4, 2), np.float32), 2, v)),
    "grid(corners)": (NOT_ARRAYS | st.just(X), lambda v: latent.grid(v, 2, 2)),
    "l_gamma(t)": (
        NOT_NUMBERS | st.sampled_from([5, np.array([5]), np.array([0, 1, 2]), np.array([1, 2, 1001]), [1, 2, np.nan]]),
        lambda v: losses.l_gamma(net, TABLE, X, v, X),
    ),
    "l_gamma(x_0)": (NOT_ARRAYS, lambda v: losses.l_gamma(net, TABLE, v, np.array([1, 2, 3]), X)),
    "l_gamma(eps)": (
        NOT_ARRAYS | st.sampled_from([X[:1], X[:, :1]]),
        lambda v: losses.l_gamma(net, TABLE, X, np.array([1, 2, 3]), v),
    ),
    "l_gamma(gamma)": (
        st.sampled_from(["eps", None, 1, ["one"]]),
        lambda v: losses.l_gamma(net, TABLE, X, np.array([1, 2, 3]), X, v),
    ),
    "j_sigma(eta)": (reals(0, 1.1, True), lambda v: losses.j_sigma(net, DOWN, X, KEYS, v)),
    "j_sigma(decoder)": (
        st.sampled_from(["laplace", None, 1]),
        lambda v: losses.j_sigma(net, DOWN, X, KEYS, decoder=v),
    ),
    "j_sigma(keys)": (NOT_KEYS, lambda v: losses.j_sigma(net, DOWN, X, v)),
    "j_sigma(transitions)": (
        st.sampled_from(
            [
                TAU,
                trajectory.ascend(LINEAR, TAU),
                trajectory.descend(LINEAR, [5, 9], end=5),
                trajectory.transitions(LINEAR, [900, 300], [500, 0]),
            ]
        ),  # fmt: skip
        lambda v: losses.j_sigma(net, v, X, KEYS),
    ),
    "gamma_exact(sigma2)": (reals(0, None, True), lambda v: losses.gamma_exact(DOWN, v)),
    "discrete_ddim(fraction)": (reals(0, 1), discrete.discrete_ddim),
    "discrete.initial(shape)": (
        st.sampled_from([(), (1,), (3, 1), (3, 0), (2.5,)]),
        lambda v: discrete.initial(KEYS, v),
    ),
    "discrete.j_sigma(transitions)": (
        st.sampled_from([TAU, trajectory.ascend(LINEAR, TAU), trajectory.descend(LINEAR, [5, 9], end=5)]),
        lambda v: discrete.j_sigma(net, v, np.eye(3, dtype=np.float32), KEYS),
    ),
    "oracle.gaussian(std)": (
        NOT_NUMBERS | NOT_FINITE | st.floats(max_value=-1e-9),
        lambda v: oracle.gaussian(LINEAR, 0.0, v)(X, 5),
    ),
    "oracle.mixture(weights)": (
        st.sampled_from([[0.0, 0.0], [-1.0, 2.0], [np.nan, 1], "ab", [1.0]]),
        lambda v: oracle.mixture(LINEAR, [[1.0], [2.0]], [0.1, 0.2], v),
    ),
    "Denoiser(prediction)": (st.sampled_from(["epsilon", None, 1]), lambda v: Denoiser(None, {}, v)),
    "zero_terminal_snr(noise_schedule)": (NOT_SCHEDULES | st.just(schedule.vp()), schedule.zero_terminal_snr),
    "descend(stride)": (integers(0), lambda v: trajectory.descend(LINEAR, TAU, 0, v)),
}


@pytest.mark.parametrize("entry", ENTRIES)
@hypothesis.given(st.data())
@hypothesis.settings(max_examples=12, suppress_health_check=list(hypothesis.HealthCheck))
def test_an_invalid_argument_is_named(entry, data):
    wrong, call, *others = ENTRIES[entry]
    value = data.draw(wrong, "value")
    message = refuses(lambda: call(value))
    name = entry.split("(")[1].split(")")[0]
    if not any(word in message for word in (name, *others)):
        raise Loud(f"the line does not name {name}: {message}")


@hypothesis.given(
    st.sampled_from(trajectory.Transition._fields),
    st.sampled_from([np.nan, -0.1, -np.inf, 1.5, "short", "long", "square", "text", "scalar", None]),
    st.sampled_from(["integrate", "trajectory", "parallel", "j_sigma"]),
)
@hypothesis.settings(max_examples=60)
def test_transitions_built_by_hand(field, value, runner):
    """Transitions with one invalid leaf."""
    right = np.array(getattr(DOWN, field), np.float64)
    of_shape = {"short": right[:-1], "long": np.append(right, 0.5), "square": right[None], "scalar": right[0]}
    if isinstance(value, float):
        wrong = np.where(np.arange(5) == 2, value, right)
        if field.startswith("lambda") and not np.isnan(value) or field in "ts" and value > 0:
            return  # lambda may have any sign, and the timestep passed to the network any value
    else:
        wrong = np.array(["a"] * 5) if value == "text" else None if value is None else of_shape[value]
    built = DOWN._replace(**{field: wrong})
    run = {
        "integrate": lambda: samplers.integrate(DDIM, net, built, X),
        "trajectory": lambda: samplers.trajectory(DDIM, net, built, X),
        "parallel": lambda: parallel.integrate(DDIM, net, built, X),
        "j_sigma": lambda: losses.j_sigma(net, built, X, KEYS),
    }[runner]
    refuses(run, "transitions")


def test_inconsistent_levels_and_levels_that_are_equal_in_float32():
    built = DOWN._replace(alpha_bar_t=DOWN.alpha_bar_t * 0.5)
    refuses(lambda: samplers.integrate(DDIM, net, built, X), "one_minus_alpha_bar_t")
    flat = schedule.from_betas([0.1, *[1e-12] * 8, 0.2])
    steps = trajectory.descend(flat, np.arange(11))
    holds(np.isfinite(samplers.integrate(DDIM, net, steps, X)))
    for name in ("ab2", "ab4", "plms", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc"):
        refuses(lambda name=name: samplers.integrate(registry.SAMPLERS[name](), net, steps, X), "transitions", "9", "8")


def test_exchanged_arguments():
    runs = [
        lambda: trajectory.descend(TAU, LINEAR),
        lambda: trajectory.ascend(TAU, LINEAR),
        lambda: trajectory.time(10, LINEAR),
        lambda: trajectory.uniform(LINEAR, 10),
        lambda: samplers.invert(net, TAU, LINEAR, X),
        lambda: samplers.integrate(net, DDIM, DOWN, X),
        lambda: samplers.integrate(DDIM, DOWN, net, X),
        lambda: samplers.integrate(DDIM, net, X, DOWN),
        lambda: samplers.integrate(DDIM, net, DOWN, KEY, X),
        lambda: gaussian.clip_x0(-1.0, net),
        lambda: guidance.inpainted(net, MASK, X),
        lambda: guidance.inpainted(X, net, MASK),
        lambda: guidance.guided(net, 2.0, net),
        lambda: inversion.invert(net, TAU, LINEAR, X),
        lambda: inference_process.forward(TAU, LINEAR, X, KEY),
        lambda: inference_process.forward(LINEAR, TAU, KEY, X),
        lambda: losses.l_gamma(TABLE, net, X, np.array([1, 2, 3]), X),
        lambda: losses.j_sigma(net, X, DOWN, KEYS),
        lambda: latent.line(3, X[0], X[1]),
        lambda: samplers.image_keys(jnp.arange(3), KEY),
    ]
    for run in runs:
        refuses(run)


# --- eta, up to its limit ---

SETTINGS = [
    (name, spacing, S)
    for name in ("linear", "cosine", "scaled_linear", "vp", "log_snr")
    for spacing in ("uniform", "quadratic", "leading", "karras")
    for S in (4, 25, 250)
]


def setting(name, spacing, S):
    noise_schedule = registry.SCHEDULES[name]()
    over = noise_schedule if spacing in registry.SPACINGS else noise_schedule.num_steps
    return noise_schedule, trajectory.descend(noise_schedule, registry.NAMED_TAUS[spacing](over, S))


@pytest.mark.parametrize("name, spacing, S", SETTINGS[:: len(SETTINGS) // 51 or 1])
def test_the_largest_eta(name, spacing, S):
    """At the limit the step is equal to its value in float64. The next representable number raises an error."""
    noise_schedule, down = setting(name, spacing, S)
    limit = samplers.max_eta(down)
    holds(limit >= 1)
    x, noise = X, np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    tightest = int(np.argmin(down.one_minus_alpha_bar_s[:-1] / down.posterior_variance[:-1]))
    step = jax.jit(
        lambda eta, transition: samplers.DDIM(eta).step(x, (), transition, gaussian.as_denoise(net), noise)[0]
    )
    at = jax.tree.map(lambda leaf: leaf[tightest], down)
    for eta in (limit, np.float32(limit), np.nextafter(np.float32(limit), np.float32(np.inf))):
        found = step(eta, samplers.rounded(at, jnp.float32))
        sigma = min(limit, float(eta)) * np.sqrt(at.posterior_variance)
        kept = np.sqrt(max(at.one_minus_alpha_bar_s - sigma**2, 0))
        x_0 = (x - np.sqrt(at.one_minus_alpha_bar_t) * 0.4 * x) / np.sqrt(at.alpha_bar_t)
        expected = np.sqrt(at.alpha_bar_s) * x_0 + kept * 0.4 * x + sigma * noise
        holds(np.abs(found - expected) <= 2e-3 * (1 + np.abs(expected)), f"{eta!r}: {found} is not {expected}")
    samplers.ddim(limit).check(down)
    above = np.nextafter(limit, np.inf)
    refuses(lambda: samplers.integrate(samplers.ddim(above), net, down, X, KEY), "eta")


def test_the_largest_eta_of_a_whole_run_under_jit_and_vmap():
    eps_fn = oracle.gaussian(LINEAR, 0.3, 0.5)
    down = trajectory.descend(LINEAR, trajectory.uniform(1000, 10))
    limit = samplers.max_eta(down)
    run = lambda eta: samplers.integrate(samplers.ddim(eta), eps_fn, down, X, KEY)
    whole = run(limit)
    holds(np.isfinite(whole))
    holds(np.abs(whole - run(limit * (1 - 1e-9))) < 1e-2)
    for found in (jax.jit(run)(limit), jax.vmap(run)(jnp.array([0.0, limit]))[1]):
        holds(np.allclose(found, whole, atol=1e-5))
    holds(np.isnan(jax.jit(run)(1.01 * limit)).any(), "a traced eta beyond the limit must give NaN")
    one = trajectory.descend(LINEAR, [0, 1000])
    holds(samplers.max_eta(one) == np.inf)
    for eta in (5.0, 1e30, 1e300):
        single = samplers.integrate(samplers.ddim(eta), eps_fn, one, X, KEY)
        holds(np.allclose(single, samplers.integrate(DDIM, eps_fn, one, X), rtol=1e-5), f"{eta} in a single step")


@pytest.mark.parametrize("name, spacing, S", [("linear", "uniform", 10), pytest.param("vp", "karras", 5, marks=SLOW)])
def test_the_gradient_with_respect_to_eta(name, spacing, S):
    """It is finite in float32, also at 0 and at the limit. In float64 it is equal to central differences."""
    noise_schedule, down = setting(name, spacing, S)
    eps_fn, limit = oracle.gaussian(noise_schedule, 0.3, 0.5), samplers.max_eta(down)

    def end(eta, dtype):
        return (samplers.integrate(samplers.ddim(eta), eps_fn, down, jnp.asarray(X, dtype), KEY) ** 2).sum()

    for eta in (0.0, 0.5, limit):
        slopes = [derive(end)(eta, jnp.float32) for derive in (jax.grad, jax.jacfwd)]
        holds(np.isfinite(slopes), f"{eta}: {slopes}")
        # At the limit the square root of a variance of about 0 has no derivative that both modes agree on.
        holds(eta == limit or np.isclose(slopes[0], slopes[1], rtol=1e-3, atol=1e-3), f"{eta}: {slopes}")
    with jax.enable_x64(True):
        h = 1e-5
        traced = jax.jit(end, static_argnums=1)
        for eta in (0.0, 0.2, 0.9):
            slope = float(jax.grad(end)(eta, jnp.float64))
            expected = (float(traced(eta + h, jnp.float64)) - float(traced(eta - h, jnp.float64))) / (2 * h)
            holds(abs(slope - expected) < 1e-5 * (1 + abs(expected)), f"{eta}: {slope} is not {expected}")
            compiled = jax.jit(jax.value_and_grad(end), static_argnums=1)(eta, jnp.float64)[1]
            holds(abs(slope - compiled) < 1e-9 * (1 + abs(slope)), f"{eta}: {slope} is not {compiled}")


# --- half precision ---


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=SLOW)])
@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_half_precision_with_a_network_of_any_dtype(name, dtype):
    """Every sampler, on a schedule whose alpha_bar is 0 in float16. The result is that of a run in float32 with a
    network that gets x in half precision.
    """
    sampler, cosine = registry.build(registry.SAMPLERS[name], {"eta": 0.7}), schedule.cosine()
    down, exact = trajectory.descend(cosine, trajectory.uniform(1000, 8)), oracle.gaussian(cosine, 0.3, 0.5)
    x = jnp.asarray(X, dtype)
    for output in ("float32", dtype) if name == "ddim" else ("float32",):
        eps_fn = lambda x, t, output=output: exact(x.astype(dtype).astype(jnp.float32), t).astype(output)
        model = model_for(sampler, eps_fn)
        expected = samplers.integrate(sampler, model, down, x.astype(jnp.float32), KEY)
        found = samplers.integrate(sampler, model, down, x, KEY)
        rounding = 2 * jnp.finfo(dtype).eps
        holds(found.dtype == dtype and np.allclose(found.astype(jnp.float32), expected, rounding, rounding), f"{found}")


def test_half_precision_of_other_functions(dtype="float16"):
    x, cosine = jnp.asarray(X, dtype), schedule.cosine()
    tau, table = trajectory.uniform(1000, 5), schedule.levels(cosine)
    eps_fn, down = oracle.gaussian(cosine, 0.3, 0.5), trajectory.descend(cosine, tau)
    results = {
        "invert": samplers.invert(eps_fn, cosine, tau, x),
        "implicit": inversion.invert(eps_fn, cosine, tau, x, 2).x_T,
        "x_0": samplers.trajectory(DDIM, eps_fn, down, x)[1].x_0,
        "parallel": parallel.integrate(DDIM, eps_fn, down, x).x,
        "clipped": samplers.integrate(DDIM, gaussian.clip_x0(eps_fn), down, x),
        "forward": inference_process.forward(cosine, tau, x, KEY),
    }
    for name, found in results.items():
        holds(found.dtype == dtype and np.isfinite(found.astype(jnp.float32)), f"{name}: {found}")
    for name, found in {
        "l_gamma": losses.l_gamma(eps_fn, table, x, np.array([1, 500, 1000]), x),
        "j_sigma": losses.j_sigma(eps_fn, down, x, KEYS),
    }.items():
        holds(np.isfinite(found), f"{name}: {found}")


# --- the Frechet distance ---


def exact_distance(a, b):
    """The distance of three points each, in fractions. The nuclear norm of a 3x3 matrix M of rank 2 is
    `sqrt(tr M M^T + 2 sqrt(sum of the principal minors of M M^T))`.
    """
    a, b = ([[Fraction(value) for value in row] for row in features.tolist()] for features in (a, b))
    means = [[sum(column) / 3 for column in zip(*features, strict=True)] for features in (a, b)]
    a, b = (
        [[value - mean for value, mean in zip(row, centre, strict=True)] for row in features]
        for features, centre in zip((a, b), means, strict=True)
    )
    dot = lambda x, y: sum(i * j for i, j in zip(x, y, strict=True))
    M = [[dot(x, y) / 2 for y in b] for x in a]
    G = [[dot(x, y) for y in M] for x in M]
    minors = sum(G[i][i] * G[j][j] - G[i][j] ** 2 for i, j in ((0, 1), (0, 2), (1, 2)))
    root = lambda value: Fraction(math.isqrt(value.numerator * 10**80 // value.denominator), 10**40)
    nuclear = root(G[0][0] + G[1][1] + G[2][2] + 2 * root(minors))
    spread = sum(dot(x, x) for x in (*a, *b)) / 2
    return float(sum((x - y) ** 2 for x, y in zip(*means, strict=True)) + spread - 2 * nuclear)


@hypothesis.given(st.integers(0, 2**31), st.integers(5, 40), st.sampled_from([1.0, 1e-3, 1e4]))
@hypothesis.settings(max_examples=25)
def test_the_frechet_distance_of_fewer_images_than_features(seed, D, scale):
    """The relative error is at most 1e-10 for features of all scales, also if the moments are merged from two parts."""
    rng = np.random.default_rng(seed)
    scales = scale * 10.0 ** rng.uniform(-3, 1, D)
    a, b = (rng.normal(size=(3, D)) * scales + shift for shift in (0, 0.1 * scale))
    expected = exact_distance(a, b)
    parts = frechet.merged(frechet.scatter(a[:1]), frechet.scatter(a[1:]))
    for of_a in (frechet.moments(a), frechet.moments(parts)):
        for found in (frechet.distance(of_a, frechet.moments(b)), frechet.distance(frechet.moments(b), of_a)):
            holds(abs(found - expected) <= 1e-10 * expected, f"{found} is not {expected}")
