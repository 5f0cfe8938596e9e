"""JAX's persistent compilation cache with checksums, in the cache folder of ddim_jax (see `download.cache_folder`)."""

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

PROGRAMS_BYTES = 1 << 30  # the size limit of the cache; the least recently used programs are removed first
LEAST_SECONDS = 0.1  # programs with a shorter compile time are not cached


def enable_compilation_cache() -> None:
    """Enables the persistent compilation cache of JAX. Call it before anything is compiled.

    It does not change the settings if JAX_COMPILATION_CACHE_DIR or JAX_ENABLE_COMPILATION_CACHE sets them, or if the
    cache folder is not writable. Programs are machine code. Therefore there is one folder for each type of processor,
    no other user can write to it, and each program is stored with its SHA-256.
    """
    has_checksums = jax.config.jax_compilation_cache_dir is None and _set_folder()
    with contextlib.suppress(ImportError, AttributeError):  # this version of JAX has other internals
        from jax._src import compilation_cache

        _repair(compilation_cache, has_checksums)


def _set_folder() -> bool:
    """Sets the cache folder of ddim_jax as the one of JAX, if possible, and returns whether it did."""
    if not jax.config.jax_enable_compilation_cache:
        return False
    programs = cache_folder() / "programs" / processor()
    try:
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = programs.stat()
    except OSError:
        return False
    if not os.access(programs, os.W_OK) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return False
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return True


def _repair(jax_cache: types.ModuleType, checked: bool) -> None:
    """Makes JAX remove programs that it cannot read. Otherwise it keeps them, and compiles them at every start."""
    open_cache, read, opened = jax_cache.get_file_cache, jax_cache.get_executable_and_time, []

    def get_file_cache(path):
        cache = open_cache(path)
        if cache is None:
            return None
        opened.append(Programs(cache[0], checked))
        return opened[-1], *cache[1:]

    def get_executable_and_time(key, *rest):
        try:
            return read(key, *rest)
        except Exception:
            for programs in opened:
                programs.remove(key)
            return None, None

    jax_cache.get_file_cache, jax_cache.get_executable_and_time = get_file_cache, get_executable_and_time


class Programs:
    """JAX's cache for a folder that may be damaged or full: JAX recompiles a program that cannot be read."""

    def __init__(self, cache: Any, checked: bool):
        """cache: the cache of JAX. Its folder `path` has two files for each program: KEY-cache, and KEY-atime with the
        time of the last use. checked: whether each program has its SHA-256 as a prefix.
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
            # If the cache has a size limit, JAX fails for a program without its -atime file.
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
    """A digest of the processor type: machines with different processors can share a cache folder."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()[:16]
