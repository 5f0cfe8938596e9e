"""Combinators around every kind of function, in every function that runs steps, compared with the same steps in NumPy.
Functions whose parameters change between calls.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from attacking import holds, refuses
from conftest import COMPILATIONS
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


def dynamic_threshold(x_0):
    s = np.clip(np.quantile(np.abs(x_0), 0.6, axis=1), 1, 1.5)[:, None]
    return np.clip(x_0, -s, s) / s


CHANGES = {  # what each combinator does to the predicted x_0
    "clip_x0": lambda x_0: np.clip(x_0, -0.5, 0.6),
    "threshold_x0": dynamic_threshold,
    "inpainted": lambda x_0: np.where(MASK, KNOWN, x_0),
}


@functools.cache
def reference(combinator, up):
    """The steps of DDIM, Eq. (12) with eta = 0, in float64 in NumPy. up: in the order of increasing t."""
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
def test_every_combinator_around_every_function(combinator, function):
    combined = COMBINATORS[combinator](FUNCTIONS[function])
    for name, run in RUNNERS.items():
        found, expected = run(combined), reference(combinator, name == "invert")
        holds(np.abs(found - expected) <= 1e-4 * (1 + np.abs(expected)), f"{name}: {found} is not {expected}")


@pytest.mark.parametrize("outer, inner", [*zip(COMBINATORS, [*COMBINATORS][1:] + [*COMBINATORS][:1], strict=True)])
def test_one_combinator_around_another(outer, inner):
    """Equal results for a plain function and for a Partial."""
    run = lambda name: RUNNERS["integrate"](COMBINATORS[outer](COMBINATORS[inner](FUNCTIONS[name])))
    holds(np.allclose(run("function"), run("Partial"), rtol=1e-5, atol=1e-5), f"{outer} around {inner}")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_functions_that_take_an_eps_fn(function):
    """Equal results for each kind of function and for the Partial."""
    eps_fn, partial = FUNCTIONS[function], FUNCTIONS["Partial"]
    for run in (
        lambda f: inversion.invert(f, LINEAR, TAU, X, refine=3).x_T,
        lambda f: ode.log_likelihood(f, LINEAR, TAU, X),
        lambda f: guidance.guided(partial, f, 2.0)(X, schedule.level_at(TABLE, 7, X)).eps,
    ):
        holds(np.allclose(run(eps_fn), run(partial), rtol=1e-4, atol=1e-4), function)


# --- parameters that change ---


def integrated_with(scale):
    """The result of a new Partial with this parameter."""
    return RUNNERS["integrate"](Partial(network, jnp.float32(scale)))


def test_a_closure_whose_array_was_replaced():
    scale = jnp.float32(0.4)
    eps_fn = lambda x, t: network(scale, x, t)
    for value in (0.4, 0.7, 0.2):
        scale = jnp.float32(value)
        holds(np.allclose(RUNNERS["integrate"](eps_fn), integrated_with(value), rtol=1e-5), f"closure at {value}")


GLOBAL = {}


@pytest.mark.parametrize("kind", [float, np.float32, np.asarray, jnp.float32])
def test_a_global_that_was_replaced(kind, monkeypatch):
    eps_fn = lambda x, t: network(GLOBAL["scale"], x, t)
    for value in (0.4, 0.7):
        monkeypatch.setitem(globals(), "GLOBAL", {"scale": kind(value)})
        holds(np.allclose(RUNNERS["integrate"](eps_fn), integrated_with(value), rtol=1e-5), f"global at {value}")


def test_an_object_whose_parameters_were_replaced():
    """The object of a method, and a leaf of a dict of parameters that stays the same dict. With a combinator too."""
    net = Network(0.4)
    tree = {"layer": {"scale": jnp.float32(0.4)}}
    of_tree = lambda x, t: network(tree["layer"]["scale"], x, t)
    for value in (0.4, 0.7, 0.4):
        net.scale = tree["layer"]["scale"] = jnp.float32(value)
        for eps_fn in (net.eps, of_tree):
            holds(np.allclose(RUNNERS["integrate"](eps_fn), integrated_with(value), rtol=1e-5), f"object at {value}")
        clipped = [COMBINATORS["clip_x0"](f) for f in (net.eps, Partial(network, jnp.float32(value)))]
        holds(np.allclose(*map(RUNNERS["integrate"], clipped), rtol=1e-5, atol=1e-6), f"clipped at {value}")


def test_an_unchanged_function_is_compiled_once():
    traces, scale = [], jnp.float32(0.4)

    def eps_fn(x, t):
        traces.append(None)
        return network(scale, x, t)

    net = Network(0.4)
    for _ in range(3):
        RUNNERS["integrate"](eps_fn)
        before = len(COMPILATIONS)
        RUNNERS["integrate"](net.eps)
    holds(len(traces) == 1, f"traced {len(traces)} times")
    holds(len(COMPILATIONS) == before, "a method was compiled more than once")


def test_an_object_that_is_not_hashable_is_refused():
    class Unhashable:
        __hash__ = None

        def __call__(self, x, t):
            return x

    for call in (RUNNERS["integrate"], RUNNERS["invert"], COMBINATORS["clip_x0"], COMBINATORS["guided"]):
        refuses(lambda call=call: call(Unhashable()), "model", "Unhashable", "jax.tree_util.Partial")


# --- outputs of another shape or dtype ---

WRONG_OUTPUTS = {  # the function, and what the error must name of its output
    "a scalar": (lambda x, t: jnp.float32(0.1), "()"),
    "a batch of 1": (lambda x, t: x[:1], "(1, 4)"),
    "a further axis": (lambda x, t: x[:, None] * jnp.ones((1, 2, 1)), "(3, 2, 4)"),
    "fewer columns": (lambda x, t: x[:, :1], "(3, 1)"),
    "integers": (lambda x, t: jnp.ones(x.shape, jnp.int32), "int32"),
    "complex": (lambda x, t: x * 1j, "complex64"),
    "a tuple": (lambda x, t: (x, x), "float32[3,4]"),
    "a number": (lambda x, t: 0.1, "0.1"),
    "None": (lambda x, t: None, "None"),
    "a dict": (lambda x, t: {"sample": x}, "dict"),
}


@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_an_output_of_another_shape_or_dtype_is_refused(name):
    wrong, output = WRONG_OUTPUTS[name]
    for run in RUNNERS.values():
        refuses(lambda run=run: run(wrong), "model", output)
    for combinator in COMBINATORS.values():
        refuses(lambda combinator=combinator: RUNNERS["integrate"](combinator(wrong)), "model", output)
    refuses(lambda: RUNNERS["integrate"](guidance.guided(plain, wrong, 2.0)), "unguided", output)
    refuses(lambda: samplers.integrate(ode.SigmaEuler(), wrong, DOWN, X), "model", output)


@pytest.mark.parametrize(
    "wrong, shown",
    [("eps", "'eps'"), (3, "3"), (None, "None"), (jnp.ones(3), "(3,)"), ({"a": 1}, "dict")]
    + [(oracle.gaussian(LINEAR)(X, 5), "(3, 4)")],
)
def test_a_model_that_is_not_callable_is_refused(wrong, shown):
    for run in (*RUNNERS.values(), *COMBINATORS.values()):
        refuses(lambda run=run: run(wrong), "model", shown)
