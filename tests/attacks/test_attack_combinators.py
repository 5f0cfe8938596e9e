"""Combinators around every kind of function, under everything that runs steps, beside the same written by hand; and
functions whose parameters changed.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from attacking import holds, refuses
from jax.tree_util import Partial

from ddim_jax import gaussian, guidance, inversion, ode, oracle, parallel, samplers, schedule, trajectory

LINEAR = schedule.linear()
TABLE = schedule.levels(LINEAR)
TAU = trajectory.quadratic(1000, 6)
DOWN, UP = trajectory.descend(LINEAR, TAU), trajectory.ascend(LINEAR, TAU)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
KNOWN, MASK = np.float32(RNG.uniform(-1, 1, (3, 4))), np.array([[True, False, False, True]])


def network(scale, x, t):
    return scale * x * (1 + t / 500)


class Network:
    def __init__(self, scale):
        self.scale = jnp.float32(scale)

    def eps(self, x, t):
        return network(self.scale, x, t)


def plain(x, t):
    return network(0.4, x, t)


FUNCTIONS = {
    "function": plain,
    "Partial": Partial(network, jnp.float32(0.4)),
    "lambda": lambda x, t: network(0.4, x, t),
    "method": Network(0.4).eps,
    "functools.partial": functools.partial(network, 0.4),
}
COMBINATORS = {
    "clip_x0": lambda f: gaussian.clip_x0(f, -0.5, 0.6),
    "threshold_x0": lambda f: gaussian.threshold_x0(f, 0.6, 1.5),
    "guided": lambda f: guidance.guided(f, lambda x, t: network(0.1, x, t), 1.7),
    "inpainted": lambda f: guidance.inpainted(f, KNOWN, MASK),
}
RUNNERS = {
    "integrate": lambda f: samplers.integrate(samplers.ddim(), f, DOWN, X),
    "trajectory": lambda f: samplers.trajectory(samplers.ddim(), f, DOWN, X)[0],
    "parallel": lambda f: parallel.integrate(samplers.ddim(), f, DOWN, X, tolerance=0.0).x,
    "invert": lambda f: samplers.invert(f, LINEAR, TAU, X),
}


def threshold_by_hand(x_0):
    s = np.clip(np.quantile(np.abs(x_0), 0.6, axis=1), 1, 1.5)[:, None]
    return np.clip(x_0, -s, s) / s


CHANGES = {  # of the predicted x_0
    "clip_x0": lambda x_0: np.clip(x_0, -0.5, 0.6),
    "threshold_x0": threshold_by_hand,
    "inpainted": lambda x_0: np.where(MASK, KNOWN, x_0),
}


@functools.cache
def by_hand(combinator, up):
    """DDIM's steps in float64 of NumPy, Eq. (12) at eta = 0."""
    x, alpha_bar = X.astype(np.float64), LINEAR.alpha_bar
    steps = list(zip(TAU[:-1], TAU[1:], strict=True)) if up else list(zip(TAU[:0:-1], TAU[-2::-1], strict=True))
    for t, s in steps:
        eps = network(0.4, x, t)
        if combinator == "guided":
            eps = network(0.1, x, t) + 1.7 * (eps - network(0.1, x, t))
        elif t > 0:
            x_0 = CHANGES[combinator]((x - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t]))
            eps = (x - np.sqrt(alpha_bar[t]) * x_0) / np.sqrt(1 - alpha_bar[t])
        x_0 = (x - np.sqrt(1 - alpha_bar[t]) * eps) / np.sqrt(alpha_bar[t])
        x = np.sqrt(alpha_bar[s]) * x_0 + np.sqrt(1 - alpha_bar[s]) * eps
    return x


@pytest.mark.parametrize("function", ["function", "Partial", "lambda", "method"])
@pytest.mark.parametrize("combinator", COMBINATORS)
def test_around_every_function_under_everything_that_runs(combinator, function):
    combined = COMBINATORS[combinator](FUNCTIONS[function])
    for name, run in RUNNERS.items():
        found, expected = run(combined), by_hand(combinator, name == "invert")
        holds(np.abs(found - expected) <= 1e-4 * (1 + np.abs(expected)), f"{name}: {found} is not {expected}")


@pytest.mark.parametrize("outer, inner", zip(COMBINATORS, [*COMBINATORS][1:] + [*COMBINATORS][:1], strict=True))
def test_around_each_other(outer, inner):
    """The same of plain functions and of Partials."""
    run = lambda name: RUNNERS["integrate"](COMBINATORS[outer](COMBINATORS[inner](FUNCTIONS[name])))
    holds(np.allclose(run("function"), run("Partial"), rtol=1e-5, atol=1e-5), f"{outer} around {inner}")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_where_steps_are_solved_or_weighed(function):
    """The rest of what takes an eps_fn: the same of each kind of function as of the Partial."""
    eps_fn, reference = FUNCTIONS[function], FUNCTIONS["Partial"]
    for run in (
        lambda f: inversion.invert(f, LINEAR, TAU, X, refine=3).x_T,
        lambda f: ode.log_likelihood(f, LINEAR, TAU, X),
        lambda f: guidance.guided(reference, f, 2.0)(X, schedule.level_at(TABLE, 7, X)).eps,
    ):
        holds(np.allclose(run(eps_fn), run(reference), rtol=1e-4, atol=1e-4), function)


# --- parameters that change ---


def fresh(scale):
    return RUNNERS["integrate"](Partial(network, jnp.float32(scale)))


def test_a_closure_whose_array_was_replaced():
    scale = jnp.float32(0.4)
    eps_fn = lambda x, t: network(scale, x, t)
    for value in (0.4, 0.7, 0.2):
        scale = jnp.float32(value)
        holds(np.allclose(RUNNERS["integrate"](eps_fn), fresh(value), rtol=1e-5), f"closure at {value}")


GLOBAL = {}


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.float32])
def test_a_global_that_was_replaced(kind, monkeypatch):
    eps_fn = lambda x, t: network(GLOBAL["scale"], x, t)
    for value in (0.4, 0.7):
        monkeypatch.setitem(globals(), "GLOBAL", {"scale": kind(value)})
        holds(np.allclose(RUNNERS["integrate"](eps_fn), fresh(value), rtol=1e-5), f"global at {value}")


def test_an_object_whose_parameters_were_replaced():
    """Of a method, and in a tree of parameters whose dict is the same; under a combinator too."""
    net = Network(0.4)
    tree = {"layer": {"scale": jnp.float32(0.4)}}
    of_tree = lambda x, t: network(tree["layer"]["scale"], x, t)
    for value in (0.4, 0.7, 0.4):
        net.scale = tree["layer"]["scale"] = jnp.float32(value)
        for eps_fn in (net.eps, of_tree):
            holds(np.allclose(RUNNERS["integrate"](eps_fn), fresh(value), rtol=1e-5), f"object at {value}")
        clipped = [COMBINATORS["clip_x0"](f) for f in (net.eps, Partial(network, jnp.float32(value)))]
        holds(np.allclose(*map(RUNNERS["integrate"], clipped), rtol=1e-5, atol=1e-6), f"clipped at {value}")


def test_what_did_not_change_is_compiled_once():
    traces, scale = [], jnp.float32(0.4)

    def eps_fn(x, t):
        traces.append(None)
        return network(scale, x, t)

    net = Network(0.4)
    for _ in range(3):
        RUNNERS["integrate"](eps_fn)
        before = samplers._scan._cache_size()
        RUNNERS["integrate"](net.eps)
    holds(len(traces) == 1, f"traced {len(traces)} times")
    holds(samplers._scan._cache_size() == before, "a method was compiled again")


def test_an_object_that_cannot_be_hashed_is_refused_with_the_remedy():
    class Unhashable:
        __hash__ = None

        def __call__(self, x, t):
            return x

    for call in (RUNNERS["integrate"], RUNNERS["invert"], COMBINATORS["clip_x0"], COMBINATORS["guided"]):
        refuses(lambda call=call: call(Unhashable()), "model", "Partial")


# --- what a function must not return ---

WRONG_OUTPUTS = {
    "one value": lambda x, t: jnp.float32(0.1),
    "a row for all": lambda x, t: x[:1],
    "another axis": lambda x, t: x[:, None] * jnp.ones((1, 2, 1)),
    "fewer columns": lambda x, t: x[:, :1],
    "integers": lambda x, t: jnp.ones(x.shape, jnp.int32),
    "complex": lambda x, t: x * 1j,
    "a tuple": lambda x, t: (x, x),
    "a number": lambda x, t: 0.1,
    "nothing": lambda x, t: None,
    "a dict": lambda x, t: {"sample": x},
}


@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_outputs_that_only_broadcast_are_refused(name):
    wrong = WRONG_OUTPUTS[name]
    for run in RUNNERS.values():
        refuses(lambda run=run: run(wrong), "model", "return")
    for combinator in COMBINATORS.values():
        refuses(lambda combinator=combinator: RUNNERS["integrate"](combinator(wrong)), "model", "return")
    refuses(lambda: RUNNERS["integrate"](guidance.guided(plain, wrong, 2.0)), "unguided", "return")
    refuses(lambda: samplers.integrate(ode.SigmaEuler(), wrong, DOWN, X), "model", "return")


@pytest.mark.parametrize("wrong", ["eps", 3, None, jnp.ones(3), {"a": 1}, oracle.gaussian(LINEAR)(X, 5)])
def test_what_cannot_be_called_is_refused(wrong):
    for run in (*RUNNERS.values(), *COMBINATORS.values()):
        refuses(lambda run=run: run(wrong), "model")
