"""Files that are fetched once and kept in the cache folder."""

from __future__ import annotations

import http.client
import os
import pathlib
import urllib.request

from tqdm import tqdm

from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

TIMEOUT = 20  # seconds without a byte
CHUNK = 1 << 20


def cache_folder() -> pathlib.Path:
    """$DDIM_JAX_CACHE, else ddim_jax under $XDG_CACHE_HOME, else ~/.cache/ddim_jax."""
    own, shared = os.environ.get("DDIM_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return pathlib.Path(own) if own else pathlib.Path(shared or pathlib.Path.home() / ".cache") / "ddim_jax"


def fetch(url: str, sha256: str, what: str) -> pathlib.Path:
    """The file at a URL, from the cache or fetched into it. what: for people.

    CheckpointError, which says where the file belongs, if it cannot be fetched, or if it is not the one with this
    SHA-256, be it fetched or found.
    """
    path = cache_folder() / url.rpartition("/")[2]
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
