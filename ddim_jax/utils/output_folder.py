"""The output folder of a command: whose it is, what is in it, and arrays that are made batch by batch and never twice.

A folder's record, run.json, says what its results are made from (`made_from`), and of every file its SHA-256, for
arrays their shapes and dtypes, and what they were computed with, which is not compared. A file is recorded before it
gets its name. So whenever a process is killed, a result that is there and not recorded is not of this run, and one that
is recorded and not there is made again. Results are verified before they are used: what does not fit is named, never
taken, and never replaced without being asked to.
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
    """ConfigError if nothing can be written to a folder, or if it cannot be made. Makes nothing."""
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
    """The output folder of a run. ConfigError if it cannot be written to, if another run's results, or files that no
    run recorded, are in it, if its record is damaged, or if another process is writing to it. It becomes this run's own
    when it is first written to: until then nothing is changed.

    made_from: all that the results depend on, JSON can hold it; None: whatever the record says. written: the names of
    all files and folders that the command may write; these alone are removed to overwrite. overwrite: None for a
    command that never does. inside: the output folder that this one is part of.
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
    """An output folder and its record; `folder / name` is a path in it. Of several processes the first alone writes."""

    def __init__(
        self,
        path: pathlib.Path,
        made_from: Mapping[str, Any] | None,
        written: Sequence[str],
        overwrite: bool | None,
        inside: Folder | None,
    ):
        self.path, self._names, self._overwrite, self._inside = path, (RECORD, *written), overwrite, inside
        self.made_from = json.loads(json.dumps(made_from))  # tuples become lists, as in what is read
        self._recorded: dict[str, dict[str, Any]] = {}
        self._replaced: list[str] = []  # names to be removed at the first write
        self._state: Any = None  # of the record on the disk, as this process knows it
        self._own, self._lock = False, None

    def __truediv__(self, name: str | os.PathLike) -> pathlib.Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        """Reads the record; see `open_folder`."""
        with one_line(self.path):
            if self.path.is_dir():
                self._hold()
            present = [name for name in self._names if os.path.lexists(self / name)]
            reason, before = f"{self} already holds {present[0]}" if present else None, False
            if RECORD in present:
                self._state = self._state_now()
                try:
                    saved, self._recorded, before = _read(self / RECORD)
                    self.made_from = saved if self.made_from is None else self.made_from
                    difference = next(_differences("", saved, self.made_from, before), None)
                    reason = difference and f"{self} holds what another run made ({difference})"
                except ValueError as error:
                    reason = f"{self / RECORD} is damaged: {error}"
            if reason and not self._overwrite:
                raise ConfigError(f"{reason}; {self._advice()}")
            if reason:
                self._recorded, self._replaced = {}, present
            elif before:
                self._adopt()

    def claim(self) -> None:
        """Makes the folder, and makes it this run's own. ConfigError if another process did so meanwhile."""
        if self._own or not sharding.is_main_process():
            return
        if self._inside is not None:
            self._inside.claim()
        with one_line(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._check_state()
            for name in self._names if self._inside is None else "*":
                files.remove_temporaries(self.path, name)
            for name in self._replaced:
                remove(self / name)
            self._state, self._replaced, self._own = self._state_now(), [], True
            self._write()

    def _hold(self) -> None:
        """Holds the folder against a second process on this machine, until this object is gone."""
        if self._lock is not None or self._inside is not None:
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        self._lock = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(f"another process is writing to {self}; wait for it, or give another --out") from None
        except OSError:  # a file system without locks: what another process writes is noticed by `_check_state`
            pass

    def release(self) -> None:
        """Lets another process have the folder."""
        if self._lock is not None:
            self._lock()
            self._lock = None

    def has(self, name: str) -> bool:
        """Whether there is something of that name which is not to be overwritten."""
        return name not in self._replaced and os.path.lexists(self / name)

    def find(self, name: str, arrays: Arrays | None = None) -> pathlib.Path | None:
        """The path of a result, verified; None if it is not there. ConfigError if it is not what this run recorded, or
        does not hold these arrays.
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
                reason = f"it holds {shown(recorded.get('arrays'))}, not {shown(arrays.described())}"
        return self.refuse(path, reason) if reason else path

    def find_all(self) -> bool:
        """Whether everything that is recorded is there; ConfigError as for `find`."""
        return all([self.find(name) is not None for name in self._recorded])

    def refuse(self, path: pathlib.Path, reason: str) -> None:
        """ConfigError because a file is not what this run wrote; to overwrite, removes it."""
        if self._overwrite:
            remove(path)
        if os.path.lexists(path):
            raise ConfigError(f"{path} is not what this run wrote: {reason}; remove it, {self._advice('or ')}")

    @contextlib.contextmanager
    def writing(self, name: str, also: Sequence[str] = (), **about: Any) -> Iterator[BinaryIO]:
        """A binary file to write a result to; it is recorded, with its SHA-256 and what `about` says, before it has its
        name. also: files that are there, recorded at the same moment.
        """
        self.claim()

        def complete(temporary: pathlib.Path) -> None:
            self._record({name: {"sha256": files.sha256(temporary), **about}}, also)

        with files.replacing(self / name, complete) as file:
            yield file

    def record(self, *names: str) -> None:
        """Records files that every command writes anew."""
        if sharding.is_main_process():
            self.claim()
            self._record({}, names)

    def forget(self, *names: str) -> None:
        """Removes files, or folders of numbered files, and what is recorded of them."""
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
        """Records the results of an earlier version, which recorded none, as they are. They must be readable, arrays by
        the CRC of each. Parts of results, of which nothing can be known, are removed, to be made again.
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
                except Exception as error:  # whatever a damaged file makes zipfile and NumPy say
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
        self._state = self._state_now()

    def _state_now(self) -> Any:
        """Whoever writes the record makes another file of it."""
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(self / RECORD)
            return found.st_ino, found.st_size, found.st_mtime_ns

    def _check_state(self) -> None:
        if self._state_now() != self._state:
            raise ConfigError(f"another process has written to {self}; give another --out")


def _read(record: pathlib.Path) -> tuple[Any, dict[str, dict[str, Any]], bool]:
    """What the results are made from, the files, and whether an earlier version wrote it, which had no files in it.
    ValueError if it is no record.
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
        raise ValueError("it is no record of a run") from None
    return made_from, recorded, False


def _differences(path: str, saved: Any, current: Any, before: bool) -> Iterator[str]:
    """Where the values differ, in words. before: whether saved is of an earlier version: only what both have is
    compared.
    """
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in [*current, *saved]:
            if not before or (name in saved and name in current):
                inner = f"{path}.{name}" if path else name
                yield from _differences(inner, saved.get(name), current.get(name), before)
    elif saved != current:
        yield files.printable(f"{path} is {str(saved)[:40]} there, {str(current)[:40]} here")
