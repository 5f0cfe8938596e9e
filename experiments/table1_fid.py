"""Table 1: quality over eta and S, and any other field beside them.

    python -m experiments.table1_fid --config configs/digits.py --out DIR --steps 10,20,50,100
    python -m experiments.table1_fid --config configs/cifar10.py --config.pretrained=google/ddpm-cifar10-32 \\
        --config.data.path=cifar10.npz --out DIR
    python -m experiments.table1_fid ... --etas 0,0.5 --sweep sample.tau=uniform,quadratic --sweep sample.seed=0,1

Every cell draws config.evaluate.num_images images and measures config.evaluate.metrics; the first metric fills the
table that is printed, table.csv has them all. Where the paper has a FID, it and the difference stand beside ours.

What was interrupted goes on with the batch it was in; a later command with the same --out adds its cells. A cell's
images are removed once they are measured, unless --keep_samples is given; its first ones stay in table.png.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from ddim_jax import cli, data, evaluate, generate, images, registry, sample, weights
from ddim_jax import config as config_lib
from ddim_jax.config import Config, ConfigError, Process
from ddim_jax.weights import Weights
from experiments import common, paper
from experiments.common import Cell

PICTURED = 8
VARIED = ("sampler", "eta", "steps", "num_images", "batch_size")  # by the axes, or without effect

OPTIONS = common.OPTIONS | {
    "etas": ("0,0.2,0.5,1,hat", "The rows: values of eta, and hat for sigma-hat. Empty: the config's sampler alone."),
    "steps": (",".join(map(str, paper.STEPS)), "The columns: values of S."),
    "sweep": ([], "A further axis, FIELD=VALUE,VALUE: any field of the config. Values with commas: separate by ;"),
    "accept": ("", "Fields in which statistics of real images may differ from what belongs to the samples."),
    "floor": (False, "Also measure the real images of config.data's other split, at most as many."),
    "keep_samples": (False, "Keep the images of every cell."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    metrics = evaluate.metrics_of(config)
    cells = {tuple(axes.items()): changed(options, axes) for axes in places(options)}
    # Whether all of them are legal shows here, before any is drawn.
    processes = {place: process_of(cell) for place, cell in cells.items()}
    swept = [name for name in next(iter(dict(place) for place in cells)) if name not in ("eta", "S")]
    evaluation = dataclasses.asdict(config.evaluate)
    del evaluation["batch_size"]
    begun = common.begin(
        options,
        experiment="table1_fid",
        axes=list(dict(next(iter(cells)))),
        sample=fixed(config, swept),
        evaluate=evaluation,
        data=dataclasses.asdict(config.data),
    )
    mesh = begun.mesh

    @functools.lru_cache(maxsize=1)
    def weights_of(cell: Config) -> Weights:
        return weights.find(cell, options.workdir, mesh)

    network = evaluate.open_network(config)
    shape = generate.image_shape(next(iter(cells.values())))
    accepted = [field for field in options.accept.split(",") if field]
    found = evaluate.yardstick(config, network, mesh, shape, accepted, begun.out / "reference.npz")

    def measure(cell: Config, process: Process, folder: pathlib.Path) -> dict[str, Any]:
        same = "pretrained" not in swept
        params = (begun.weights if same else weights_of(without_process(cell))).params
        npz = sample.draw_all(folder, cell, process, params, mesh)
        drawn = data.load("npz", str(npz))
        images.write_png(folder / "first.png", images.grid(drawn.images[:PICTURED], PICTURED))
        numbers = evaluate.judge_samples(cell, found, drawn, mesh, "the samples")
        return {**numbers, "images": len(drawn), "steps": len(process.tau) - 1}

    table = paper.fid_of(config.name) if network.name.startswith("inception") else {}
    rows = common.run(
        begun.out,
        [
            Cell(
                dict(place),
                len(processes[place].tau) - 1,
                functools.partial(measure, cell, processes[place]),
                () if options.keep_samples else ("samples.npz", "samples.parts"),
            )
            for place, cell in cells.items()
        ],
    )
    rows = [beside_the_paper(row, table) for row in rows]
    real = floor(config, found, mesh) if options.floor else None
    common.write_table(begun.out, rows, metrics=metrics, real=real, features=network.name, source=begun.weights.source)
    axes = list(dict(next(iter(cells))))
    images.write_png(begun.out / "table.png", picture(rows, axes, begun.out))
    common.finish(begun.out, text(rows, axes, real))


def places(options: types.SimpleNamespace) -> list[dict[str, Any]]:
    """The axes of every cell: eta, S, and the fields of --sweep; the last vary slowest."""
    axes: dict[str, list[Any]] = {}
    if options.etas:
        axes["eta"] = list(dict.fromkeys(_eta(text.strip()) for text in options.etas.split(",")))
    axes["S"] = common.ints("steps", options.steps)
    for sweep in options.sweep:
        field, equals, values = sweep.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep must be FIELD=VALUE,VALUE, got {sweep!r}")
        field = field.removeprefix("config.")
        if field == "sample.steps" or (options.etas and field in ("sample.eta", "sample.sampler")):
            raise ConfigError(f"--sweep: {field} is an axis already, by --steps or --etas")
        if field.startswith(("train.", "evaluate.", "data.")):
            raise ConfigError(f"--sweep: {field} does not change what is sampled")
        axes[field] = list(dict.fromkeys(values.split(";" if ";" in values else ",")))
    backwards = itertools.product(*reversed(axes.values()))
    return [dict(zip(axes, reversed(values), strict=True)) for values in backwards]


def _eta(text: str) -> str:
    if text == "hat":
        return text
    try:
        return f"{float(text):g}"
    except ValueError:
        raise ConfigError(f"--etas: must be numbers or hat, got {text!r}") from None


def changed(options: types.SimpleNamespace, axes: Mapping[str, Any]) -> Config:
    """The config of a cell."""
    values = options.values if "pretrained" in axes else dataclasses.asdict(options.config)
    for field in axes.keys() - {"eta", "S"}:
        values = config_lib.with_text(values, field, axes[field])
    if "pretrained" in axes:
        values = weights.completed(values)
    values = {**values, "sample": {**values["sample"], "steps": axes["S"]}}
    values["sample"]["num_images"] = options.config.evaluate.num_images
    if axes.get("eta") == "hat":
        values["sample"].update(sampler="ddpm_hat", eta=0.0)
    elif "eta" in axes:
        takes_eta = "eta" in registry.accepts(registry.SAMPLERS[options.config.sample.sampler])
        values["sample"].update(eta=float(axes["eta"]), **({} if takes_eta else {"sampler": "ddim"}))
    return config_lib.parse(values)


def process_of(config: Config) -> Process:
    return config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))


def without_process(config: Config) -> Config:
    """The config with the process of another cell: what weights depend on stays."""
    sample_ = dataclasses.replace(config.sample, sampler="ddim", eta=0.0, steps=1)
    return dataclasses.replace(config, sample=sample_)


def fixed(config: Config, swept: list[str]) -> dict[str, Any]:
    """The fields of config.sample that all cells share."""
    free = {*VARIED, *(field.removeprefix("sample.") for field in swept)}
    return {name: value for name, value in dataclasses.asdict(config.sample).items() if name not in free}


def beside_the_paper(row: dict[str, Any], table: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    value = table.get((row.get("eta"), row["S"]))
    return row if value is None or "fid" not in row else {**row, "paper": value, "difference": row["fid"] - value}


def floor(config: Config, found: evaluate.Yardstick, mesh) -> dict[str, Any]:
    """The numbers of real images that are not the reference: those of the other split."""
    other = next(split for split in data.SPLITS if split != config.evaluate.split)
    with config_lib.blame("--floor"):
        source = data.load(config.data.name, config.data.path, other)
    count = min(len(source), config.evaluate.num_images)
    fewer = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, num_images=count))
    return {"split": other, "images": count, **evaluate.judge_samples(fewer, found, source, mesh, "--floor")}


def laid_out(rows: list[dict[str, Any]], axes: list[str]) -> tuple[list[str], list[int], list[list[dict | None]]]:
    """The rows of the table (all axes but S, as words), its columns (S), and what is in them."""
    word = lambda row: ", ".join(_word(name, row[name]) for name in reversed(axes) if name != "S")
    lines, columns = list(dict.fromkeys(map(word, rows))), sorted({row["S"] for row in rows})
    cells = {(word(row), row["S"]): row for row in rows}
    return lines, columns, [[cells.get((line, column)) for column in columns] for line in lines]


def _word(axis: str, value: Any) -> str:
    return ("sigma-hat" if value == "hat" else f"eta {value}") if axis == "eta" else f"{axis.split('.')[-1]} {value}"


def text(rows: list[dict[str, Any]], axes: list[str], real: dict[str, Any] | None) -> str:
    """The first metric over the table, the paper's value and the difference in brackets."""
    main_number = next(name for name in rows[0] if name not in axes)
    lines, columns, cells = laid_out(rows, axes)

    def shown(row):
        if row is None:
            return None
        beside = f" ({row['paper']:g}, {row['difference']:+.2f})" if "paper" in row else ""
        return f"{row[main_number]:.4g}{beside}"

    head = [main_number + " (the paper's, difference)" * any("paper" in row for row in rows)]
    table = common.markdown(
        [*head, *(f"S = {column}" for column in columns)],
        [[line, *map(shown, row)] for line, row in zip(lines, cells, strict=True)],
    )
    if real is not None:
        table += f"\n{real['images']} real images of the {real['split']} split: {main_number} {real[main_number]:.4g}\n"
    return table


def picture(rows: list[dict[str, Any]], axes: list[str], out: pathlib.Path):
    """The first images of every cell; the same noise in all of them."""
    lines, columns, cells = laid_out(rows, axes)
    place = lambda row: Cell({name: row[name] for name in axes}, 0, None).name
    pictures = [
        [None if row is None else common.read_png(out / "cells" / place(row) / "first.png") for row in line]
        for line in cells
    ]
    return common.labelled(pictures, lines, [f"S = {column}" for column in columns])


if __name__ == "__main__":
    cli.start(main, OPTIONS)
