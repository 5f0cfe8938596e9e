"""Downloads that are stored in the cache folder."""

from __future__ import annotations

import http.client
import os
import pathlib
import urllib.request

from tqdm import tqdm

from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

TIMEOUT = 20  # seconds without data until a download fails
CHUNK = 1 << 20


def cache_folder() -> pathlib.Path:
    """$DDIM_JAX_CACHE, else ddim_jax under $XDG_CACHE_HOME, else ~/.cache/ddim_jax."""
    package, user = os.environ.get("DDIM_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return pathlib.Path(package) if package else pathlib.Path(user or pathlib.Path.home() / ".cache") / "ddim_jax"


def fetch(url: str, sha256: str, what: str) -> pathlib.Path:
    """The path of the file at a URL in the cache. It is downloaded if it is not there. what: its content, for messages.

    CheckpointError, with the path where the file belongs, if the download fails, or if the file has another SHA-256.
    """
    path = cache_folder() / url.rpartition("/")[2]
    if path.is_file():
        if files.sha256(path) != sha256:
            raise CheckpointError(f"{path} is not {what} (its SHA-256 is not {sha256}): remove it")
        return path
    needed = f"{what} are needed: save {url} as {path}, or give its path"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, files.replacing(path) as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
            if files.sha256(pathlib.Path(file.name)) != sha256:
                raise CheckpointError(f"{needed} (the download does not have the SHA-256 {sha256})")
    except (OSError, http.client.HTTPException) as error:  # an error of the disk or of the network
        raise CheckpointError(f"{needed} (the download failed: {error})") from error
    return path
