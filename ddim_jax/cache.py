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
import urllib.request
from collections.abc import Callable
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
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    programs = folder() / "programs" / processor()
    try:
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = programs.stat()
    except OSError:
        return
    if os.access(programs, os.W_OK) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        jax.config.update("jax_compilation_cache_dir", str(programs))
        jax.config.update("jax_compilation_cache_max_size", PROGRAMS_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        with contextlib.suppress(ImportError, AttributeError):  # a JAX that does it in another way
            from jax._src import compilation_cache

            compilation_cache.get_file_cache = _verified(compilation_cache.get_file_cache)


def _verified(get_file_cache: Callable[[str], tuple[Any, str] | None]) -> Callable[[str], tuple[Any, str] | None]:
    """JAX's function that opens its cache, with `VerifiedPrograms` around the result."""

    def verified(path):
        found = get_file_cache(path)
        return found and (VerifiedPrograms(found[0], pathlib.Path(path)), found[1])

    return verified


class VerifiedPrograms:
    """JAX's cache of compiled programs, with a SHA-256 before each. What is damaged is removed, so that it is compiled
    once more and not at every start: JAX itself never replaces a program.
    """

    def __init__(self, cache: Any, folder: pathlib.Path):
        """cache: its `get(key)` returns bytes or None, and `put(key, value)` keeps them in KEY-cache and KEY-atime."""
        self._cache, self._path = cache, folder

    def get(self, key: str) -> bytes | None:
        value = self._cache.get(key)
        if value is None or hashlib.sha256(value[32:]).digest() == value[:32]:
            return value and value[32:]
        (self._path / f"{key}-cache").unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        for program in self._path.glob("*-cache"):  # one alone is what JAX stumbles over
            if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
                program.unlink(missing_ok=True)
        self._cache.put(key, hashlib.sha256(value).digest() + value)


def processor() -> str:
    """A name for what its programs need: on a folder that several machines share, another processor has its own."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    can = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join([platform.machine(), *can]).encode()).hexdigest()[:16]
