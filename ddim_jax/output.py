"""The output folder of a command: whose it is, and arrays that are made batch by batch and never made twice."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ddim_jax import files, images, sharding
from ddim_jax.errors import ConfigError

RECORD = "run.json"


def claim(out: pathlib.Path, ours: dict[str, Any], written: Sequence[str], overwrite: bool | None = None) -> None:
    """Makes the folder this run's own, or raises ConfigError because another run's results, or foreign files, are
    in it.

    ours: all that the results depend on, JSON can hold it. written: the names of all files and folders that the
    command may write; these alone are removed to overwrite. overwrite: None for a command that never does.
    """
    if sharding.is_first():
        _claim(out, ours, written, overwrite)
    sharding.all_here("claim")


def _claim(out: pathlib.Path, ours: dict[str, Any], written: Sequence[str], overwrite: bool | None) -> None:
    ours = json.loads(json.dumps(ours))  # tuples become lists, as in what is read
    record = out / RECORD
    present = [name for name in (RECORD, *written) if (out / name).exists()]
    if record.exists():
        try:
            theirs = json.loads(record.read_text())
        except json.JSONDecodeError:
            theirs = {}
        difference = next(_differences("", theirs, ours), None)
        if difference is None:
            return
        reason = f"{out} holds what another run made ({difference})"
    elif present:
        reason = f"{out} already holds {present[0]}"
    else:
        reason = None
    if reason and not overwrite:
        raise ConfigError(f"{reason}; give another --out" + ", or --overwrite to replace it" * (overwrite is not None))
    for name in present:
        _remove(out / name)
    with files.replacing(record) as file:
        file.write(json.dumps(ours, indent=1).encode())


def _remove(path: pathlib.Path) -> None:
    """A file, or a folder of files whose names are numbers; whatever else somebody put into that folder stays."""
    if not path.is_dir():
        path.unlink()
        return
    for file in path.iterdir():
        if file.stem.isdigit():
            file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _differences(path: str, theirs: Any, ours: Any):
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *theirs]:
            yield from _differences(f"{path}.{name}" if path else name, theirs.get(name), ours.get(name))
    elif theirs != ours:
        yield f"{path} is {str(theirs)[:40]} there, {str(ours)[:40]} here"


def gather(
    npz: pathlib.Path, batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]], total: int, doing: str
) -> pathlib.Path:
    """The .npz of `total` items, arrays (total, ...) by their names.

    batches: (number of the first item) -> dicts of arrays (b, ...), the items from there on. Finished batches wait in
    a folder beside the file, NAME.parts, so that a run that was interrupted makes none twice. doing: for the bar. Of
    several processes all make their part of a batch, and the first writes it.
    """
    parts, first = npz.with_suffix(".parts"), sharding.is_first()
    done = sharding.agreed(total if npz.exists() else _count(parts))
    with tqdm(total=total, initial=done, desc=doing, unit="image", disable=not first) as bar:
        for batch in batches(done) if done < total else ():
            if first:
                parts.mkdir(exist_ok=True)
                with files.replacing(parts / f"{done:08d}.npz") as file:
                    np.savez(file, **batch)
            size = len(next(iter(batch.values())))
            done += size
            bar.update(size)
    if first and not npz.exists():
        images.write_npz(npz, total, lambda: map(_load, sorted(parts.glob("*.npz"))))
    if first:
        shutil.rmtree(parts, ignore_errors=True)  # also of a run that was killed after its last word
    sharding.all_here(npz.name)
    return npz


def _count(parts: pathlib.Path) -> int:
    """How many items are done."""
    done = 0
    while (part := parts / f"{done:08d}.npz").exists():
        done += len(next(iter(_load(part).values())))
    return done


def _load(part: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(part, allow_pickle=False) as file:
        return dict(file)
