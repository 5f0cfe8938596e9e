"""Arrays made piece by piece in an output folder: what was interrupted resumes with the piece that it was in."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from ddim_jax.utils import files, images, sharding
from ddim_jax.utils.errors import ConfigError
from ddim_jax.utils.output_arrays import Arrays, check_stored, described, one_line, remove, shown
from ddim_jax.utils.output_folder import Folder


def check_room(folder: Folder, results: Mapping[str, Arrays]) -> None:
    """ConfigError if the disk has no room for the results that are missing in a folder. They are made one after the
    other, and for a moment each is there twice: in parts, and whole.
    """
    missing = {name: arrays for name, arrays in results.items() if not folder.has(name)}
    if not missing or not sharding.is_main_process():
        return
    sizes = [arrays.nbytes for arrays in missing.values()]
    present = [path for name in missing for path in (folder / name, *_parts_of(folder, name).glob("*.npz"))]
    needed = sum(sizes) + max(sizes) - sum(path.lstat().st_size for path in present if os.path.lexists(path))
    with one_line(folder.path):
        there = files.check_writable_folder(folder.path)
        free = shutil.disk_usage(there).free
    if needed > free:
        arrays = next(iter(missing.values()))
        raise ConfigError(
            f"{arrays.counted_by}: {arrays.length} images need {files.human_size(needed)}, in parts and then in one "
            f"file, and the disk of {there} has {files.human_size(free)} left; ask for fewer, or give an --out on "
            f"another disk"
        )


def _parts_of(folder: Folder, name: str) -> pathlib.Path:
    return (folder / name).with_suffix(".parts")


def gather(
    folder: Folder,
    name: str,
    arrays: Arrays,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    doing: str,
    computed_with: Mapping[str, Any],
) -> pathlib.Path:
    """The .npz of that name in the folder, of these arrays. What is there of it already is verified, and not made
    again; ConfigError where it is not what this run wrote.

    batches: (number of the first item) -> dicts of arrays (b, ...), the items from there on. Finished batches wait in a
    folder beside the file, NAME.parts, for the others. doing: for the bar. computed_with: what decides how floats are
    rounded, recorded for the items that it made. Of several processes all make their part of a batch, and the first
    writes it.
    """
    first, total = sharding.is_main_process(), arrays.length
    whole, parts = folder.find(name, arrays) if first else None, _Parts(folder, name, arrays)
    done = sharding.broadcast_from_main((total if whole else parts.find()) if first else 0)
    with tqdm(total=total, initial=done, desc=doing, unit="image", disable=not first) as bar:
        for batch in batches(done) if done < total else ():
            if first:
                parts.write(done, batch, computed_with)
            size = len(next(iter(batch.values())))
            done += size
            bar.update(size)
    if first and whole is None:
        with folder.writing(name, arrays=arrays.described(), computed_with=parts.computed_with()) as file:
            images.save_npz(file, total, parts.read)
    if first:
        remove(parts.home)  # also of a run that was killed after its last word
    sharding.barrier(name)
    return folder / name


class _Parts:
    """Consecutive pieces of a result, each an .npz named by the number of its first item.

    A part is sealed: the comment of the file holds a SHA-256 of its arrays, their place, and what the run is made from.
    So it needs no record: it is whole, and of this run, or it is not.
    """

    def __init__(self, folder: Folder, name: str, arrays: Arrays):
        self.home = _parts_of(folder, name)
        self._folder, self._arrays = folder, arrays
        self._run = files.json_digest([folder.made_from, name])
        self._made: list[tuple[int, Mapping[str, Any]]] = []  # the first item, and what it was computed with

    def find(self) -> int:
        """How many items are done. ConfigError for a part that is not of this run."""
        done = 0
        if not self._folder.has(self.home.name):
            return done
        if self.home.is_symlink() or not self.home.is_dir():
            self._folder.refuse(self.home, "it is no folder")
        while os.path.lexists(path := self._path(done)):
            try:
                count, computed_with = self._verified(path, done)
            except Exception as error:  # whatever a file that is no part makes zipfile, NumPy and JSON say
                reason = str(error) if isinstance(error, ValueError) else type(error).__name__
                self._folder.refuse(path, reason)
                break
            self._made.append((done, computed_with))
            done += count
        return done

    def write(self, begin: int, batch: Mapping[str, np.ndarray], computed_with: Mapping[str, Any]) -> None:
        self._folder.claim()
        self.home.mkdir(exist_ok=True)
        seal = {"sha256": self._seal(begin, batch, computed_with), "computed_with": computed_with}
        with files.replacing(self._path(begin)) as file:
            images.save_npz(file, len(next(iter(batch.values()))), lambda: [batch], json.dumps(seal).encode())
        self._made.append((begin, computed_with))

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        return (images.open_npz(self._path(begin)) for begin, _ in self._made)

    def computed_with(self) -> list[dict[str, Any]]:
        """What the items were computed with, from which item on."""
        changes = [self._made[i] for i in range(len(self._made)) if not i or self._made[i][1] != self._made[i - 1][1]]
        return [{"from": begin, **computed_with} for begin, computed_with in changes]

    def _path(self, begin: int) -> pathlib.Path:
        return self.home / f"{begin:08d}.npz"

    def _verified(self, path: pathlib.Path, begin: int) -> tuple[int, Mapping[str, Any]]:
        """The number of items of a part, and what they were computed with."""
        files.check_regular(path)
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
            seal = json.loads(archive.comment or b"{}")
        found = images.open_npz(path)
        count = max((len(array) for array in found.values()), default=0)
        if not 1 <= count <= self._arrays.length - begin or described(found) != self._arrays.described(count):
            raise ValueError(f"it holds {shown(described(found))}, not some of {shown(self._arrays.described())}")
        if not seal or seal["sha256"] != self._seal(begin, found, seal["computed_with"]):
            raise ValueError("its SHA-256 is not the one that was written with it")
        return count, seal["computed_with"]

    def _seal(self, begin: int, batch: Mapping[str, np.ndarray], computed_with: Mapping[str, Any]) -> str:
        total = hashlib.sha256(files.json_digest([self._run, begin, described(batch), computed_with]).encode())
        for name in sorted(batch):
            total.update(np.ascontiguousarray(batch[name]).data)
        return total.hexdigest()
