"""Reads and truncates the logs metrics.jsonl and evaluations.jsonl. Each line is a JSON object with a step."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator

from ddim_jax.utils import files

LINE_BYTES = 1 << 20  # the maximum length of a line


def warn(message: str) -> None:
    """Prints a warning to stderr. Control characters are escaped."""
    print(f"\nwarning: {files.printable(message)}", file=sys.stderr, flush=True)


def truncate_after(step: int, file: pathlib.Path) -> None:
    """Removes the lines of later steps, which will be rewritten, and damaged lines. If there are damaged lines, the
    original FILE is renamed to FILE.damaged. ValueError if it is a pipe or a device.
    """
    if all(number is not None and number <= step and line.endswith(b"\n") for line, number in lines(file)):
        return
    damaged = 0
    with files.replacing(file) as truncated:
        for line, number in lines(file):
            if number is None:
                # An incomplete last line is not damage: the process was killed while it wrote the line.
                damaged += line.endswith(b"\n") or len(line) == LINE_BYTES
            elif number <= step:
                truncated.write(line.removesuffix(b"\n") + b"\n")
        if damaged:
            os.replace(file, file.with_name(f"{file.name}.damaged"))
    if damaged:
        warn(
            f"{file} has damaged lines: it was renamed to {file.name}.damaged, the new {file.name} has the other lines"
        )


def lines(file: pathlib.Path) -> Iterator[tuple[bytes, int | None]]:
    """(line, step) of each line of a log; step is None for a damaged line. No lines if the file does not exist. A line
    longer than LINE_BYTES is damaged and is yielded in pieces.
    """
    if not file.exists():
        return
    files.check_regular(file)
    with open(file, "rb") as stream:
        starts_line = True
        while line := stream.readline(LINE_BYTES):
            ends_line = line.endswith(b"\n")
            yield line, step_of(line) if starts_line and (ends_line or len(line) < LINE_BYTES) else None
            starts_line = ends_line


def step_of(line: bytes) -> int | None:
    """The step of a line, None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None


def steps_in(file: pathlib.Path) -> set[int]:
    """The steps of all undamaged lines of a log."""
    return {step for _, step in lines(file) if step is not None}
