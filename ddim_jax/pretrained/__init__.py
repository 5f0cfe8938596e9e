"""Trained networks of others, and our own as one file: opened without running what is in them."""

from __future__ import annotations

import pathlib

from ddim_jax.errors import CheckpointError
from ddim_jax.pretrained import card, diffusers_folder, official, safetensors_file
from ddim_jax.pretrained.card import model_card
from ddim_jax.pretrained.diffusers_folder import save as save_diffusers
from ddim_jax.pretrained.files import Folder, hub_repository
from ddim_jax.pretrained.published import SAMPLED, Published, describe_own
from ddim_jax.pretrained.safetensors_file import is_ours, save, shipped, shipped_names

__all__ = [
    "SAMPLED",
    "Published",
    "describe_own",
    "is_ours",
    "model_card",
    "not_written",
    "open_checkpoint",
    "save",
    "save_diffusers",
    "shipped",
    "shipped_names",
]

SUPPORTED = (
    "a diffusers folder (with model_index.json), a repository of it on the hub (owner/name), a folder with the "
    "official code's ckpt.pth, a .pth, .ckpt or .safetensors file, a workdir"
)


def not_written(folder: pathlib.Path) -> str | None:
    """What is in a folder that `save_diffusers`, with a `model_card`, did not write; None if it wrote all of it."""
    other = next(diffusers_folder.not_written(folder), None)
    return other or (None if card.is_ours(folder / diffusers_folder.CARD) else f"no {diffusers_folder.CARD} of its own")


def open_checkpoint(where: str) -> Published:
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
