"""The error over the number of network calls for every deterministic sampler, and its order, also fitted to the errors.

    python -m experiments.solvers --out DIR

The data are a mixture of three Gaussians in the plane. Their optimal eps is known, so the only error is that of the
solver. The levels are evenly spaced in lambda from sigma_bar = 80 to 0.05. The error is the root mean square difference
to 20,000 steps of third order, over 256 points, in float64. The fitted order is the slope from 160 to 640 steps.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import oracle, registry, samplers, trajectory
from ddim_jax.config import fingerprint
from ddim_jax.schedule import NoiseSchedule
from ddim_jax.trajectory import Transitions
from ddim_jax.utils import output_folder
from experiments import common
from experiments.common import Cell

MEANS, STDS = np.array([[1.0, -0.5], [-2.0, 0.3], [0.2, 2.0]]), np.array([0.3, 0.5, 0.4])
LARGEST, SMALLEST = 80.0, 0.05  # sigma_bar
POINTS = 256
FITTED = (160, 320, 640)
REFERENCE = ("dpm_solver_pp_3m", 20_000)

OPTIONS = {
    "calls": ("5,6,8,10,15,20,30,50,70,100", "The numbers of network calls."),
    "out": (None, "The output folder."),
}


def main(options: types.SimpleNamespace) -> None:
    jax.config.update("jax_enable_x64", True)
    calls = common.ints("calls", options.calls, 2)
    out = common.begin(options, experiment="solvers")
    exact = functools.cache(lambda: run(*REFERENCE))

    def measure(name: str, steps: int, folder: output_folder.Folder) -> dict[str, Any]:
        return {"error": float(np.sqrt(np.square(run(name, steps) - exact()).mean())), "calls": calls_of(name, steps)}

    counts = {
        name: sorted({*(steps_of(name, count) for count in calls if legal(name, count)), *FITTED}) for name in SOLVERS
    }
    rows = common.run(
        out,
        [
            Cell(
                {"S": steps, "solver": name},
                {"process": fingerprint.of_process(sampler(name), levels(steps)[1], (2,))},
                steps + 100,
                functools.partial(measure, name, steps),
            )
            for name, steps_ in counts.items()
            for steps in steps_
        ],
    )
    common.write_table(out, rows)
    common.plot(out / "table.png", functools.partial(draw, rows, calls))
    head = ["solver", "order", "fitted", *(f"{count} calls" for count in calls)]
    body = [
        [name, sampler(name).order, fitted(rows, name)]
        + [error_of(rows, name, steps_of(name, count)) if legal(name, count) else None for count in calls]
        for name in SOLVERS
    ]
    common.finish(out, common.markdown(head, body))


def sampler(name: str) -> samplers.Sampler:
    return registry.build(registry.SAMPLERS[name], {})


SOLVERS = [name for name in registry.SAMPLERS if not sampler(name).stochastic]
MORE_CALLS = {"ab2": 1, "ab4": 3, "plms": 1}  # the first steps that call the network twice


def calls_of(name: str, steps: int) -> int:
    return sampler(name).calls_per_step * steps + MORE_CALLS.get(name, 0)


def steps_of(name: str, calls: int) -> int:
    """The largest number of steps with at most this number of network calls."""
    return (calls - MORE_CALLS.get(name, 0)) // sampler(name).calls_per_step


def legal(name: str, calls: int) -> bool:
    """Whether the solver can run with this number of network calls."""
    return steps_of(name, calls) >= sampler(name).min_steps


def levels(steps: int) -> tuple[NoiseSchedule, Transitions]:
    """A schedule of steps + 1 levels, evenly spaced in lambda, and the transitions over all of them."""
    noise = np.exp(np.linspace(np.log(SMALLEST), np.log(LARGEST), steps + 1))
    noise_schedule = NoiseSchedule(np.concatenate([[1.0], 1 / (1 + noise**2)]))
    return noise_schedule, trajectory.descend(noise_schedule, np.arange(1, steps + 2), end=1)


def run(name: str, steps: int) -> np.ndarray:
    """The samples (POINTS, 2) of a solver after this number of steps."""
    noise_schedule, transitions = levels(steps)
    x = jax.random.normal(jax.random.key(0), (POINTS, 2), jnp.float64)
    return np.asarray(samplers.integrate(sampler(name), oracle.mixture(noise_schedule, MEANS, STDS), transitions, x))


def error_of(rows: list[dict[str, Any]], name: str, steps: int) -> float:
    return next(row["error"] for row in rows if (row["solver"], row["S"]) == (name, steps))


def fitted(rows: list[dict[str, Any]], name: str) -> float:
    """The fitted order: minus the slope of log error over log steps."""
    errors = [error_of(rows, name, steps) for steps in FITTED]
    return float(-np.polyfit(np.log(FITTED), np.log(errors), 1)[0])


def draw(rows: list[dict[str, Any]], calls: list[int], figure: Any) -> None:
    axes = figure.subplots()
    for name in SOLVERS:
        points = [(row["calls"], row["error"]) for row in rows if row["solver"] == name and row["calls"] <= max(calls)]
        axes.plot(*zip(*sorted(points), strict=True), ".-", label=name)
    axes.set(xlabel="network calls", ylabel="error", xscale="log", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    common.start(main, OPTIONS, config=False)
