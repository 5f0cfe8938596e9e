"""Table 1: quality over eta and S, and any other field beside them.

    python -m experiments.table1_fid --config configs/digits.py --out DIR --steps 10,20,50,100
    python -m experiments.table1_fid --config configs/cifar10.py --config.pretrained=google/ddpm-cifar10-32 --out DIR
    python -m experiments.table1_fid ... --etas 0,0.5 --sweep sample.tau=uniform,quadratic --sweep sample.seed=0,1

Every cell draws config.evaluate.num_images images and measures config.evaluate.metrics; the first metric fills the
table that is printed, table.csv has them all. Where the paper has a FID, it and the difference stand beside ours.

What was interrupted resumes with the batch it was in; a later command with the same --out adds its cells. A cell's
images are removed once they are measured, unless --keep_samples is given; its first ones stay in table.png.
"""

from __future__ import annotations

from ddim_jax import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from ddim_jax import data, generate, images, output, sample, sharding, weights, yardstick
from ddim_jax.config import Config, Process
from ddim_jax.errors import error_context
from ddim_jax.pretrained.tensors import digest
from experiments import common, grid, paper
from experiments.common import Cell

PICTURED = 8

OPTIONS = grid.OPTIONS | {
    "accept": ("", "Fields in which statistics of real images may differ from what belongs to the samples."),
    "floor": (False, "Also measure the real images of config.data's other split, at most as many."),
    "keep_samples": (False, "Keep the images of every cell."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    metrics = yardstick.metrics_of(config)
    places = grid.places(options.etas, options.steps, options.sweep)
    axes = list(places[0])
    cells = [grid.at(options, place, config.evaluate.num_images) for place in places]
    processes = [grid.process_of(cell) for cell in cells]  # whether all are legal shows before any is drawn
    networks = [grid.network_of(cell, config) for cell in cells]

    mesh = sharding.data_mesh()
    weights_of = functools.lru_cache(maxsize=1)(lambda network: weights.find(network, options.workdir, mesh))
    digests = {network: weights_of(network).digest for network in dict.fromkeys(networks)}
    one_network = not {"pretrained", "sample.ema"} & set(axes)
    features = yardstick.open_network(config)
    out = common.begin(
        options,
        [*common.WRITTEN, "reference.npz"],
        experiment="table1_fid",
        weights=digests[networks[0]] if one_network else "by the axes",
        features=features.weights,
        axes=axes,
        sample=grid.fixed(config, axes),
        evaluate=dataclasses.asdict(config.evaluate) | {"batch_size": None},  # without effect
        data={"name": config.data.name, "path": config.data.path},
    )
    accepted = yardstick.accepted_fields(options.accept)
    shape = generate.image_shape(cells[0])
    stored = out.find("reference.npz")
    measured = yardstick.build(config, features, mesh, shape, accepted, stored)
    common.keep_reference(out, stored, measured.reference)
    reference = digest(measured.reference.judged.moments._replace(factor=None))  # a file of them has none

    def measure(cell: Config, process: Process, network: Config, folder: output.Folder) -> dict[str, Any]:
        npz = sample.draw_all(folder, cell, process, weights_of(network).params, mesh)
        drawn = data.load("npz", str(npz))
        images.write_png(folder / "first.png", images.grid(drawn.images[:PICTURED], PICTURED))
        numbers = yardstick.judge_samples(cell, measured, drawn, mesh, "the samples")
        return {**numbers, "images": len(drawn), "steps": len(process.tau) - 1}

    temporary = () if options.keep_samples else ("samples.npz", "samples.parts")
    rows = common.run(
        out,
        [
            Cell(
                place,
                {"weights": digests[network], "reference": reference, **grid.depends_on(cell, process)},
                cost=len(process.tau) - 1,
                measure=functools.partial(measure, cell, process, network),
                temporary=temporary,
            )
            for place, cell, process, network in zip(places, cells, processes, networks, strict=True)
        ],
    )
    table = paper.fid_of(config.name) if config.evaluate.features == "inception" else {}
    rows = [beside_the_paper(row, table) for row in rows]
    real = floor(config, measured, mesh) if options.floor else None
    common.write_table(out, rows, metrics=metrics, real=real, features=features.name)
    images.write_png(out / "table.png", grid.picture(rows, axes, out))
    common.finish(out, text(rows, axes, real))


def beside_the_paper(row: dict[str, Any], table: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    value = table.get((row.get("eta"), row["S"]))
    return row if value is None or "fid" not in row else {**row, "paper": value, "difference": row["fid"] - value}


def floor(config: Config, measured: yardstick.Yardstick, mesh: Mesh) -> dict[str, Any]:
    """The numbers of real images that are not the reference: those of the other split."""
    other = next(split for split in data.SPLITS if split != config.evaluate.split)
    with error_context("--floor"):
        source = data.load(config.data.name, config.data.path, other)
    count = min(len(source), config.evaluate.num_images)
    fewer = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, num_images=count))
    return {"split": other, "images": count, **yardstick.judge_samples(fewer, measured, source, mesh, "--floor")}


def text(rows: list[dict[str, Any]], axes: list[str], real: dict[str, Any] | None) -> str:
    """The first metric over the table, the paper's value and the difference in brackets."""
    main_number = next(name for name in rows[0] if name not in axes)
    lines, columns, cells = grid.laid_out(rows, axes)

    told = main_number == "fid" and any("paper" in row for row in rows)

    def shown(row):
        if row is None:
            return None
        beside = f" ({row['paper']:g}, {row['difference']:+.2f})" if told and "paper" in row else ""
        return f"{row[main_number]:.4g}{beside}"

    table = common.markdown(
        [main_number + " (the paper's, difference)" * told, *(f"S = {column}" for column in columns)],
        [[line, *map(shown, row)] for line, row in zip(lines, cells, strict=True)],
    )
    if told and rows[0]["images"] < paper.IMAGES:
        table += f"\nOf {rows[0]['images']} images each; the paper has {paper.IMAGES}, and fewer make FID larger.\n"
    if real is not None:
        table += f"\n{real['images']} real images of the {real['split']} split: {main_number} {real[main_number]:.4g}\n"
    return table


if __name__ == "__main__":
    common.start(main, OPTIONS)
