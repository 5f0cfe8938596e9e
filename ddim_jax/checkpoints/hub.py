"""The files of a checkpoint in a folder, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
import pathlib
import re
from typing import Any

from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError, DamagedError

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


class Folder:
    """The files of a folder."""

    def __init__(self, path: pathlib.Path):
        self.name, self.source, self._path = files.name_from(path.resolve().name), str(path), path

    def find(self, *names: str) -> pathlib.Path | None:
        """The path of the first name that exists, None if none does. DamagedError if a file of the hub's cache does not
        match its digest.
        """
        path = next((self._path / name for name in names if (self._path / name).is_file()), None)
        return path and _checked(path)

    def why_missing(self) -> str:
        """The end of a message about a missing file, "" if nothing explains it."""
        return ""


class Repository:
    """The files of a hub repository. `find` downloads them into the cache of huggingface_hub."""

    def __init__(self, repository: str, revision: str | None):
        self.name = files.name_from(repository.split("/")[1])
        self.source = f"{repository}@{revision}" if revision else repository
        self._repository, self._revision, self._offline = repository, revision, ""

    def find(self, *names: str) -> pathlib.Path | None:
        """The path of the first name that exists, downloaded; None if none does. CheckpointError if the repository
        cannot be read. DamagedError if the file does not match its digest.
        """
        # Imported here, because the import is slow and reads HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT.
        from huggingface_hub import constants, errors, hf_hub_download

        logging.getLogger("huggingface_hub").propagate = False  # this logger has a handler already
        for name in names:
            try:
                path = hf_hub_download(
                    self._repository, name, revision=self._revision, local_files_only=bool(self._offline)
                )
                return _checked(pathlib.Path(path))
            except errors.LocalEntryNotFoundError:
                self._offline = (
                    "HF_HUB_OFFLINE is set and the file is not in the cache"
                    if constants.HF_HUB_OFFLINE
                    else "the hub cannot be reached and the file is not in the cache"
                )
            except errors.EntryNotFoundError:
                pass
            except errors.GatedRepoError as error:
                raise CheckpointError(f"{self.source} is gated: log in with `hf auth login`") from error
            except errors.RevisionNotFoundError as error:
                raise CheckpointError(f"{self._repository} on the hub has no revision {self._revision!r}") from error
            except errors.RepositoryNotFoundError as error:
                raise CheckpointError(
                    f"{self._repository} is neither a local file or folder nor a hub repository that you have access to"
                ) from error
            except (errors.HFValidationError, OSError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise CheckpointError(f"{self.source} cannot be downloaded from the hub: {reason}") from error
        return None

    def why_missing(self) -> str:
        """The end of a message about a missing file, "" if nothing explains it."""
        return f" ({self._offline})" if self._offline else ""


def hub_repository(where: str) -> Repository | None:
    """The repository for an id "owner/name" or "owner/name@revision", None if `where` is not of this form."""
    match = _HUB_ID.fullmatch(where)
    return Repository(match["repository"], match["revision"]) if match else None


def _checked(path: pathlib.Path) -> pathlib.Path:
    """The path itself. DamagedError if it is a file of the cache of huggingface_hub that does not match the digest in
    its name: the SHA-256 of a large file, the digest of Git (SHA-1) of a small one.
    """
    blob = path.resolve()
    git_digest = lambda: hashlib.sha1(b"blob %d\0" % blob.stat().st_size + blob.read_bytes()).hexdigest()
    digest = {64: lambda: files.sha256(blob), 40: git_digest}.get(len(blob.name))
    if blob.parent.name == "blobs" and digest and re.fullmatch("[0-9a-f]+", blob.name):
        if digest() != blob.name:
            raise DamagedError(f"{path} is damaged: it does not match its digest; remove {blob} to download a new copy")
    return path


def load_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. CheckpointError if there is none."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
