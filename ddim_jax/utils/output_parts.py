"""Arrays that are computed and saved in parts in an output folder. An interrupted run resumes with the first part that
is missing.
"""

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
    """ConfigError if the disk has not enough space for the results that are missing in a folder. They are computed one
    after the other, and each exists twice for a short time: in parts, and in one file.
    """
    missing = {name: arrays for name, arrays in results.items() if not folder.has(name)}
    if not missing or not sharding.is_main_process():
        return
    sizes = [arrays.nbytes for arrays in missing.values()]
    existing = [path for name in missing for path in (folder / name, *_parts_of(folder, name).glob("*.npz"))]
    needed = sum(sizes) + max(sizes) - sum(path.lstat().st_size for path in existing if os.path.lexists(path))
    with one_line(folder.path):
        parent = files.check_writable_folder(folder.path)
        free = shutil.disk_usage(parent).free
    if needed > free:
        arrays = next(iter(missing.values()))
        raise ConfigError(
            f"{arrays.counted_by}: {arrays.length} images need {files.human_size(needed)}, in parts and then in one "
            f"file, and the disk of {parent} has {files.human_size(free)} left; request fewer images, or give an --out "
            f"on another disk"
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
    """Computes the .npz with this name in the folder, and returns its path. Existing parts of it are verified and not
    recomputed; ConfigError if this run did not write them.

    batches: (index of the first item) -> iterator over dicts of arrays (b, ...), the items from this index on. Each
    batch is saved as a part in the folder NAME.parts, until all are complete. doing: the text of the progress bar.
    computed_with: the settings that change the rounding of floats, recorded for the items that they produced. In a
    distributed run all processes compute their shard of a batch, and the main process writes it.
    """
    is_main, total = sharding.is_main_process(), arrays.length
    complete, parts = folder.find(name, arrays) if is_main else None, _Parts(folder, name, arrays)
    done = sharding.broadcast_from_main((total if complete else parts.find()) if is_main else 0)
    with tqdm(total=total, initial=done, desc=doing, unit="image", disable=not is_main) as bar:
        for batch in batches(done) if done < total else ():
            if is_main:
                parts.write(done, batch, computed_with)
            size = len(next(iter(batch.values())))
            done += size
            bar.update(size)
    if is_main and complete is None:
        with folder.writing(name, arrays=arrays.described(), computed_with=parts.computed_with()) as file:
            images.save_npz(file, total, parts.read)
    if is_main:
        remove(parts.folder)  # it also exists if a run was killed after it wrote the complete file
    sharding.barrier(name)
    return folder / name


class _Parts:
    """The consecutive parts of a result, each an .npz that is named by the index of its first item.

    The comment of each file holds the SHA-256 of its arrays, its first index, and the inputs of the run. This digest
    verifies that the part is complete and belongs to this run. So a part needs no entry in the record.
    """

    def __init__(self, output: Folder, name: str, arrays: Arrays):
        self.folder = _parts_of(output, name)
        self._output, self._arrays = output, arrays
        self._run = files.json_digest([output.made_from, name])
        self._parts: list[tuple[int, Mapping[str, Any]]] = []  # (index of the first item, computed_with) of each part

    def find(self) -> int:
        """The number of items in complete parts. ConfigError for a part of another run."""
        done = 0
        if not self._output.has(self.folder.name):
            return done
        if self.folder.is_symlink() or not self.folder.is_dir():
            self._output.refuse(self.folder, "it is not a folder")
        while os.path.lexists(path := self._path(done)):
            try:
                count, computed_with = self._verified(path, done)
            except Exception as error:  # zipfile, NumPy and json raise many types for a file that is not a part
                reason = str(error) if isinstance(error, ValueError) else type(error).__name__
                self._output.refuse(path, reason)
                break
            self._parts.append((done, computed_with))
            done += count
        return done

    def write(self, begin: int, batch: Mapping[str, np.ndarray], computed_with: Mapping[str, Any]) -> None:
        """Writes the part whose first item has the index `begin`."""
        self._output.claim()
        self.folder.mkdir(exist_ok=True)
        comment = {"sha256": self._digest(begin, batch, computed_with), "computed_with": computed_with}
        with files.replacing(self._path(begin)) as file:
            images.save_npz(file, len(next(iter(batch.values()))), lambda: [batch], json.dumps(comment).encode())
        self._parts.append((begin, computed_with))

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of all parts, in order."""
        return (images.open_npz(self._path(begin)) for begin, _ in self._parts)

    def computed_with(self) -> list[dict[str, Any]]:
        """The settings of the items, each with the index of the first item ("from") that it applies to."""
        parts = self._parts
        changes = [parts[i] for i in range(len(parts)) if not i or parts[i][1] != parts[i - 1][1]]
        return [{"from": begin, **computed_with} for begin, computed_with in changes]

    def _path(self, begin: int) -> pathlib.Path:
        return self.folder / f"{begin:08d}.npz"

    def _verified(self, path: pathlib.Path, begin: int) -> tuple[int, Mapping[str, Any]]:
        """(number of items, computed_with) of a part. It may raise any exception if the file is not a part."""
        files.check_regular(path)
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
            comment = json.loads(archive.comment or b"{}")
        part = images.open_npz(path)
        count = max((len(array) for array in part.values()), default=0)
        if not 1 <= count <= self._arrays.length - begin or described(part) != self._arrays.described(count):
            raise ValueError(f"it must hold items of {shown(self._arrays.described())}, got {shown(described(part))}")
        if not comment or comment["sha256"] != self._digest(begin, part, comment["computed_with"]):
            raise ValueError("it does not match the SHA-256 in its comment")
        return count, comment["computed_with"]

    def _digest(self, begin: int, batch: Mapping[str, np.ndarray], computed_with: Mapping[str, Any]) -> str:
        total = hashlib.sha256(files.json_digest([self._run, begin, described(batch), computed_with]).encode())
        for name in sorted(batch):
            total.update(np.ascontiguousarray(batch[name]).data)
        return total.hexdigest()
