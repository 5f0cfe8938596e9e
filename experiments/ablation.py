"""An ablation over any fields of the config, with the mean and the standard error of every metric over seeds.

    python -m experiments.ablation --config configs/digits.py --axis sample.eta=0,0.5,1 --axis sample.steps=10,20 \\
        --axis sample.clip_x0=False,True --seeds 0,1,2 --out DIR
    python -m experiments.ablation ... --axis sample.tau=uniform,quadratic --axis pretrained=FILE,FOLDER --out DIR

A cell is one value of each axis and one seed. It draws config.evaluate.num_images images and evaluates them by
config.evaluate.metrics. The output files are:

- table.csv: one row for each cell.
- table.md: the mean over n seeds and its standard error, the sample standard deviation / sqrt(n).
- table.json: the rows and the means.
- curves.png: the metrics over the axis with the most numeric values, one curve for each combination of the other axes.
- table.png: the first images of the smallest seed.

An interrupted command resumes with the batch that it was drawing. A later command with the same --out and the same axes
adds its values and seeds. The images of a cell are deleted after the evaluation, unless --keep_samples is given.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import contextlib
import dataclasses
import difflib
import functools
import itertools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import data
from ddim_jax.checkpoints.tensors import digest
from ddim_jax.config import Config, evaluation, weights
from ddim_jax.data import Source
from ddim_jax.evaluation import metrics as metrics_lib
from ddim_jax.evaluation.evaluator import Evaluator, evaluate_samples
from ddim_jax.sample import draw_all
from ddim_jax.samplers import SamplingProcess
from ddim_jax.utils import files, images, output_folder, ranges, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError, error_context
from experiments import common, grid
from experiments.common import Cell

PICTURED = 8
PANELS = 4  # the most panels of the plot
MOST_TICKS = 8
LONGEST = 30  # the longest value in the plot, in characters
SEED = "sample.seed"
WITHOUT_EFFECT = ("sample.batch_size", "sample.refine", "model.dropout", "model.remat")  # on the samples
WRITTEN = (*common.FILES, "curves.png")

EVALUATION = {
    "accept": ("", "Fields in which statistics of the real images may differ from the config, for example split,crop."),
    "floor": (
        False,
        "Also evaluate real images of the other split of config.data.",
    ),
    "keep_samples": (False, "Keep the images of every cell."),
}
OPTIONS = (
    common.OPTIONS
    | {
        "axis": (
            [],
            "FIELD=VALUE,VALUE: a field of the config and its values; or FIELD=VALUE;VALUE.",
        ),
        "seeds": ("", "The values of sample.seed. Default: the one of the config."),
    }
    | EVALUATION
)


def main(options: types.SimpleNamespace) -> None:
    axes = axes_of(options)
    seeds = seeds_of(options)
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    configs = [config_at(options, setting) for setting in settings]
    places = [{**setting, SEED: seed} for seed in seeds for setting in settings]  # seed by seed
    cells = [with_seed(config, seed) for seed in seeds for config in configs]
    done = fill(
        options,
        places,
        cells,
        experiment="ablation",
        written=["cells", "reference.npz", *WRITTEN],
        sample=grid.fixed(options.config, places[0], ("num_images", "batch_size", "refine")),
        dtype=None if "model.dtype" in axes else options.config.model.dtype,
    )
    rows = sorted(done.rows, key=lambda row: [common.order_of(row[name]) for name in places[0]])
    summary = over_seeds(rows, list(axes))
    numbers = metrics_in(rows[0], places[0])
    common.write_table(
        done.out,
        rows,
        axes=list(axes),
        metrics=done.evaluator.metrics,
        features=done.evaluator.network.name,
        real=done.real,
        means=summary,
    )
    plotted = numbers[:PANELS]
    common.plot(done.out / "curves.png", functools.partial(draw, summary, plotted), size_of_plot(summary, len(plotted)))
    first = [{**cell["axes"], SEED: cell["seeds"][0]} for cell in summary]
    picture = grid.picture(first, list(places[0]), done.out, x_axis(summary), unnamed=[SEED])
    images.write_png(done.out / "table.png", picture)
    common.finish(done.out, text(summary, numbers, rows[0]["images"], done.real), WRITTEN)


# --- options ---


def axes_of(options: types.SimpleNamespace) -> dict[str, list[Any]]:
    """Field -> its values, from --axis. ConfigError for an unknown field, for a field that does not change the samples,
    and for a value that the field cannot have.
    """
    axes: dict[str, list[Any]] = {}
    for given in options.axis:
        field, texts = grid.field_and_values("axis", given)
        with prefixed(f"--axis {field}"):
            check_field(field, options.values)
            if field in axes:
                raise ConfigError("it is given twice; give all of its values in one --axis")
            axes[field] = list(dict.fromkeys(value_of(options.values, field, text.strip()) for text in texts))
    if not axes:
        raise ConfigError("--axis is missing: the fields to vary, for example --axis sample.eta=0,0.5,1")
    return axes


def check_field(field: str, values: Mapping[str, Any]) -> None:
    """ConfigError unless the field, with its section as in sample.eta, can be an axis."""
    known = [*config_lib.field_names()]
    exists = field in known or config_lib.is_open(field)
    if not exists and field not in {name.split(".")[0] for name in known}:
        possible = [name for name in known if not why_no_axis(name)]
        names = {part: name for name in possible for part in (grid.short(name), name)}
        near = difflib.get_close_matches(field[:100], names, 1, cutoff=0.6)
        hint = f" (did you mean {names[near[0]]!r}?)" if near else f"; it can be one of {', '.join(possible)}"
        raise ConfigError(f"the config has no field {files.shown(field)}{hint}")
    config_lib.type_of(field, values)
    if reason := why_no_axis(field):
        raise ConfigError(f"it {reason}")


def why_no_axis(field: str) -> str:
    """The reason why a field of the config (dotted) cannot be an axis; empty if it can."""
    if field == SEED:
        return "is given by --seeds"
    if field in WITHOUT_EFFECT or field.startswith("mesh."):
        return "does not change what is sampled"
    return grid.why_no_axis(field)


def value_of(values: Mapping[str, Any], field: str, text: str) -> Any:
    """The value of a text, in the type of the field. ConfigError if the field cannot have it in any config."""
    if not text:
        raise ConfigError("a value is empty")
    changed = config_lib.with_text(values, field, text)
    config_lib.typed(changed)
    return functools.reduce(lambda inner, name: inner[name], field.split("."), changed)


def seeds_of(options: types.SimpleNamespace) -> list[int]:
    if not options.seeds:
        return [options.config.sample.seed]
    seeds = common.ints("seeds", options.seeds, least=0)
    if max(seeds) > ranges.SEED:
        raise ConfigError(f"--seeds: must be at most {ranges.SEED}, got {max(seeds)}")
    return seeds


def config_at(options: types.SimpleNamespace, setting: Mapping[str, Any]) -> Config:
    """The config with these values of the fields. ConfigError if they are not compatible with each other."""
    values = options.values
    for field, value in setting.items():
        values = config_lib.with_text(values, field, str(value))
    with prefixed(f"--axis, where {grid.label(setting, setting)}"):
        if values["pretrained"]:
            values = weights.completed(values)
        sampled = {**values["sample"], "num_images": options.config.evaluate.num_images}
        config = config_lib.parse({**values, "sample": sampled})
        grid.process_of(config)
    return config


def with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, seed=seed))


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Puts the name of the option in front of the message of an error."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{where}: {error}") from error


# --- cells: drawn and evaluated ---


class Filled(NamedTuple):
    """The content of the output folder after all cells are evaluated."""

    out: output_folder.Folder
    rows: list[dict[str, Any]]  # axes and numbers of all cells in the folder, including those of earlier commands
    evaluator: Evaluator
    real: dict[str, Any] | None  # the numbers of real images, with --floor


def fill(
    options: types.SimpleNamespace,
    places: Sequence[dict[str, Any]],
    cells: Sequence[Config],
    experiment: str,
    written: Sequence[str],
    sample: Mapping[str, Any],
    **shared: Any,
) -> Filled:
    """Draws and evaluates all cells that are not in --out yet.

    places: the axes of each cell, which name it. cells: the config of each cell. written: the names of all files that
    the experiment may write. sample: the fields of config.sample that all cells have in common; shared: everything else
    that they have in common. Results in --out are used only if both are equal to those that are recorded there.
    """
    config, axes = options.config, list(places[0])
    seedless = [with_seed(cell, 0) for cell in cells]  # the process does not depend on the seed
    processes = {cell: grid.process_of(cell) for cell in dict.fromkeys(seedless)}  # raises before anything is drawn
    check_images(places, cells, config)
    networks = [grid.network_of(cell, config) for cell in cells]
    source = other_split(config) if options.floor else None

    mesh = sharding.data_mesh()
    weights_of = functools.lru_cache(maxsize=1)(lambda network: weights.find(network, options.workdir, mesh))
    digests = {network: weights_of(network).digest for network in dict.fromkeys(networks)}
    one_network = not {"pretrained", "sample.ema"} & set(axes)
    features = evaluation.open_network(config)
    out = common.begin(
        options,
        written,
        experiment=experiment,
        weights=digests[networks[0]] if one_network else "by the axes",
        features=features.weights,
        axes=axes,
        sample=sample,
        evaluate=dataclasses.asdict(config.evaluate) | {"batch_size": None},  # without effect
        data={"name": config.data.name, "path": config.data.path},
        **shared,
    )
    accepted = evaluation.accepted_fields(options.accept)
    stored = out.find("reference.npz")
    evaluator = evaluation.evaluator(config, features, mesh, config_lib.image_shape(cells[0].model), accepted, stored)
    common.keep_reference(out, stored, evaluator.reference)
    reference = digest(evaluator.reference.features.moments._replace(factor=None))  # a stored file has no factor
    depends = {cell: grid.depends_on(cell, process) for cell, process in processes.items()}

    def measure(
        cell: Config, process: SamplingProcess, network: Config, folder: output_folder.Folder
    ) -> dict[str, Any]:
        npz = draw_all(
            folder,
            config_lib.pipeline(cell, weights_of(network).params, mesh, process),
            cell.sample.num_images,
        )
        drawn = data.load("npz", str(npz))
        images.write_png(folder / "first.png", images.grid(drawn.images[:PICTURED], PICTURED))
        numbers = evaluate_samples(evaluator, drawn, cell.evaluate.num_images, "the samples")
        return {**numbers, "images": len(drawn), "steps": len(process.tau) - 1}

    temporary = () if options.keep_samples else ("samples.npz", "samples.parts")
    by_network = [i for network in digests for i in range(len(cells)) if networks[i] == network]  # reads each once
    rows = common.run(
        out,
        [
            Cell(
                places[i],
                {"weights": digests[networks[i]], "reference": reference, **depends[seedless[i]]},
                cost=len(processes[seedless[i]].tau) - 1,
                measure=functools.partial(measure, cells[i], processes[seedless[i]], networks[i]),
                temporary=temporary,
            )
            for i in by_network
        ],
    )
    return Filled(out, rows, evaluator, None if source is None else floor(config, evaluator, source))


def check_images(places: Sequence[dict[str, Any]], cells: Sequence[Config], config: Config) -> None:
    """ConfigError if the metrics cannot evaluate the images of a cell, or if the cells differ in the image size."""
    shape = config_lib.image_shape(cells[0].model)
    labelled = [name for name in evaluation.metric_names(config) if "labels" in metrics_lib.METRICS[name].samples]
    for place, cell in zip(places, cells, strict=True):
        if config_lib.image_shape(cell.model) != shape:
            raise ConfigError(
                f"all cells must draw images of one size: {'x'.join(map(str, shape))} where "
                f"{grid.label(places[0], places[0])}, {'x'.join(map(str, config_lib.image_shape(cell.model)))} where "
                f"{grid.label(place, place)}"
            )
        if labelled and not cell.model.num_classes:
            raise ConfigError(f"config.evaluate.metrics: {labelled[0]} needs a network with classes")


def other_split(config: Config) -> Source:
    """The real images of the split that is not the reference."""
    with error_context("--floor"):
        return data.load(config.data.name, config.data.path, _other(config), config.data.options)


def _other(config: Config) -> str:
    return next(split for split in data.SPLITS if split != config.evaluate.split)


def floor(config: Config, evaluator: Evaluator, source: Source) -> dict[str, Any]:
    """The numbers of real images of the split that is not the reference."""
    count = min(len(source), config.evaluate.num_images)
    numbers = evaluate_samples(evaluator, source, count, "--floor")
    return {"split": _other(config), "images": count, **numbers}


# --- means over seeds ---


def metrics_in(row: Mapping[str, Any], axes: Sequence[str]) -> list[str]:
    """The names of the metrics in a row: without the axes, the counts, and the standard deviations `*_std`."""
    return [
        name
        for name, value in row.items()
        if isinstance(value, float) and name not in axes and not name.endswith("_std")
    ]


def over_seeds(rows: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[dict[str, Any]]:
    """For each setting of the axes: its seeds, and the mean and the standard error of every metric over them."""
    settings: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in axes), []).append(row)
    summary = []
    for setting, cells in settings.items():
        values = {name: [row[name] for row in cells] for name in metrics_in(cells[0], axes)}
        summary.append(
            {
                "axes": dict(zip(axes, setting, strict=True)),
                "seeds": [row[SEED] for row in cells],
                "mean": {name: float(np.mean(of_seeds)) for name, of_seeds in values.items()},
                "standard_error": {name: standard_error(of_seeds) for name, of_seeds in values.items()},
            }
        )
    return summary


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of n values: their sample standard deviation / sqrt(n). None for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def text(
    summary: Sequence[Mapping[str, Any]], numbers: Sequence[str], count: int, real: Mapping[str, Any] | None
) -> str:
    """The Markdown table of the means, with a line that describes it."""
    axes = list(summary[0]["axes"])
    has_errors = any(len(cell["seeds"]) > 1 for cell in summary)
    head = f"{count} images each"
    if has_errors:
        head = f"Mean ± standard error over n seeds (the sample standard deviation / sqrt(n)), {head}"
    body = [
        [
            *map(grid.number, cell["axes"].values()),
            *([len(cell["seeds"])] if has_errors else []),
            *(mean_and_error(cell["mean"][name], cell["standard_error"][name]) for name in numbers),
        ]
        for cell in summary
    ]
    table = common.markdown([*map(grid.short, axes), *(["n"] if has_errors else []), *numbers], body)
    last = "" if real is None else "\n" + line_of_real_images(real, numbers)
    return f"{head}.\n\n{table}{last}"


def mean_and_error(mean: float, error: float | None) -> str:
    return f"{mean:.4g}" if error is None else f"{mean:.4g} ± {float(f'{error:.2g}'):g}"  # 120, not 1.2e+02


def line_of_real_images(real: Mapping[str, Any], numbers: Sequence[str]) -> str:
    """A line with the numbers of the real images."""
    values = ", ".join(f"{name} {real[name]:.4g}" for name in numbers)
    return f"{real['images']} real images of the {real['split']} split: {values}\n"


# --- the plot ---


def x_axis(summary: Sequence[Mapping[str, Any]]) -> str:
    """The axis with the most values, among the numeric axes if there are any; the first of equal ones."""
    values = {name: {cell["axes"][name] for cell in summary} for name in summary[0]["axes"]}
    numeric = [name for name, of_axis in values.items() if all(map(is_number, of_axis))]
    return max(numeric or values, key=lambda name: len(values[name]))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curves_of(summary: Sequence[Mapping[str, Any]], across: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The label of each combination of the other axes, and its cells, sorted along the axis `across`."""
    curves: dict[tuple, list[Mapping[str, Any]]] = {}
    for cell in sorted(summary, key=lambda cell: common.order_of(cell["axes"][across])):
        others = {name: value for name, value in cell["axes"].items() if name != across}
        curves.setdefault(tuple(others.items()), []).append(cell)
    in_order = sorted(curves.items(), key=lambda curve: [common.order_of(value) for _, value in curve[0]])
    return [(", ".join(f"{grid.short(name)} {shown(value)}" for name, value in key), cells) for key, cells in in_order]


def shown(value: Any) -> str:
    """A value as text in a plot: at most LONGEST characters, and without "$", which Matplotlib reads as mathematics."""
    label = grid.number(value)
    label = label if len(label) <= LONGEST else f"...{label[3 - LONGEST :]}"
    return label.replace("$", r"\$")


def spread(values: Sequence[float]) -> bool:
    """Whether the values need a logarithmic axis."""
    return min(values) > 0 and max(values) >= 10 * min(values)


def size_of_plot(summary: Sequence[Mapping[str, Any]], panels: int) -> tuple[float, float]:
    """(width, height) in inches of the panels and of the legend below them."""
    rows, columns = shape_of_panels(panels)
    width = max(4.5 * columns, 6)
    labels = [label for label, _ in curves_of(summary, x_axis(summary))]
    return width, 3.5 * rows + 0.2 * math.ceil(len(labels) / columns_of_legend(labels, width)) + 0.2


def shape_of_panels(panels: int) -> tuple[int, int]:
    return (2, 2) if panels == 4 else (1, panels)


def columns_of_legend(labels: Sequence[str], width: float) -> int:
    """The number of columns of the legend. A letter is about 1/14 inch wide, the line in front of a label 6 letters."""
    return max(1, int(14 * width / (max(map(len, labels)) + 6)))


def draw(summary: Sequence[Mapping[str, Any]], numbers: Sequence[str], figure: Any) -> None:
    """Draws one panel for each metric: its mean with the standard error over the x axis, one curve for each combination
    of the other axes.
    """
    from matplotlib import colormaps, ticker

    across = x_axis(summary)
    curves = curves_of(summary, across)
    ticks = sorted({cell["axes"][across] for cell in summary}, key=common.order_of)
    numeric = all(map(is_number, ticks))
    position = (lambda value: value) if numeric else ticks.index
    palette = colormaps["tab10"].colors if len(curves) <= 10 else colormaps["turbo"](np.linspace(0, 1, len(curves)))
    panels = figure.subplots(*shape_of_panels(len(numbers)), squeeze=False).ravel()
    for panel, name in zip(panels, numbers, strict=True):
        for (label, cells), colour in zip(curves, palette, strict=False):
            errors = [cell["standard_error"][name] for cell in cells]
            panel.errorbar(
                [position(cell["axes"][across]) for cell in cells],
                [cell["mean"][name] for cell in cells],
                [np.nan if error is None else error for error in errors],
                fmt=".-" if numeric else "o",
                color=colour,
                capsize=3,
                label=label,
            )
        panel.set(xlabel=grid.short(across), ylabel=name)
        if numeric and spread(ticks):
            panel.set_xscale("log")
        if not numeric or len(ticks) <= MOST_TICKS:
            panel.set_xticks([], minor=True)
            panel.set_xticks([position(tick) for tick in ticks], [shown(tick) for tick in ticks])
        if spread([cell["mean"][name] - (cell["standard_error"][name] or 0) for cell in summary]):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(ticker.LogFormatter())  # 20, not 2 x 10^1
            panel.yaxis.set_minor_formatter(ticker.LogFormatter())
        panel.grid(alpha=0.3, which="both")
    if len(curves) > 1:
        handles = panels[0].get_legend_handles_labels()
        columns = columns_of_legend([label for label, _ in curves], figure.get_figwidth())
        figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=8)


if __name__ == "__main__":
    common.start(main, OPTIONS)
