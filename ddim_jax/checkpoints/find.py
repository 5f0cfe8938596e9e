"""A checkpoint at a path, or under an id of the Hugging Face hub, whatever its format."""

from __future__ import annotations

import pathlib

from ddim_jax.checkpoints import diffusers_folder, official, safetensors_file
from ddim_jax.checkpoints.hub import Folder, hub_repository
from ddim_jax.checkpoints.info import CheckpointInfo
from ddim_jax.utils.errors import CheckpointError

SUPPORTED = (
    "a diffusers folder (with model_index.json), a repository of it on the hub (owner/name), a folder with the "
    "official code's ckpt.pth, a .pth, .ckpt or .safetensors file, a workdir"
)


def open_checkpoint(where: str) -> CheckpointInfo:
    """What the checkpoint at a path, or under an id of the Hugging Face hub ("owner/name", "owner/name@revision"),
    says of itself. CheckpointError if there is none of a format that is supported.
    """
    path = pathlib.Path(where)
    if path.is_dir():
        folder = Folder(path)
        if diffusers_folder.is_there(folder):
            return diffusers_folder.open_folder(folder)
        if folder.find(official.CHECKPOINT):
            return official.open_file(path / official.CHECKPOINT)
        raise CheckpointError(f"{where} is a folder without a checkpoint; supported: {SUPPORTED}")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{where} is neither a regular file nor a folder; supported: {SUPPORTED}")
    if path.is_file():
        return safetensors_file.open_file(path) if safetensors_file.is_ours(path) else official.open_file(path)
    repository = hub_repository(where)
    if repository is None:
        raise CheckpointError(f"there is no file or folder {where}; supported: {SUPPORTED}")
    if not diffusers_folder.is_there(repository):
        raise CheckpointError(f"{where} has no model_index.json{repository.why_missing()}; supported: {SUPPORTED}")
    return diffusers_folder.open_folder(repository)
