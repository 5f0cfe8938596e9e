"""Helpers of the experiments: cells that are computed once and stored, tables, pictures, options."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import pathlib
import re
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddim_jax import cli
from ddim_jax.evaluation import reference
from ddim_jax.utils import files, output_folder
from ddim_jax.utils.errors import ConfigError

OPTIONS = {
    "workdir": (None, "A training run: use its latest checkpoint instead of config.pretrained or the shipped weights."),
    "out": (None, "The output folder."),
}
FILES = ("table.csv", "table.json", "table.md", "table.png")
WRITTEN = ("cells", *FILES)
RESULT = "result.json"
ARRAYS = ("samples", "latents", "reconstructions")
WRITTEN_BY_CELLS = (RESULT, "first.png", *(f"{name}.{kind}" for name in ARRAYS for kind in ("npz", "parts")))
NAME_BYTES = 200  # the longest folder name; file systems allow 255


class Cell(NamedTuple):
    """One cell of a table."""

    axes: dict[str, Any]  # column -> value, a number or a string
    depends: dict[str, Any]  # what its numbers depend on, in addition to what all cells have in common
    cost: float  # run time relative to the other cells, for the estimate of the remaining time
    measure: Callable[[output_folder.Folder], dict[str, Any]]  # (the cell's folder) -> its numbers, JSON-serializable
    temporary: tuple[str, ...] = ()  # files in the cell's folder that are deleted once the numbers are stored


def start(main: Callable[[types.SimpleNamespace], None], options: Mapping[str, tuple[Any, str]], **kinds: Any) -> None:
    """`cli.start` for a command that writes to --out. Checks before any computation that --out is writable."""

    def checked(given: types.SimpleNamespace) -> None:
        if not given.out:
            raise ConfigError("--out is missing: the folder of the results")
        output_folder.check_writable(given.out)
        main(given)

    cli.start(checked, options, **kinds)


def folder_of(axes: dict[str, Any]) -> pathlib.Path:
    """The folder of a cell, relative to the output folder. Its name is valid for any values and unique to the axes."""
    name = "_".join(f"{_as_file_name(axis)}={_as_file_name(str(value))}" for axis, value in axes.items())
    if len(name.encode()) > NAME_BYTES:
        name = f"{name.encode()[:NAME_BYTES].decode(errors='ignore')}-{_short_digest(name)}"
    return pathlib.Path("cells", name)


def _as_file_name(text: str) -> str:
    plain = re.sub(r"[^\w.-]", "-", text)
    return plain if plain == text else f"{plain}-{_short_digest(text)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def begin(options: types.SimpleNamespace, written: Sequence[str] = WRITTEN, **depends: Any) -> output_folder.Folder:
    """Opens the output folder, which belongs to this experiment from the first write on.

    written: the names of all files and folders that the experiment may write. depends: all that the results depend on.
    ConfigError if the results in the folder depend on something else.
    """
    return output_folder.open_folder(options.out, depends, written)


def run(out: output_folder.Folder, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Computes the cells that are not in the output folder yet. Returns one row of axes and numbers for each cell in
    the folder, including the cells of earlier commands, sorted by the last axis first.

    A cell's numbers are written to `result.json` in its folder when they are complete. An interrupted command therefore
    resumes with the cell that it was computing. ConfigError if a file of a cell differs from its record.
    """
    todo = []
    for cell in cells:
        folder = output_folder.open_folder(out / folder_of(cell.axes), cell.depends, WRITTEN_BY_CELLS, inside=out)
        if folder.find(RESULT) is not None and folder.find_all():
            folder.forget(*cell.temporary)
        else:
            todo.append((cell, folder))
    cost_done, begin_time = 0.0, time.monotonic()
    for i, (cell, folder) in enumerate(todo):
        folder.claim()
        numbers = cell.measure(folder)
        pictures = sorted(path.name for path in folder.path.glob("[!.]*.png"))
        with folder.writing(RESULT, also=pictures) as file:
            file.write(_json({"axes": cell.axes, "numbers": numbers}))
        folder.forget(*cell.temporary)
        cost_done += cell.cost
        remaining = sum(later.cost for later, _ in todo[i + 1 :]) / cost_done * (time.monotonic() - begin_time)
        label = ", ".join(f"{axis} {value}" for axis, value in cell.axes.items())
        first = next((f"{name} {_formatted(value)}" for name, value in numbers.items()), "")
        cli.say(f"{label}: {first} ({i + 1} of {len(todo)}; {duration(remaining)} left)")
    rows = [row for path in (out / "cells").glob(f"*/{RESULT}") if (row := _row(out, path.parent)) is not None]
    rows.sort(key=lambda row: [order_of(value) for value in reversed(row["axes"].values())])
    return [{**row["axes"], **row["numbers"]} for row in rows]


def _row(out: output_folder.Folder, path: pathlib.Path) -> dict[str, Any] | None:
    """The row stored in the folder of a cell, possibly by an earlier command; None if the cell is not complete."""
    folder = output_folder.open_folder(path, None, WRITTEN_BY_CELLS, inside=out)
    if folder.find(RESULT) is None:
        return None
    folder.find_all()
    row = files.read_json(folder / RESULT)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), dict) for name in ("axes", "numbers")):
        raise ConfigError(f"{folder / RESULT}: expected the axes and the numbers of a cell; remove {path}")
    if out / folder_of(row["axes"]) != path:
        raise ConfigError(f"{folder / RESULT} belongs to another cell, {folder_of(row['axes']).name}; remove {path}")
    return row


def keep_reference(out: output_folder.Folder, stored: pathlib.Path | None, found: reference.Reference) -> None:
    """Stores the statistics of the real images for the next command, unless they are in the file `stored` already or
    their origin is unknown.
    """
    if stored is None and found.about is not None:
        with tempfile.TemporaryDirectory() as folder, out.writing("reference.npz") as file:
            temporary = pathlib.Path(folder, "reference.npz")
            reference.save(temporary, found)
            file.write(temporary.read_bytes())


def order_of(value: Any) -> tuple[float, str]:
    """A sort key: numbers, and strings that hold one, by value; then the other strings alphabetically."""
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
    with files.replacing(path) as file:
        file.write(_json(content))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def write_text(path: pathlib.Path, text: str) -> None:
    with files.replacing(path) as file:
        file.write(text.encode())


def write_table(out: output_folder.Folder, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes the rows to table.csv, and the rows and the entries `more` to table.json."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: _formatted(value) for name, value in row.items()} for row in rows)
    write_text(out / "table.csv", text.getvalue())
    write_json(out / "table.json", {**more, "rows": rows})


def _formatted(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def markdown(head: Sequence[Any], body: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats with three significant digits."""
    text = lambda value: f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
    line = lambda cells: "| " + " | ".join(map(text, cells)) + " |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, body)]) + "\n"


def finish(out: output_folder.Folder, text: str, written: Sequence[str] = FILES) -> None:
    """Writes `text` to table.md, records the files `written`, and prints the text and the paths of the files."""
    write_text(out / "table.md", text)
    out.record(*written)
    cli.say("\n" + text)
    for name in written:
        cli.say(str(out / name))


def ints(option: str, text: str, least: int = 1) -> list[int]:
    """The integers of a comma-separated list, each once. ConfigError for anything else, and below `least`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{option}: must be whole numbers, got {text!r}") from None
    if min(values) < least:
        raise ConfigError(f"--{option}: must be at least {least}, got {min(values)}")
    return list(dict.fromkeys(values))


LABEL = 14  # font size of the labels in pictures


def labelled(cells: Sequence[Sequence[np.ndarray | None]], rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
    """Pictures (h, w, C) in rows and columns, with a label for each row and each column. None gives a white cell."""
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
    """Pixels (H, W, C) of a PNG file; None if the file does not exist."""
    if not path.exists():
        return None
    pixels = np.asarray(Image.open(path))
    return pixels.reshape(*pixels.shape[:2], -1)


def root_mean_square(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square distances (...) between images (..., H, W, C), over pixels in [0, 1]. The images are uint8, or
    floats in [-1, 1].
    """
    scale = 255 if a.dtype == np.uint8 else 2
    return np.sqrt(np.square((a.astype(np.float64) - b.astype(np.float64)) / scale).mean((-3, -2, -1)))


def plot(path: pathlib.Path, draw: Callable[[Any], None], size: tuple[float, float] = (6, 4)) -> None:
    """Saves a Matplotlib figure as PNG. draw: (figure) -> None. size: in inches."""
    from matplotlib.figure import Figure

    figure = Figure(size, dpi=120, layout="constrained")
    draw(figure)
    with files.replacing(path) as file:
        figure.savefig(file, format="png")
