"""Table 2: reconstruction error of real test images that are encoded and decoded, each in S steps.

    python -m experiments.table2_reconstruction --config configs/digits.py --out DIR
    python -m experiments.table2_reconstruction --config configs/cifar10.py \\
        --config.pretrained=google/ddpm-cifar10-32 --out DIR

The error is the mean square over pixels in [0, 1]. For CIFAR-10 the table also has the paper's values. table.png shows
the first images and their reconstructions, errors.png the error over S.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import types
from typing import Any

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import encode, encoding
from ddim_jax.config import Config, weights
from ddim_jax.samplers import SamplingProcess
from ddim_jax.utils import images, output_folder, sharding
from experiments import common, grid, paper
from experiments.common import Cell

PICTURED = 10

OPTIONS = common.OPTIONS | {
    "images": encode.OPTIONS["images"],
    "count": encode.OPTIONS["count"],
    "steps": (",".join(map(str, paper.RECONSTRUCTION)), "The values of S."),
}


def main(options: types.SimpleNamespace) -> None:
    config = encode.deterministic(options.config)
    steps = common.ints("steps", options.steps)
    cells = [dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=S)) for S in steps]
    processes = [grid.process_of(cell) for cell in cells]
    source, total = encode.load_images(options.images, options.count, config)
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    depends = encode.fingerprint(config, processes[0], trained, source, total)
    del depends["tau"], depends["process"]  # they depend on the cell
    out = common.begin(options, [*common.WRITTEN, "errors.png"], experiment="table2", tau=config.sample.tau, **depends)

    def measure(cell: Config, process: SamplingProcess, folder: output_folder.Folder) -> dict[str, Any]:
        pipeline = config_lib.pipeline(cell, trained.params, mesh, process)
        latents, decoded = encoding.round_trip(folder, pipeline, source, total, cell.sample.refine)
        images.write_png(folder / "first.png", images.grid(images.open_npz(decoded)["arr_0"][:PICTURED], PICTURED))
        report = encoding.make_report(latents, decoded, len(process.tau) - 1)
        return {name: report[name] for name in ("error_mean", "error_max", "latent_mean", "latent_std", "images")}

    rows = common.run(
        out,
        [
            Cell(
                {"S": S},
                grid.depends_on(cell, process),
                cost=S,
                measure=functools.partial(measure, cell, process),
                temporary=("latents.npz", "latents.parts", "reconstructions.npz", "reconstructions.parts"),
            )
            for S, cell, process in zip(steps, cells, processes, strict=True)
        ],
    )
    table = paper.RECONSTRUCTION if "cifar10" in config.name else {}
    rows = [row | ({"paper": table[row["S"]]} if row["S"] in table else {}) for row in rows]
    common.write_table(out, rows, source=trained.source)
    real = images.grid(source[np.arange(min(PICTURED, total))].images, PICTURED)
    pictures = [[real], *([common.read_png(out / common.folder_of({"S": row["S"]}) / "first.png")] for row in rows)]
    images.write_png(out / "table.png", common.labelled(pictures, ["real", *(f"S = {row['S']}" for row in rows)], [""]))
    common.plot(out / "errors.png", functools.partial(draw, rows))
    head = ["S", "error", *(["the paper's"] if table else []), "largest", "std of the latents"]
    lines = [
        [row["S"], row["error_mean"], *([row.get("paper")] if table else []), row["error_max"], row["latent_std"]]
        for row in rows
    ]
    common.finish(out, common.markdown(head, lines), [*common.FILES, "errors.png"])


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot(xlabel="S", ylabel="mean square error, pixels in [0, 1]", xscale="log", yscale="log")
    axes.plot([row["S"] for row in rows], [row["error_mean"] for row in rows], "o-", label="ddim_jax")
    if any("paper" in row for row in rows):
        reported = [(row["S"], row["paper"]) for row in rows if "paper" in row]
        axes.plot(*zip(*reported, strict=True), "s--", label="the paper, CIFAR-10")
        axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    common.start(main, OPTIONS)
