"""Parameters of ddim_jax in the safetensors format. The config is stored in the metadata of the file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from ddim_jax.checkpoints import tensors
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

_FOLDER = pathlib.Path(__file__).parent


def save(path: pathlib.Path, params: Any, config: Mapping[str, Any], step: int | None) -> None:
    """Writes a .safetensors file with checksums of its content.

    params: nested dicts of arrays, written as tensors with names "module/leaf". config: JSON values, written as
    metadata. step: the number of updates, None if it is not known, written as metadata.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}
    metadata = {"format": "ddim_jax", "config": json.dumps(config), "step": str(step or "")}
    with files.replacing(path) as file:
        file.write(tensors.to_safetensors(flat, metadata))


def is_from_ddim_jax(path: pathlib.Path) -> bool:
    """Whether `save` wrote the file. DamagedError if it is a damaged .safetensors file."""
    return path.suffix == ".safetensors" and tensors.open_safetensors(path)[1].get("format") == "ddim_jax"


def open_file(path: pathlib.Path) -> CheckpointInfo:
    """Reads the description of a network from a file that `save` wrote, without the tensors. CheckpointError if the
    file has no such description, DamagedError if it does not match its checksums.
    """
    state, metadata = tensors.open_safetensors(path)

    def read(like: Any, ema: bool) -> Any:
        no_raw_parameters(str(path), ema)
        return tensors.read(state, like, "config.model")

    try:
        step = int(metadata["step"]) if metadata["step"] else None
        return CheckpointInfo(str(path), read, files.parse_json(metadata["config"], "its config"), step=step)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a weights file of ddim_jax: {error!r}") from error


def shipped_names() -> list[str]:
    """The names of the configs whose weights ship with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.safetensors"))


def shipped(name: str) -> pathlib.Path | None:
    """The file of the weights that ship for the config with this name, None if there are none."""
    return _FOLDER / f"{name}.safetensors" if name in shipped_names() else None
