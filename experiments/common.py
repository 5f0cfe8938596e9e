"""What the experiments share: cells that are measured once, the tables and pictures made of them, options."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pathlib
import re
import shutil
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddim_jax import cli, files, output
from ddim_jax.errors import ConfigError

OPTIONS = {
    "workdir": (None, "Use the latest checkpoint of this run, not config.pretrained or the weights that ship."),
    "out": (None, "Folder of the results."),
}
FILES = ("table.csv", "table.json", "table.md", "table.png")
WRITTEN = ("cells", *FILES)


class Cell(NamedTuple):
    """One place of a table."""

    axes: dict[str, Any]  # column -> value, a number or a string
    depends: dict[str, Any]  # what its numbers depend on beside what all cells share
    cost: float  # how much longer than the others it takes, for the estimate
    measure: Callable[[pathlib.Path], dict[str, Any]]  # (a folder of its own) -> its numbers, JSON can hold them
    temporary: tuple[str, ...] = ()  # files in the folder that go once the numbers are there


def folder_of(axes: dict[str, Any]) -> pathlib.Path:
    """Of a cell, below the output folder."""
    return pathlib.Path("cells", "_".join(_in_a_file_name(f"{axis}={value}") for axis, value in axes.items()))


def _in_a_file_name(text: str) -> str:
    plain = re.sub(r"[^\w.=-]", "-", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def begin(options: types.SimpleNamespace, written: Sequence[str] = WRITTEN, **depends: Any) -> pathlib.Path:
    """The output folder, which from now on is this experiment's own.

    depends: all that the results depend on; ConfigError if those in the folder depend on something else.
    """
    if not options.out:
        raise ConfigError("--out is missing: the folder of the results")
    out = cli.writable_folder(options.out)
    output.claim(out, depends, written)
    return out


def run(out: pathlib.Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures the cells that are not measured yet, and returns all that are in the folder, those of earlier commands
    too: their axes and numbers, in order of the axes from the last to the first.

    A cell's numbers are in its folder, `result.json`, once they are complete: what was interrupted goes on
    with the cell that it was in.
    """
    todo = []
    for cell in cells:
        home = cli.writable_folder(out / folder_of(cell.axes))
        output.claim(home, cell.depends, ("result.json", *cell.temporary))
        if not (home / "result.json").exists():
            todo.append(cell)
        _clear(home, cell)
    done, begun = 0.0, time.monotonic()
    for i, cell in enumerate(todo):
        home = out / folder_of(cell.axes)
        numbers = cell.measure(home)
        write_json(home / "result.json", {"axes": cell.axes, "numbers": numbers})
        _clear(home, cell)
        done += cell.cost
        left = sum(later.cost for later in todo[i + 1 :]) / done * (time.monotonic() - begun)
        place = ", ".join(f"{axis} {value}" for axis, value in cell.axes.items())
        first = next((f"{name} {_shown(value)}" for name, value in numbers.items()), "")
        print(f"{place}: {first} ({i + 1} of {len(todo)}; {duration(left)} left)", flush=True)
    rows = [json.loads(path.read_text()) for path in (out / "cells").glob("*/result.json")]
    rows.sort(key=lambda row: [_order(value) for value in reversed(row["axes"].values())])
    return [{**row["axes"], **row["numbers"]} for row in rows]


def _clear(home: pathlib.Path, cell: Cell) -> None:
    """Removes what a cell that is measured needs no more."""
    if (home / "result.json").exists():
        for name in cell.temporary:
            path = home / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _order(value: Any) -> tuple[float, str]:
    """Numbers by their size, also those in words, then the rest by the alphabet."""
    try:
        return float(value), ""
    except ValueError:
        return float("inf"), value


def duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def write_json(path: pathlib.Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    with files.replacing(path) as file:
        file.write(text.encode())


def write_table(out: pathlib.Path, rows: list[dict[str, Any]], **beside: Any) -> None:
    """table.csv, and table.json with what else there is to say."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: _shown(value) for name, value in row.items()} for row in rows)
    write_text(out / "table.csv", text.getvalue())
    write_json(out / "table.json", {**beside, "rows": rows})


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def markdown(head: Sequence[Any], body: Sequence[Sequence[Any]]) -> str:
    """A table; floats with three digits."""
    text = lambda value: f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
    line = lambda cells: "| " + " | ".join(map(text, cells)) + " |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, body)]) + "\n"


def finish(out: pathlib.Path, text: str, files: Sequence[str] = FILES) -> None:
    """Writes the text as table.md, and tells people where all is."""
    write_text(out / "table.md", text)
    print("\n" + text)
    for name in files:
        print(out / name)


def ints(option: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers from a list with commas."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{option}: must be whole numbers, got {text!r}") from None
    if min(values) < least:
        raise ConfigError(f"--{option}: must be at least {least}, got {min(values)}")
    return list(dict.fromkeys(values))


LABEL = 14  # height of letters in pictures


def labelled(cells: Sequence[Sequence[np.ndarray | None]], rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Pictures (h, w, C) in rows and columns, with a word for each row and for each column. None stays white."""
    height, width, _ = np.max([cell.shape for line in cells for cell in line if cell is not None], axis=0)
    font = ImageFont.load_default(LABEL)
    left = max((int(font.getlength(row)) for row in rows), default=0) + 10 if any(rows) else 0
    top = LABEL + 8 if any(columns) else 0
    picture = Image.new("RGB", (left + width * len(columns), top + height * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for j, column in enumerate(columns):
        draw.text((left + width * j + width / 2, top / 2), column, "black", font, anchor="mm")
    for i, (row, line) in enumerate(zip(rows, cells, strict=True)):
        draw.text((left - 6, top + height * i + height / 2), row, "black", font, anchor="rm")
        for j, cell in enumerate(line):
            if cell is not None:
                colours = np.broadcast_to(cell, (*cell.shape[:2], 3))
                picture.paste(Image.fromarray(np.ascontiguousarray(colours)), (left + width * j, top + height * i))
    return np.asarray(picture)


def read_png(path: pathlib.Path) -> np.ndarray | None:
    """(H, W, C), None if there is no such file."""
    if not path.exists():
        return None
    pixels = np.asarray(Image.open(path))
    return pixels.reshape(*pixels.shape[:2], -1)


def root_mean_square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances (...) between images (..., H, W, C): root of the mean square over pixels in [0, 1]. uint8, or in
    [-1, 1].
    """
    scale = 255 if a.dtype == np.uint8 else 2
    return np.sqrt(np.square((a.astype(np.float64) - b.astype(np.float64)) / scale).mean((-3, -2, -1)))


def plot(path: pathlib.Path, draw: Callable[[Any], None], size: tuple[float, float] = (6, 4)) -> None:
    """A figure of Matplotlib's as PNG. draw: (figure) -> None."""
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=120, layout="constrained")
    draw(figure)
    with files.replacing(path) as file:
        figure.savefig(file, format="png")
