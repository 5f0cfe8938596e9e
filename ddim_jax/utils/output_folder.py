"""The output folder of a command, with a record that identifies its run and verifies its files.

The record, run.json, holds the inputs of the results (`made_from`) and the SHA-256 of every file. For arrays it also
holds their shapes, their dtypes, and `computed_with`, which is not compared. A file is recorded before it is renamed to
its final name. So after a process was killed, an existing result without an entry does not belong to this run, and a
missing result with an entry is recomputed. Results are verified before they are used. A result that does not match its
entry raises an error that names it; it is replaced only with `overwrite`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError
from ddim_jax.utils.output_arrays import Arrays, checked_arrays, one_line, remove, shown

RECORD = "run.json"


def check_writable(path: str | os.PathLike) -> None:
    """ConfigError if files cannot be written to a folder, or if it cannot be created. It creates nothing."""
    try:
        files.check_writable_folder(pathlib.Path(path))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_folder(
    path: str | os.PathLike,
    made_from: Mapping[str, Any] | None,
    written: Sequence[str],
    overwrite: bool | None = None,
    inside: Folder | None = None,
) -> Folder:
    """Opens the output folder of a run. Nothing on the disk changes before the first write, which claims the folder.

    made_from: all inputs of the results, as JSON values; None for those in the record. written: the names of all files
    and folders that the command may write; only these are removed to overwrite. overwrite: whether to replace results
    of another run; None for a command without this option. inside: the output folder that contains this one.
    ConfigError if the folder is not writable, if it holds results of another run or unrecorded files, if its record is
    damaged, or if another process is writing to it.
    """
    folder = Folder(pathlib.Path(path), made_from, written, overwrite, inside)
    if sharding.is_main_process():
        if inside is None:
            check_writable(path)
        try:
            folder.open()
        except BaseException:
            folder.release()
            raise
    sharding.barrier("output folder")
    return folder


class Folder:
    """An output folder and its record. `folder / name` is a path in it. Only the main process writes."""

    def __init__(
        self,
        path: pathlib.Path,
        made_from: Mapping[str, Any] | None,
        written: Sequence[str],
        overwrite: bool | None,
        inside: Folder | None,
    ):
        self.path, self._names, self._overwrite, self._inside = path, (RECORD, *written), overwrite, inside
        self.made_from = json.loads(json.dumps(made_from))  # tuples become lists, as in a record that is read
        self._recorded: dict[str, dict[str, Any]] = {}
        self._replaced: list[str] = []  # names to remove at the first write
        self._state: Any = None  # the last known state of the record on the disk
        self._claimed, self._lock = False, None

    def __truediv__(self, name: str | os.PathLike) -> pathlib.Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        """Reads the record; see `open_folder`."""
        with one_line(self.path):
            if self.path.is_dir():
                self._acquire_lock()
            existing = [name for name in self._names if os.path.lexists(self / name)]
            reason, is_old = f"{self} already holds {existing[0]}" if existing else None, False
            if RECORD in existing:
                self._state = self._current_state()
                try:
                    saved, self._recorded, is_old = _read(self / RECORD)
                    self.made_from = saved if self.made_from is None else self.made_from
                    difference = next(_differences("", saved, self.made_from, is_old), None)
                    reason = difference and f"{self} holds results of another run ({difference})"
                except ValueError as error:
                    reason = f"{self / RECORD} is damaged: {error}"
            if reason and not self._overwrite:
                raise ConfigError(f"{reason}; {self._advice()}")
            if reason:
                self._recorded, self._replaced = {}, existing
            elif is_old:
                self._adopt()

    def claim(self) -> None:
        """Creates the folder if needed, and its record for this run. ConfigError if another process has written it."""
        if self._claimed or not sharding.is_main_process():
            return
        if self._inside is not None:
            self._inside.claim()
        with one_line(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            self._check_state()
            for name in self._names if self._inside is None else "*":
                files.remove_temporaries(self.path, name)
            for name in self._replaced:
                remove(self / name)
            self._state, self._replaced, self._claimed = self._current_state(), [], True
            self._write()

    def _acquire_lock(self) -> None:
        """Locks the folder for this process until `release`, or until this object is deleted. ConfigError if another
        process on this machine has locked it.
        """
        if self._lock is not None or self._inside is not None:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        self._lock = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(f"another process is writing to {self}; wait for it, or give another --out") from None
        except OSError:  # a file system without locks: `_check_state` detects that another process has written
            pass

    def release(self) -> None:
        """Releases the lock of the folder."""
        if self._lock is not None:
            self._lock()
            self._lock = None

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name exists that will not be overwritten."""
        return name not in self._replaced and os.path.lexists(self / name)

    def find(self, name: str, arrays: Arrays | None = None) -> pathlib.Path | None:
        """The path of a verified result, None if it does not exist. ConfigError if it differs from its entry in the
        record, or does not hold these arrays.
        """
        if not self.has(name):
            return None
        path, recorded, reason = self / name, self._recorded.get(name, {}), None
        with one_line(path):
            files.check_regular(path)
            if path.is_dir():
                reason = "it is a folder"
            elif not recorded:
                reason = f"{RECORD} does not list it"
            elif files.sha256(path) != recorded["sha256"]:
                reason = f"its SHA-256 is not the one in {RECORD}"
            elif arrays is not None and recorded.get("arrays") != arrays.described():
                reason = f"it must hold {shown(arrays.described())}, got {shown(recorded.get('arrays'))}"
        return self.refuse(path, reason) if reason else path

    def find_all(self) -> bool:
        """Whether all recorded results exist. ConfigError as for `find`."""
        return all([self.find(name) is not None for name in self._recorded])

    def refuse(self, path: pathlib.Path, reason: str) -> None:
        """Raises a ConfigError for a file that this run did not write. With `overwrite` it removes the file instead."""
        if self._overwrite:
            remove(path)
        if os.path.lexists(path):
            raise ConfigError(f"{path} was not written by this run: {reason}; remove it, {self._advice('or ')}")

    @contextlib.contextmanager
    def writing(self, name: str, also: Sequence[str] = (), **about: Any) -> Iterator[BinaryIO]:
        """Yields a binary file to write a result to. It is recorded, with its SHA-256 and `about`, before it is
        renamed to this name. also: existing files that are recorded at the same time.
        """
        self.claim()

        def complete(temporary: pathlib.Path) -> None:
            self._record({name: {"sha256": files.sha256(temporary), **about}}, also)

        with files.replacing(self / name, complete) as file:
            yield file

    def record(self, *names: str) -> None:
        """Records existing files."""
        if sharding.is_main_process():
            self.claim()
            self._record({}, names)

    def forget(self, *names: str) -> None:
        """Removes files, or folders of numbered files, and their entries in the record."""
        if any(name in self._recorded for name in names):
            self._recorded = {name: about for name, about in self._recorded.items() if name not in names}
            self._write()
        for name in names:
            remove(self / name)

    def _advice(self, conjunction: str = "") -> str:
        if self._overwrite is None:
            return f"{conjunction}give another --out"
        return "give another --out, or --overwrite to replace it"

    def _adopt(self) -> None:
        """Records the results of an earlier version, which did not record files. Each must be readable; arrays must
        match their CRCs. Partial results cannot be verified: they are removed, and recomputed later.
        """
        for name in self._names[1:]:
            path = self / name
            if name.endswith(".parts"):
                remove(path)
            elif path.suffix in (".npz", ".json") and os.path.lexists(path):
                try:
                    about = {"arrays": checked_arrays(path)} if path.suffix == ".npz" else {}
                    if not about:
                        files.read_json(path)
                except Exception as error:  # zipfile and NumPy raise many types for a damaged file
                    self.refuse(path, str(error) or type(error).__name__)
                    continue
                self._recorded[name] = {"sha256": files.sha256(path), **about}
        self.claim()

    def _record(self, entries: Mapping[str, dict[str, Any]], names: Sequence[str]) -> None:
        self._recorded |= entries | {name: {"sha256": files.sha256(self / name)} for name in names}
        self._write()

    def _write(self) -> None:
        self._check_state()
        content = json.dumps({"made_from": self.made_from, "files": self._recorded}, indent=1).encode()
        with files.replacing(self / RECORD) as file:
            file.write(content)
        self._state = self._current_state()

    def _current_state(self) -> Any:
        """The identity of the record on the disk, None if it does not exist. Every write creates a new file."""
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(self / RECORD)
            return status.st_ino, status.st_size, status.st_mtime_ns

    def _check_state(self) -> None:
        if self._current_state() != self._state:
            raise ConfigError(f"another process has written to {self}; give another --out")


def _read(record: pathlib.Path) -> tuple[Any, dict[str, dict[str, Any]], bool]:
    """(made_from, entries of the files, whether an earlier version wrote the record, without entries). ValueError if it
    is not a record.
    """
    values = files.read_json(record)
    if isinstance(values, dict) and not {"made_from", "files"} & values.keys():
        return values, {}, True
    try:
        made_from, recorded = values["made_from"], values["files"]
        for name, about in recorded.items():
            files.check_name(name)
            shown(about.get("arrays"))
            if not isinstance(about["sha256"], str):
                raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise ValueError("it is not a record of a run") from None
    return made_from, recorded, False


def _differences(path: str, saved: Any, current: Any, is_old: bool) -> Iterator[str]:
    """The differences between two values, as text. is_old: whether saved is from an earlier version; then only fields
    that exist in both are compared.
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in [*current, *saved]:
            if not is_old or (name in saved and name in current):
                inner = f"{path}.{name}" if path else name
                yield from _differences(inner, saved.get(name), current.get(name), is_old)
    elif saved != current:
        yield files.printable(f"{path} is {str(saved)[:40]} in the record, {str(current)[:40]} in this run")
