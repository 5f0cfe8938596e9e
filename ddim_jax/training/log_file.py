"""The lines of metrics.jsonl and evaluations.jsonl: JSON objects with a step."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator

from ddim_jax.utils import files

LINE_BYTES = 1 << 20  # no line of a log is longer


def warn(message: str) -> None:
    print(f"\nwarning: {files.printable(message)}", file=sys.stderr, flush=True)


def truncate_after(step: int, file: pathlib.Path) -> None:
    """Removes lines of later steps, which will be written again, and damaged ones. If there are any of these, FILE is
    kept as FILE.damaged. ValueError if it is a pipe or a device.
    """
    if all(found is not None and found <= step and line.endswith(b"\n") for line, found in lines(file)):
        return
    damaged = 0
    with files.replacing(file) as kept:
        for line, found in lines(file):
            if found is None:  # the last may be half a line, of a process that was killed while it wrote
                damaged += line.endswith(b"\n") or len(line) == LINE_BYTES
            elif found <= step:
                kept.write(line.removesuffix(b"\n") + b"\n")
        if damaged:
            os.replace(file, file.with_name(f"{file.name}.damaged"))
    if damaged:
        warn(f"{file} has damaged lines and is now {file.name}.damaged; the others are kept")


def lines(file: pathlib.Path) -> Iterator[tuple[bytes, int | None]]:
    """The lines of a log, none if there is no file, and the step of each; None for one that is damaged. What is longer
    than LINE_BYTES comes in pieces.
    """
    if not file.exists():
        return
    files.check_regular(file)
    with open(file, "rb") as stream:
        begins = True
        while line := stream.readline(LINE_BYTES):
            ends = line.endswith(b"\n")
            yield line, step_of(line) if begins and (ends or len(line) < LINE_BYTES) else None
            begins = ends


def step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None


def steps_in(file: pathlib.Path) -> set[int]:
    """The steps that a file has lines of."""
    return {step for _, step in lines(file) if step is not None}
