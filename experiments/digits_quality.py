"""Table 1 of the paper for the digits: quality over eta and S, by a judge that never saw a sample.

    python -m experiments.digits_quality --config configs/digits.py [--workdir DIR] --out DIR
    python -m experiments.digits_quality --config configs/digits.py --out DIR --steps 1000 --etas 0,1,hat

The judge is a classifier fitted on the real training images. Of every cell it tells the Fréchet distance to
the training images in its feature space, the mean confidence in the class it sees, and the share of each
class. Finished cells are kept in OUT/cells.json: a second command with the same OUT adds to the table, and an
interrupted one goes on with the next cell.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ddim_jax import cli, data, generate, images, sharding, weights
from ddim_jax import config as config_lib
from ddim_jax.config import Config, ConfigError
from ddim_jax.evaluation import digits_classifier, frechet

PICTURED = 8
VARIED = ("sampler", "eta", "steps", "num_images", "batch_size")  # from cell to cell, or without effect

OPTIONS = {
    "workdir": (None, "Judge the latest checkpoint of this run, not the weights that ship with the package."),
    "out": (None, "Folder of the results."),
    "etas": ("0,0.2,0.5,1,hat", "The rows: values of eta, and hat for sigma-hat."),
    "steps": ("5,10,20,50,100", "The columns: values of S."),
    "images": ("1000", "Images for each cell."),
}


def main(options: types.SimpleNamespace) -> None:
    if options.out is None:
        raise ConfigError("--out is missing: the folder of the results")
    count = _numbers("images", options.images)[0]
    if count < 2:
        raise ConfigError(f"--images: a covariance needs at least 2, got {count}")
    etas = [eta if eta == "hat" else _numbers("etas", eta)[0] for eta in options.etas.split(",")]
    columns = _numbers("steps", options.steps)
    cells = [cell_config(options.config, eta, steps, count) for steps in columns for eta in etas]
    noise_schedule = config_lib.noise_schedule(options.config.schedule)
    # Whether all of them are legal shows here, before any is drawn.
    processes = [config_lib.process(cell.sample, noise_schedule) for cell in cells]

    out = cli.writable_folder(options.out)
    mesh = sharding.data_mesh()
    found = weights.find(options.config, options.workdir, mesh)
    train, held_out = (data.load("digits", split=split) for split in data.SPLITS)
    judge = digits_classifier.fit(train)
    reference = Reference(judge, frechet.moments(judge(train.images).features), train.images, len(held_out))
    accuracy = (judge(held_out.images).probabilities.argmax(1) == held_out.labels).mean()
    header = {
        "weights": found.digest,
        "source": found.source,
        **sampled_alike(options.config),
        "held_out": {"accuracy": float(accuracy), **measure(held_out.images, reference)},
    }
    results = load(out / "cells.json", header)

    for cell, process in zip(cells, processes, strict=True):
        name = f"{row_of(cell)}/{cell.sample.steps}"
        if results["cells"].get(name, {}).get("images") == count:
            continue
        drawn = np.concatenate(list(generate.batches(cell, process, found.params, mesh)))
        results["cells"][name] = measure(drawn, reference)
        picture = cli.writable_folder(out / "pictures") / picture_name(name)
        images.write_png(picture, images.grid(drawn[:PICTURED], PICTURED))
        print(f"eta {row_of(cell):>4}, S {cell.sample.steps:>4}: {results['cells'][name]['distance']:.3f}", flush=True)
        write(out / "cells.json", json.dumps(results, indent=1))

    write(out / "table.csv", table_csv(results["cells"]))
    write(out / "table.md", table_markdown(results))
    images.write_png(out / "table.png", table_picture(results["cells"], out / "pictures"))
    print(table_markdown(results), end="")
    for path in ("cells.json", "table.csv", "table.md", "table.png"):
        print(out / path)


def cell_config(config: Config, eta: float | str, steps: int, count: int) -> Config:
    sampler = {"sampler": "ddpm_hat", "eta": 0.0} if eta == "hat" else {"sampler": "ddim", "eta": eta}
    values = dataclasses.asdict(config)
    values["sample"].update(steps=steps, num_images=count, **sampler)
    return config_lib.parse(values)


def row_of(config: Config) -> str:
    return "hat" if config.sample.sampler == "ddpm_hat" else f"{config.sample.eta:g}"


class Reference(NamedTuple):
    """What images are measured against."""

    judge: Callable[[np.ndarray], digits_classifier.Judgement]
    moments: frechet.Moments  # of the training images' features
    train: np.ndarray  # the training images
    held_out: int  # how many images are held out


def measure(drawn: np.ndarray, reference: Reference) -> dict[str, Any]:
    """The numbers of a cell.

    distance: Fréchet distance to the training images. distance_fewer: that of the first images alone, as many as are
    held out: from few images the covariance is noisy and the distance too large, so that only equal numbers compare.
    nearest: mean distance to the nearest training image, root mean square over pixels in [0, 1].
    """
    seen = reference.judge(drawn)
    shares = np.bincount(seen.probabilities.argmax(1), minlength=seen.probabilities.shape[1]) / len(drawn)
    a, b = (batch.reshape(len(batch), -1) / 255 for batch in (drawn, reference.train))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return {
        "images": len(drawn),
        "distance": frechet.distance(frechet.moments(seen.features), reference.moments),
        "distance_fewer": frechet.distance(frechet.moments(seen.features[: reference.held_out]), reference.moments),
        "confidence": float(seen.probabilities.max(1).mean()),
        "shares": shares.round(4).tolist(),
        "nearest": float(np.sqrt(np.clip(squared.min(1), 0, None) / a.shape[1]).mean()),
    }


def sampled_alike(config: Config) -> dict[str, Any]:
    """The fields of config.sample that all cells of a table share."""
    return {name: value for name, value in dataclasses.asdict(config.sample).items() if name not in VARIED}


def load(path: pathlib.Path, header: dict[str, Any]) -> dict[str, Any]:
    """The results so far; ConfigError if they are of other weights, or sampled otherwise."""
    if not path.exists():
        return {**header, "cells": {}}
    results = json.loads(path.read_text())
    for name in sorted(header.keys() - {"source", "held_out"}):
        if results.get(name) != header[name]:
            raise ConfigError(
                f"{path} was made with {name} {results.get(name)}, this run has {header[name]}; give another --out"
            )
    return {**results, **header}


def table_csv(cells: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = ("distance", "distance_fewer", "confidence", "nearest")
    writer.writerow(["eta", "S", "images", *numbers, "smallest_share", "largest_share"])
    for name, cell in cells.items():
        shown = [f"{cell[number]:.4f}" for number in numbers]
        writer.writerow([*name.split("/"), cell["images"], *shown, min(cell["shares"]), max(cell["shares"])])
    return text.getvalue()


def axes(cells: dict[str, Any]) -> tuple[list[str], list[int]]:
    """The rows (eta, in the order of measurement) and the columns (S, ascending) of the cells there are."""
    names = [name.split("/") for name in cells]
    return list(dict.fromkeys(eta for eta, _ in names)), sorted({int(steps) for _, steps in names})


def picture_name(cell: str) -> str:
    return f"{cell.replace('/', '_')}.png"


def table_picture(cells: dict[str, Any], folder: pathlib.Path) -> np.ndarray:
    """The first images of every cell, in the table's order; the same noise in all of them."""
    rows, columns = axes(cells)
    files = [[folder / picture_name(f"{row}/{steps}") for steps in columns] for row in rows]
    pictures = [[np.asarray(Image.open(file)) if file.exists() else None for file in line] for line in files]
    blank = np.full_like(next(picture for line in pictures for picture in line if picture is not None), 255)
    lines = [np.concatenate([blank if cell is None else cell for cell in line], axis=1) for line in pictures]
    return np.concatenate(lines)[..., None]


def table_markdown(results: dict[str, Any]) -> str:
    cells, real = results["cells"], results["held_out"]
    rows, columns = axes(cells)
    lines = [f"| eta | {' | '.join(f'S = {steps}' for steps in columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        values = [cells.get(f"{row}/{steps}") for steps in columns]
        shown = [f"{cell['distance']:.2f}" if cell else "" for cell in values]
        lines.append("| " + " | ".join(["sigma-hat" if row == "hat" else row, *shown]) + " |")
    lines.append("")
    lines.append(
        f"Held-out real images ({real['images']}): distance {real['distance']:.2f}, "
        f"mean confidence {real['confidence']:.3f}, nearest training image {real['nearest']:.3f}; "
        f"accuracy of the judge {real['accuracy']:.3f}."
    )
    return "\n".join(lines) + "\n"


def write(path: pathlib.Path, text: str) -> None:
    with images.replacing(path) as file:
        file.write(text.encode())


def _numbers(option: str, text: str) -> list[int | float]:
    try:
        return [int(part) if part.strip().isdigit() else float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{option}: must be numbers, got {text!r}") from None


if __name__ == "__main__":
    cli.start(main, OPTIONS)
