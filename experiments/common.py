"""What the experiments share: cells that are measured once, the tables and pictures made of them, options."""

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
    "workdir": (None, "Use the latest checkpoint of this run, not config.pretrained or the weights that ship."),
    "out": (None, "Folder of the results."),
}
FILES = ("table.csv", "table.json", "table.md", "table.png")
WRITTEN = ("cells", *FILES)
RESULT = "result.json"
ARRAYS = ("samples", "latents", "reconstructions")
WRITTEN_BY_CELLS = (RESULT, "first.png", *(f"{name}.{kind}" for name in ARRAYS for kind in ("npz", "parts")))
NAME_BYTES = 200  # of a folder; file systems take 255


class Cell(NamedTuple):
    """One place of a table."""

    axes: dict[str, Any]  # column -> value, a number or a string
    depends: dict[str, Any]  # what its numbers depend on beside what all cells share
    cost: float  # how much longer than the others it takes, for the estimate
    measure: Callable[
        [output_folder.Folder], dict[str, Any]
    ]  # (a folder of its own) -> its numbers, JSON can hold them
    temporary: tuple[str, ...] = ()  # files in the folder that go once the numbers are there


def start(main: Callable[[types.SimpleNamespace], None], options: Mapping[str, tuple[Any, str]], **kinds: Any) -> None:
    """`cli.start` for a command that fills --out: that it can be written to is known before any work."""

    def checked(given: types.SimpleNamespace) -> None:
        if not given.out:
            raise ConfigError("--out is missing: the folder of the results")
        output_folder.check_writable(given.out)
        main(given)

    cli.start(checked, options, **kinds)


def folder_of(axes: dict[str, Any]) -> pathlib.Path:
    """Of a cell, below the output folder. Whatever the values are, it is one name, and no two cells have the same."""
    name = "_".join(f"{_in_a_file_name(axis)}={_in_a_file_name(str(value))}" for axis, value in axes.items())
    if len(name.encode()) > NAME_BYTES:
        name = f"{name.encode()[:NAME_BYTES].decode(errors='ignore')}-{_short_digest(name)}"
    return pathlib.Path("cells", name)


def _in_a_file_name(text: str) -> str:
    plain = re.sub(r"[^\w.-]", "-", text)
    return plain if plain == text else f"{plain}-{_short_digest(text)}"


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def begin(options: types.SimpleNamespace, written: Sequence[str] = WRITTEN, **depends: Any) -> output_folder.Folder:
    """The output folder, which becomes this experiment's own when it is first written to.

    depends: all that the results depend on; ConfigError if those in the folder depend on something else.
    """
    return output_folder.open_folder(options.out, depends, written)


def run(out: output_folder.Folder, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures the cells that are not measured yet, and returns all that are in the folder, those of earlier commands
    too: their axes and numbers, in order of the axes from the last to the first.

    A cell's numbers are in its folder, `result.json`, once they are complete: what was interrupted resumes with the
    cell that it was in. ConfigError if a file of a cell is not what was recorded of it.
    """
    todo = []
    for cell in cells:
        home = output_folder.open_folder(out / folder_of(cell.axes), cell.depends, WRITTEN_BY_CELLS, inside=out)
        if home.find(RESULT) is not None and home.find_all():
            home.forget(*cell.temporary)
        else:
            todo.append((cell, home))
    done, begun = 0.0, time.monotonic()
    for i, (cell, home) in enumerate(todo):
        home.claim()
        numbers = cell.measure(home)
        pictures = sorted(path.name for path in home.path.glob("[!.]*.png"))
        with home.writing(RESULT, also=pictures) as file:
            file.write(_json({"axes": cell.axes, "numbers": numbers}))
        home.forget(*cell.temporary)
        done += cell.cost
        left = sum(later.cost for later, _ in todo[i + 1 :]) / done * (time.monotonic() - begun)
        place = ", ".join(f"{axis} {value}" for axis, value in cell.axes.items())
        first = next((f"{name} {_shown(value)}" for name, value in numbers.items()), "")
        cli.say(f"{place}: {first} ({i + 1} of {len(todo)}; {duration(left)} left)")
    rows = [row for path in (out / "cells").glob(f"*/{RESULT}") if (row := _row(out, path.parent)) is not None]
    rows.sort(key=lambda row: [order_of(value) for value in reversed(row["axes"].values())])
    return [{**row["axes"], **row["numbers"]} for row in rows]


def _row(out: output_folder.Folder, path: pathlib.Path) -> dict[str, Any] | None:
    """What is in the folder of a cell, also of an earlier command; None if it is not measured yet."""
    home = output_folder.open_folder(path, None, WRITTEN_BY_CELLS, inside=out)
    if home.find(RESULT) is None:
        return None
    home.find_all()
    row = files.read_json(home / RESULT)
    if not isinstance(row, dict) or not all(isinstance(row.get(name), dict) for name in ("axes", "numbers")):
        raise ConfigError(f"{home / RESULT} holds no numbers of a cell; remove {path}")
    if out / folder_of(row["axes"]) != path:
        raise ConfigError(f"{home / RESULT} is of another cell, {folder_of(row['axes']).name}; remove {path}")
    return row


def keep_reference(out: output_folder.Folder, stored: pathlib.Path | None, found: reference.Reference) -> None:
    """Keeps the statistics of the real images for the next command, if they are not `stored` yet and it is known what
    they are of.
    """
    if stored is None and found.about is not None:
        with tempfile.TemporaryDirectory() as folder, out.writing("reference.npz") as file:
            fresh = pathlib.Path(folder, "reference.npz")
            reference.save(fresh, found)
            file.write(fresh.read_bytes())


def order_of(value: Any) -> tuple[float, str]:
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
    with files.replacing(path) as file:
        file.write(_json(content))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def write_text(path: pathlib.Path, text: str) -> None:
    with files.replacing(path) as file:
        file.write(text.encode())


def write_table(out: output_folder.Folder, rows: list[dict[str, Any]], **beside: Any) -> None:
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


def finish(out: output_folder.Folder, text: str, written: Sequence[str] = FILES) -> None:
    """Writes the text as table.md, records the files written, and prints the table and where all is."""
    write_text(out / "table.md", text)
    out.record(*written)
    cli.say("\n" + text)
    for name in written:
        cli.say(str(out / name))


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
