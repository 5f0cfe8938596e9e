"""What is fetched or compiled once and kept: in $DDIM_JAX_CACHE, else in ddim_jax under $XDG_CACHE_HOME, else under
~/.cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import pathlib
import platform
import types
import urllib.request
from typing import Any

import jax
from tqdm import tqdm

from ddim_jax import files
from ddim_jax.errors import CheckpointError

TIMEOUT = 20  # seconds without a byte
CHUNK = 1 << 20
PROGRAMS_BYTES = 1 << 30  # of compiled programs; those not used for the longest time go first
LEAST_SECONDS = 0.1  # what compiles faster is not kept


def folder() -> pathlib.Path:
    own, shared = os.environ.get("DDIM_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return pathlib.Path(own) if own else pathlib.Path(shared or pathlib.Path.home() / ".cache") / "ddim_jax"


def fetch(url: str, sha256: str, what: str) -> pathlib.Path:
    """The file at a URL, from the cache or fetched into it. what: for people.

    CheckpointError, which says where the file belongs, if it cannot be fetched, or if it is not the one with this
    SHA-256, be it fetched or found.
    """
    path = folder() / url.rpartition("/")[2]
    if path.is_file():
        if files.sha256(path) != sha256:
            raise CheckpointError(f"{path} is not {what} (its SHA-256 is not {sha256}): remove it")
        return path
    wanted = f"{what} are wanted: put {url} at {path}, or give its path"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, files.replacing(path) as file:
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
            if files.sha256(pathlib.Path(file.name)) != sha256:
                raise CheckpointError(f"{wanted} (what came from there has not the SHA-256 {sha256})")
    except (OSError, http.client.HTTPException) as error:  # of the disk or of the network
        raise CheckpointError(f"{wanted} (it cannot be fetched: {error})") from error
    return path


def keep_programs() -> None:
    """JAX keeps the programs that it compiles, for the next process, unless the environment tells it where or whether
    to (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE), or the folder cannot be written to. Before anything is
    compiled. They are machine code: for one kind of processor, from a folder that nobody else can write to, and each
    with its SHA-256.
    """
    own = jax.config.jax_compilation_cache_dir is None and _set_folder()
    with contextlib.suppress(ImportError, AttributeError):  # a JAX that does it in another way
        from jax._src import compilation_cache

        _repair(compilation_cache, own)


def _set_folder() -> bool:
    """Whether programs are now kept in the folder of this package."""
    if not jax.config.jax_enable_compilation_cache:
        return False
    programs = folder() / "programs" / processor()
    try:
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = programs.stat()
    except OSError:
        return False
    if not os.access(programs, os.W_OK) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return False
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return True


def _repair(jax_cache: types.ModuleType, checked: bool) -> None:
    """JAX never replaces a program that it cannot read, and compiles it at every start. Now it is removed."""
    open_cache, read, opened = jax_cache.get_file_cache, jax_cache.get_executable_and_time, []

    def get_file_cache(path):
        found = open_cache(path)
        if found is None:
            return None
        opened.append(Programs(found[0], checked))
        return opened[-1], *found[1:]

    def get_executable_and_time(key, *rest):
        try:
            return read(key, *rest)
        except Exception:
            for programs in opened:
                programs.remove(key)
            return None, None

    jax_cache.get_file_cache, jax_cache.get_executable_and_time = get_file_cache, get_executable_and_time


class Programs:
    """JAX's cache of compiled programs, whose folder may be damaged or full: what cannot be had is compiled again."""

    def __init__(self, cache: Any, checked: bool):
        """cache: JAX's, a file KEY-cache for each program and a file KEY-atime with the time of its last use in the
        folder `path`. checked: whether a SHA-256 stands before each program.
        """
        self._cache, self._checked, self._path = cache, checked, cache.path

    def get(self, key: str) -> bytes | None:
        with contextlib.suppress(OSError):
            value = self._cache.get(key)
            if value is None or not self._checked:
                return value
            if hashlib.sha256(value[32:]).digest() == value[:32]:
                return value[32:]
            self.remove(key)
        return None

    def put(self, key: str, value: bytes) -> None:
        try:
            # Where it has a limit JAX stumbles over a program without the other file.
            for program in self._path.glob("*-cache") if self._cache.eviction_enabled else ():
                if not (self._path / f"{program.name.removesuffix('-cache')}-atime").exists():
                    program.unlink()
            self._cache.put(key, hashlib.sha256(value).digest() + value if self._checked else value)
        except OSError:
            self.remove(key)

    def remove(self, key: str) -> None:
        for file in (f"{key}-cache", f"{key}-atime"):
            with contextlib.suppress(OSError):
                (self._path / file).unlink()


def processor() -> str:
    """A name for what its programs need: on a folder that several machines share, another processor has its own."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    can = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), *can]).encode()).hexdigest()[:16]
