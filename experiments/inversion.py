"""The cost of exact DDIM inversion: reconstruction error over network calls, for explicit and for implicit steps.

    python -m experiments.inversion --config configs/digits.py --out DIR --count 100

Explicit steps are the paper's, Eq. (13). Implicit steps are solved by a fixed-point iteration (`ddim_jax.inversion`).
The error is that of table 2: the mean square over pixels in [0, 1] after encoding and decoding. Only the network calls
of encoding are counted: S for explicit steps, S (1 + refine) for implicit steps.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import types
from typing import Any

from ddim_jax import config as config_lib
from ddim_jax import encode, encoding
from ddim_jax.config import Config, weights
from ddim_jax.utils import output_folder, sharding
from experiments import common, grid
from experiments.common import Cell

OPTIONS = common.OPTIONS | {
    "images": encode.OPTIONS["images"],
    "count": encode.OPTIONS["count"],
    "explicit": ("10,20,50,100,200,500", "The values of S for explicit steps."),
    "solved": ("10,20,50", "The values of S for implicit steps."),
    "refine": ("3,5,10,15,20", "The numbers of iterations of an implicit step."),
}


def main(options: types.SimpleNamespace) -> None:
    config = encode.deterministic(options.config)
    explicit, solved, refine = (common.ints(name, getattr(options, name)) for name in ("explicit", "solved", "refine"))
    places = [{"S": S, "refine": 0} for S in explicit] + [{"S": S, "refine": k} for S in solved for k in refine]
    cells = [with_fields(config, steps=place["S"], refine=place["refine"]) for place in places]
    processes = [grid.process_of(cell) for cell in cells]
    source, total = encode.load_images(options.images, options.count, config)
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    depends = encode.fingerprint(with_fields(config, refine=0), processes[0], trained, source, total)
    del depends["tau"], depends["process"]  # they depend on the cell
    out = common.begin(options, experiment="inversion", tau=config.sample.tau, **depends)

    def measure(cell: Config, process: Any, folder: output_folder.Folder) -> dict[str, Any]:
        pipeline, steps = config_lib.pipeline(cell, trained.params, mesh, process), len(process.tau) - 1
        report = encoding.make_report(*encoding.round_trip(folder, pipeline, source, total, cell.sample.refine), steps)
        return {
            "error": report["error_mean"],
            "largest": report["error_max"],
            "calls": steps * (1 + cell.sample.refine),
            "images": total,
        }

    rows = common.run(
        out,
        [
            Cell(
                place,
                grid.depends_on(cell, process),
                cost=place["S"] * (2 + place["refine"]),
                measure=functools.partial(measure, cell, process),
                temporary=("latents.npz", "latents.parts", "reconstructions.npz", "reconstructions.parts"),
            )
            for place, cell, process in zip(places, cells, processes, strict=True)
        ],
    )
    common.write_table(out, rows, source=trained.source)
    common.plot(out / "table.png", functools.partial(draw, rows))
    head = ["S", "iterations a step", "calls", "error", "largest"]
    columns = ("S", "refine", "calls", "error", "largest")
    common.finish(out, common.markdown(head, [[row[name] for name in columns] for row in rows]))


def with_fields(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **fields))


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    curves = {"explicit": [row for row in rows if not row["refine"]]}
    for S in sorted({row["S"] for row in rows if row["refine"]}):
        curves[f"implicit, S = {S}"] = [row for row in rows if row["refine"] and row["S"] == S]
    for label, line in curves.items():
        points = sorted((row["calls"], row["error"]) for row in line)
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(xlabel="network calls of encoding", ylabel="mean square error", xscale="log", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    common.start(main, OPTIONS)
