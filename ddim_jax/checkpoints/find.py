"""Opens a checkpoint of any supported format, from a path or from the Hugging Face hub."""

from __future__ import annotations

import pathlib

from ddim_jax.checkpoints import diffusers_folder, edm, official, safetensors_file
from ddim_jax.checkpoints.hub import Folder, hub_repository
from ddim_jax.checkpoints.info import CheckpointInfo
from ddim_jax.utils.errors import CheckpointError

SUPPORTED = (
    "a diffusers folder (with model_index.json), a hub repository of one (owner/name), a folder with the ckpt.pth of "
    "the official code, a .pt, .pth, .ckpt or .safetensors file, a .pkl file of EDM, a workdir"
)


def open_checkpoint(where: str) -> CheckpointInfo:
    """Reads the description of a checkpoint, without the tensors.

    where: a path, or an id of the Hugging Face hub ("owner/name", "owner/name@revision"). CheckpointError if there is
    no checkpoint of a supported format.
    """
    path = pathlib.Path(where)
    if path.is_dir():
        folder = Folder(path)
        if diffusers_folder.is_pipeline(folder):
            return diffusers_folder.open_folder(folder)
        if folder.find(official.CHECKPOINT):
            return official.open_file(path / official.CHECKPOINT)
        raise CheckpointError(f"{where} is a folder without a checkpoint; supported: {SUPPORTED}")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{where} is neither a regular file nor a folder; supported: {SUPPORTED}")
    if path.is_file() and path.suffix == edm.SUFFIX:
        return edm.open_file(path)
    if path.is_file():
        return safetensors_file.open_file(path) if safetensors_file.is_from_ddim_jax(path) else official.open_file(path)
    repository = hub_repository(where)
    if repository is None:
        raise CheckpointError(f"no file or folder {where} exists; supported: {SUPPORTED}")
    if not diffusers_folder.is_pipeline(repository):
        raise CheckpointError(f"{where} has no model_index.json{repository.why_missing()}; supported: {SUPPORTED}")
    return diffusers_folder.open_folder(repository)
