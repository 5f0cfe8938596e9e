"""Figure 4: wall-clock time per image over S, which is linear with a small constant.

    python -m experiments.fig4_wallclock --config configs/digits.py --out DIR

A batch of config.sample.batch_size images is drawn several times. The first run includes the compilation, whose time is
reported separately. A line is fitted to the medians by least squares; R^2 measures how well it fits. No other program
should run on the machine.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import platform
import statistics
import time
import types
from typing import Any

import jax
import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import sampling
from ddim_jax.config import Config, fingerprint, weights
from ddim_jax.samplers import SamplingProcess
from ddim_jax.utils import sharding
from experiments import common, grid
from experiments.common import Cell

OPTIONS = common.OPTIONS | {
    "steps": ("10,20,50,100,200,500,1000", "The values of S."),
    "repeats": ("3", "The number of timed runs, after a first run that compiles."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    steps, (repeats,) = common.ints("steps", options.steps), common.ints("repeats", options.repeats)
    batch = config.sample.batch_size
    cells = [
        dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=S, num_images=batch)) for S in steps
    ]
    processes = [grid.process_of(cell) for cell in cells]
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    device = f"{mesh.size} x {jax.devices()[0].device_kind} ({platform.machine()})"
    out = common.begin(
        options,
        experiment="fig4",
        model=fingerprint.model(config.model),
        sampler=config.sample.sampler,
        eta=config.sample.eta,
        tau=config.sample.tau,
        batch=batch,
        device=device,
        jax=jax.__version__,
    )
    jax.config.update("jax_enable_compilation_cache", False)

    def measure(cell: Config, process: SamplingProcess, folder: Any) -> dict[str, Any]:
        times = []
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            (_,) = sampling.batches(config_lib.pipeline(cell, trained.params, mesh, process), cell.sample.num_images)
            times.append(time.perf_counter() - begin)
        median = statistics.median(times[1:])
        return {
            "seconds_per_image": median / batch,
            "fastest": min(times[1:]) / batch,
            "slowest": max(times[1:]) / batch,
            "compile_seconds": times[0] - median,
            "steps": len(process.tau) - 1,
        }

    rows = common.run(
        out,
        [
            Cell({"S": S}, grid.depends_on(cell, process), S * (1 + repeats), functools.partial(measure, cell, process))
            for S, cell, process in zip(steps, cells, processes, strict=True)
        ],
    )
    line = fit([row["steps"] for row in rows], [row["seconds_per_image"] for row in rows])
    most = rows[-1]
    rows = [
        {
            **row,
            "speed_up": most["seconds_per_image"] / row["seconds_per_image"],
            "hours_for_50000": row["seconds_per_image"] * 50_000 / 3600,
        }
        for row in rows
    ]
    common.write_table(out, rows, device=device, jax=jax.__version__, batch=batch, line=line)
    common.plot(out / "table.png", functools.partial(draw, rows, line))
    head = ["S", "seconds per image", "compilation, s", f"speed-up over S = {most['S']}", "hours for 50,000"]
    names = ("S", "seconds_per_image", "compile_seconds", "speed_up", "hours_for_50000")
    summary = (
        f"\n{device}, jax {jax.__version__}, batch {batch}, median of {repeats}: {line['per_step']:.4g} s per step "
        f"and image plus {line['constant']:.2g} s, R^2 = {line['r_squared']:.6f}, largest residual "
        f"{line['largest_residual']:.2g} s\n"
    )
    common.finish(out, common.markdown(head, [[row[name] for name in names] for row in rows]) + summary)


def fit(steps: list[int], seconds: list[float]) -> dict[str, float]:
    """The least-squares line through the points (steps, seconds). R^2 is 1 for fewer than three points."""
    slope, constant = np.polyfit(steps, seconds, 1) if len(steps) > 1 else (seconds[0] / steps[0], 0.0)
    residuals = np.asarray(seconds) - (slope * np.asarray(steps) + constant)
    spread = np.sum((np.asarray(seconds) - np.mean(seconds)) ** 2)
    return {
        "per_step": float(slope),
        "constant": float(constant),
        "r_squared": float(1 - np.sum(residuals**2) / spread) if spread else 1.0,
        "largest_residual": float(np.abs(residuals).max()),
    }


def draw(rows: list[dict[str, Any]], line: dict[str, float], figure: Any) -> None:
    axes = figure.add_subplot(xlabel="S", ylabel="seconds per image", xscale="log", yscale="log")
    S = [row["steps"] for row in rows]
    axes.plot(S, [row["seconds_per_image"] for row in rows], "o", label="measured")
    dense = np.geomspace(min(S), max(S), 100)
    axes.plot(dense, line["per_step"] * dense + line["constant"], label=f"line, R² = {line['r_squared']:.5f}")
    axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    common.start(main, OPTIONS)
