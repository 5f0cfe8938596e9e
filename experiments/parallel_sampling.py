"""Parallel-in-time sampling (ParaDiGMS): the number of sequential rounds, and the error against sequential sampling.

    python -m experiments.parallel_sampling --config configs/digits.py --out DIR

`rounds` is the number of sequential network evaluations, `calls` the total number of network calls. `distance` is the
largest root mean square distance, over pixels in [0, 1], between an image and its counterpart from sequential sampling.
`seconds` is the median of three runs after the compilation. It is below `seconds_sequential` only if the device can
evaluate `window` times the batch in parallel.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import parallel, samplers, sampling
from ddim_jax.config import weights
from ddim_jax.samplers import SamplingProcess
from ddim_jax.utils import output_folder, sharding
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import common, grid
from experiments.common import Cell

RUNS = 3

OPTIONS = common.OPTIONS | {
    "steps": ("50,100,200,1000", "The values of S."),
    "windows": ("16,64", "The numbers of steps that are computed in parallel."),
    "tolerances": ("0.1,0.01,0.001", "The largest change of a converged point, root mean square."),
    "count": ("16", "The number of images."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    steps, windows = (common.ints(name, getattr(options, name)) for name in ("steps", "windows"))
    (count,), tolerances = common.ints("count", options.count), tolerances_of(options.tolerances)
    cells = {S: dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=S)) for S in steps}
    processes = {S: grid.process_of(cell) for S, cell in cells.items()}
    with error_context("config.sample.sampler"):
        parallel.check_memory(processes[steps[0]].sampler)
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    out = common.begin(
        options,
        experiment="parallel_sampling",
        weights=trained.digest,
        sample=grid.fixed(config, []) | {"sampler": config.sample.sampler, "eta": config.sample.eta},
        count=count,
    )
    index = np.arange(count)
    pipeline = config_lib.pipeline(config, trained.params, mesh)
    keys, x_T = sampling.start(pipeline, jnp.asarray(index))
    labels = sampling.labels_of(pipeline, index)
    denoiser = sampling.conditioned(pipeline, None if labels is None else jnp.asarray(labels))

    @functools.cache
    def sequential(S: int) -> tuple[np.ndarray, float]:
        process = processes[S]
        return timed(lambda: samplers.integrate(process.sampler, denoiser, process.transitions, x_T, keys_of(process)))

    def keys_of(process: SamplingProcess) -> jax.Array | None:
        return keys if process.sampler.stochastic else None

    def measure(S: int, window: int, tolerance: float, folder: output_folder.Folder) -> dict[str, Any]:
        process = processes[S]
        (x_0, rounds), seconds = timed(
            lambda: parallel.integrate(
                process.sampler,
                denoiser,
                process.transitions,
                x_T,
                keys_of(process),
                window=window,
                tolerance=tolerance,
            )
        )
        expected, sequential_seconds = sequential(S)
        return {
            "rounds": int(rounds),
            "calls": int(rounds) * min(window, S),
            "distance": float(common.root_mean_square(np.asarray(x_0), np.asarray(expected)).max()),
            "seconds": seconds,
            "seconds_sequential": sequential_seconds,
        }

    rows = common.run(
        out,
        [
            Cell(
                {"tolerance": f"{tolerance:g}", "window": window, "S": S},
                grid.depends_on(cells[S], processes[S]),
                cost=S * (window + 10),
                measure=functools.partial(measure, S, window, tolerance),
            )
            for S in steps
            for window in windows
            for tolerance in tolerances
        ],
    )
    common.write_table(out, rows, source=trained.source, device=jax.devices()[0].device_kind)
    common.plot(out / "table.png", functools.partial(draw, rows))
    columns = ["S", "window", "tolerance", "rounds", "calls", "distance", "seconds", "seconds_sequential"]
    common.finish(out, common.markdown(columns, [[row[name] for name in columns] for row in rows]))


def tolerances_of(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--tolerances: must be numbers, got {text!r}") from None
    if not min(values) >= 0:
        raise ConfigError(f"--tolerances: must be at least 0, got {min(values):g}")
    return values


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the median time in seconds of RUNS runs after a first one."""
    result, seconds = jax.block_until_ready(run()), []
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begin)
    return result, float(np.median(seconds))


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    for window in sorted({row["window"] for row in rows}):
        for tolerance in sorted({row["tolerance"] for row in rows}, key=float):
            line = sorted(
                (row["S"], row["rounds"]) for row in rows if (row["window"], row["tolerance"]) == (window, tolerance)
            )
            axes.plot(*zip(*line, strict=True), "o-", label=f"window {window}, tolerance {tolerance}")
    steps = sorted({row["S"] for row in rows})
    axes.plot(steps, steps, "k:", label="sequential")
    axes.set(xlabel="S", ylabel="rounds", xscale="log", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    common.start(main, OPTIONS)
