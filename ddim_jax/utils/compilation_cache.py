"""JAX's cache of compiled programs, in the cache folder of this package (see `download.cache_folder`), checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import types
from typing import Any

import jax

from ddim_jax.utils.download import cache_folder

PROGRAMS_BYTES = 1 << 30  # of compiled programs; those not used for the longest time go first
LEAST_SECONDS = 0.1  # what compiles faster is not kept


def enable_compilation_cache() -> None:
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
    programs = cache_folder() / "programs" / processor()
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
