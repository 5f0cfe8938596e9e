"""The files of a checkpoint, in a folder or in a repository of the Hugging Face hub."""

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
    """Files of a folder."""

    def __init__(self, path: pathlib.Path):
        self.name, self.source, self._path = files.name_from(path.resolve().name), str(path), path

    def find(self, *names: str) -> pathlib.Path | None:
        """The first of these that is there, None if none is. DamagedError if it is not what the hub gave."""
        found = next((self._path / name for name in names if (self._path / name).is_file()), None)
        return found and _checked(found)

    def why_missing(self) -> str:
        return ""


class Repository:
    """Files of a repository of the hub: fetched when they are asked for, kept in huggingface_hub's own cache."""

    def __init__(self, repository: str, revision: str | None):
        self.name = files.name_from(repository.split("/")[1])
        self.source = f"{repository}@{revision}" if revision else repository
        self._repository, self._revision, self._offline = repository, revision, ""

    def find(self, *names: str) -> pathlib.Path | None:
        """The first of these that is there, fetched; None if none is. CheckpointError if the repository cannot be
        asked; DamagedError if the file is not what the hub gave.
        """
        # In here: it is slow to import, and reads HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT then.
        from huggingface_hub import constants, errors, hf_hub_download

        logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
        for name in names:
            try:
                found = hf_hub_download(
                    self._repository, name, revision=self._revision, local_files_only=bool(self._offline)
                )
                return _checked(pathlib.Path(found))
            except errors.LocalEntryNotFoundError:
                self._offline = (
                    "HF_HUB_OFFLINE is set and the file is not in its cache"
                    if constants.HF_HUB_OFFLINE
                    else "the hub cannot be reached and the file is not in its cache"
                )
            except errors.EntryNotFoundError:
                pass
            except errors.GatedRepoError as error:
                raise CheckpointError(f"{self.source} is gated: log in with `hf auth login`") from error
            except errors.RevisionNotFoundError as error:
                raise CheckpointError(f"{self._repository} on the hub has no revision {self._revision!r}") from error
            except errors.RepositoryNotFoundError as error:
                raise CheckpointError(
                    f"{self._repository} is neither a file or folder here nor a repository on the hub that you may read"
                ) from error
            except (errors.HFValidationError, OSError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise CheckpointError(f"{self.source} cannot be fetched from the hub: {reason}") from error
        return None

    def why_missing(self) -> str:
        return f" ({self._offline})" if self._offline else ""


def hub_repository(where: str) -> Repository | None:
    """The repository that "owner/name" or "owner/name@revision" means, None if it is no such id."""
    match = _HUB_ID.fullmatch(where)
    return Repository(match["repository"], match["revision"]) if match else None


def _checked(path: pathlib.Path) -> pathlib.Path:
    """The path. DamagedError if it is a file of huggingface_hub's cache that has not the digest that it is kept by: the
    SHA-256 of a large file, Git's of a small one.
    """
    blob = path.resolve()
    of_git = lambda: hashlib.sha1(b"blob %d\0" % blob.stat().st_size + blob.read_bytes()).hexdigest()
    digest_of = {64: lambda: files.sha256(blob), 40: of_git}.get(len(blob.name))
    if blob.parent.name == "blobs" and digest_of and re.fullmatch("[0-9a-f]+", blob.name):
        if digest_of() != blob.name:
            raise DamagedError(f"{path} is damaged: it is not what the hub gave; remove {blob} to fetch it again")
    return path


def load_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object, or CheckpointError."""
    try:
        content = files.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
