"""The weight files of a diffusers folder: .safetensors or .bin, one file or shards, in full or half precision."""

from __future__ import annotations

import pathlib
import re

from ddim_jax.checkpoints import parameter_names, tensors, torch_file
from ddim_jax.checkpoints.hub import Folder, Repository, load_json
from ddim_jax.checkpoints.tensors import Tensors
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model"

VARIANTS = ("", ".fp16", ".bf16")  # of file names; full precision is preferred
MOST_SHARDS = 1000

_SHARD = re.compile(rf"{WEIGHTS}[\w.-]*\.(safetensors|bin)", re.ASCII)


def candidates(folder: str) -> list[str]:
    """The names that diffusers gives to a file of weights or to the index of its shards, the preferred one first.

    folder: "unet/", or "" for the root.
    """
    return [
        f"{folder}{name}"
        for variant in VARIANTS
        for kind in ("safetensors", "bin")
        for name in (f"{WEIGHTS}{variant}.{kind}", f"{WEIGHTS}.{kind}.index{variant}.json")
    ]


def open_weights(source: Folder | Repository, folder: str) -> Tensors:
    """The tensors of a network. No tensor is read yet.

    folder: "unet/", or "" for the root. CheckpointError if there are none, or if the shards are not those of their
    index.
    """
    path = source.find(*candidates(folder))
    if path is None:
        expected = f"{folder}{WEIGHTS}.safetensors or {folder}{WEIGHTS}.bin"
        raise CheckpointError(f"{source.source} has no {expected}, nor an index of shards{source.why_missing()}")
    found = _shards(source, folder, path) if path.suffix == ".json" else _open_file(path)
    is_old = any(".attentions." in name and name.endswith(".query.weight") for name in found.shapes)
    return found._replace(layout=parameter_names.DIFFUSERS_OLD if is_old else parameter_names.DIFFUSERS)


def _open_file(path: pathlib.Path) -> Tensors:
    if path.suffix == ".bin":
        return tensors.from_torch(str(path), torch_file.load(path))
    return tensors.open_safetensors(path)[0]


def _shards(source: Folder | Repository, folder: str, path: pathlib.Path) -> Tensors:
    """The tensors of all shards. path: of the index, a JSON object with weight_map: tensor -> name of its shard."""
    shard_of = load_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{path}: weight_map must be a dict of names, got {files.shown(shard_of)}")
    for name in shard_of.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(f"{path}: weight_map must name files {WEIGHTS}*, got {files.shown(name)}")
    names = sorted(set(shard_of.values()))
    if len(names) > MOST_SHARDS:
        raise CheckpointError(f"{path}: weight_map must name at most {MOST_SHARDS} files, got {len(names)}")
    opened = {}
    for name in names:
        shard = source.find(f"{folder}{name}")
        if shard is None:
            raise CheckpointError(
                f"{source.source} has no {folder}{name}, which {path.name} names{source.why_missing()}"
            )
        opened[name] = _open_file(shard)
    inside = {tensor: name for name, shard in opened.items() for tensor in shard.shapes}
    for tensor in {**inside, **shard_of}:
        if inside.get(tensor) != shard_of.get(tensor):
            raise CheckpointError(
                f"{path}: weight_map places {files.shown(tensor)} in {shard_of.get(tensor)}, it is in "
                f"{inside.get(tensor)}"
            )
    shapes = {tensor: shape for shard in opened.values() for tensor, shape in shard.shapes.items()}
    return Tensors(str(path), shapes, lambda tensor: opened[inside[tensor]].read(tensor))
