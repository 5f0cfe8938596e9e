"""Cells over eta, S, and any further field of the config, and the tables and pictures of them."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import registry
from ddim_jax.config import Config, fingerprint, weights
from ddim_jax.samplers import SamplingProcess
from ddim_jax.utils import output_folder
from ddim_jax.utils.errors import ConfigError
from experiments import common, paper

OPTIONS = common.OPTIONS | {
    "etas": ("0,0.2,0.5,1,hat", "The rows: values of eta, or hat for sigma-hat. Empty: the sampler of the config."),
    "steps": (",".join(map(str, paper.STEPS)), "The columns: values of S."),
    "sweep": ([], "FIELD=VALUE,VALUE or FIELD=VALUE;VALUE: a further axis, any field of the config."),
}
MAY_BE_EMPTY = ("etas",)
VARIED = ("sampler", "eta", "steps", "num_images", "batch_size", "refine")  # given by the axes, or without effect


def places(etas: str, steps: str, sweeps: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The axes of every cell, from --etas, --steps and --sweep: eta, S, and the swept fields. The last axis varies
    slowest.
    """
    axes: dict[str, list[Any]] = {}
    if etas:
        axes["eta"] = list(dict.fromkeys(_eta(text.strip()) for text in etas.split(",")))
    axes["S"] = common.ints("steps", steps)
    for sweep in sweeps:
        field, values = field_and_values("sweep", sweep)
        if field == "sample.steps" or (etas and field in ("sample.eta", "sample.sampler")):
            raise ConfigError(f"--sweep: {field} is an axis already, by --steps or --etas")
        if reason := why_no_axis(field):
            raise ConfigError(f"--sweep: {field} {reason}")
        axes[field] = list(dict.fromkeys(values))
    backwards = itertools.product(*reversed(axes.values()))
    return [dict(zip(axes, reversed(values), strict=True)) for values in backwards]


def field_and_values(option: str, text: str) -> tuple[str, list[str]]:
    """The field (dotted) and the values in the text FIELD=VALUE,VALUE of an option."""
    field, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--{option} must be FIELD=VALUE,VALUE, got {text!r}")
    return field.removeprefix("config."), values.split(";" if ";" in values else ",")


def why_no_axis(field: str) -> str:
    """The reason why a field of the config (dotted) cannot be an axis; empty if it can."""
    if field.startswith(("train.", "evaluate.", "data.")) or field in ("name", "sample.num_images"):
        return "does not change what is sampled"
    section, _, name = field.partition(".")
    if section == "schedule" or (section == "model" and name not in config_lib.NOT_ARCHITECTURE):
        return "is what the network was trained with; sweep pretrained instead"
    return ""


def _eta(text: str) -> str:
    if text == "hat":
        return text
    try:
        return f"{float(text):g}"
    except ValueError:
        raise ConfigError(f"--etas: must be numbers or hat, got {text!r}") from None


def at(options: types.SimpleNamespace, axes: Mapping[str, Any], count: int) -> Config:
    """The config of the cell with these axes, which draws `count` images."""
    values = options.values if "pretrained" in axes else dataclasses.asdict(options.config)
    for field in axes.keys() - {"eta", "S"}:
        values = config_lib.with_text(values, field, axes[field])
    if "pretrained" in axes:
        values = weights.completed(values)
    values = {**values, "sample": {**values["sample"], "steps": axes["S"]}}
    values["sample"]["num_images"] = count
    if axes.get("eta") == "hat":
        values["sample"].update(sampler="ddpm_hat", eta=0.0)
    elif "eta" in axes:
        name = values["sample"]["sampler"]
        factory = registry.resolve(registry.SAMPLERS, name)
        supported = ":" in name or "eta" in registry.accepts(factory) or not registry.build(factory, {}).stochastic
        values["sample"].update(eta=float(axes["eta"]), **({} if supported else {"sampler": "ddim"}))
    return config_lib.parse(values)


def network_of(cell: Config, base: Config) -> Config:
    """The config of a cell with the process of `base`: equal for two cells if they have the same weights."""
    return dataclasses.replace(cell, sample=dataclasses.replace(base.sample, ema=cell.sample.ema))


def process_of(config: Config) -> SamplingProcess:
    """The generative process of the config. ConfigError if it is invalid."""
    return config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))


def depends_on(cell: Config, process: SamplingProcess) -> dict[str, Any]:
    """What the images of a cell depend on, in addition to the weights and the fields that all cells have in common."""
    shape = config_lib.image_shape(cell.model)
    return {
        "process": fingerprint.of_process(process.sampler, process.transitions, shape),
        "model": fingerprint.model(cell.model),
    }


def fixed(config: Config, swept: Iterable[str], varied: Iterable[str] = VARIED) -> dict[str, Any]:
    """The fields of config.sample that all cells have in common: those that are neither swept nor in `varied`. A field
    that was added after the first version is included only if it is set.
    """
    fields = dataclasses.asdict(config.sample)
    excluded = {*varied, *(field.removeprefix("sample.") for field in swept)}
    excluded |= {name for name in fingerprint.ADDED_LATER if not fields[name]}
    return {name: value for name, value in fields.items() if name not in excluded}


def laid_out(
    rows: list[dict[str, Any]], axes: list[str], across: str = "S"
) -> tuple[list[str], list[Any], list[list[dict | None]]]:
    """The labels of the table's rows (all axes but `across`), its columns (the values of `across`), and its cells."""
    lines = list(dict.fromkeys(label(row, reversed(axes), across) for row in rows))
    columns = sorted({row[across] for row in rows})
    cells = {(label(row, reversed(axes), across), row[across]): row for row in rows}
    return lines, columns, [[cells.get((line, column)) for column in columns] for line in lines]


def label(row: Mapping[str, Any], axes: Iterable[str], across: str | None = None) -> str:
    """The label of a row: its values on these axes, without `across`."""
    return ", ".join(_label_of_value(name, row[name]) for name in axes if name != across)


def _label_of_value(axis: str, value: Any) -> str:
    return "sigma-hat" if (axis, value) == ("eta", "hat") else f"{short(axis)} {number(value)}"


def short(axis: str) -> str:
    """The name of a field without its section."""
    return axis.split(".")[-1]


def number(value: Any) -> str:
    """A value as text with all its digits, so that different values have different texts. 1.0 is written as 1."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def picture(
    rows: list[dict[str, Any]],
    axes: list[str],
    out: output_folder.Folder,
    across: str = "S",
    unnamed: Collection[str] = (),
) -> np.ndarray:
    """The first images of every cell; cells with the same seed have the same noise. unnamed: axes without a label."""
    lines, columns, cells = laid_out(rows, [name for name in axes if name not in unnamed], across)
    folder = lambda row: out / common.folder_of({name: row[name] for name in axes})
    pictures = [[None if row is None else common.read_png(folder(row) / "first.png") for row in line] for line in cells]
    return common.labelled(pictures, lines, [f"{short(across)} = {number(column)}" for column in columns])
