"""Our own parameters in the safetensors format. The config travels in the file's own metadata."""

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
    """Writes nested dicts of arrays as tensors named "module/leaf", the config (JSON values) and the step (None:
    not known) as metadata, and checksums of all of it.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}
    metadata = {"format": "ddim_jax", "config": json.dumps(config), "step": str(step or "")}
    with files.replacing(path) as file:
        file.write(tensors.to_safetensors(flat, metadata))


def is_ours(path: pathlib.Path) -> bool:
    """Whether `save` wrote it. CheckpointError if it is a damaged .safetensors file."""
    return path.suffix == ".safetensors" and tensors.open_safetensors(path)[1].get("format") == "ddim_jax"


def open_file(path: pathlib.Path) -> CheckpointInfo:
    """What a file that `save` wrote says. CheckpointError if it is of no network, DamagedError if it has changed."""
    found, metadata = tensors.open_safetensors(path)

    def read(like: Any, ema: bool) -> Any:
        no_raw_parameters(str(path), ema)
        return tensors.read(found, like, "config.model")

    try:
        step = int(metadata["step"]) if metadata["step"] else None
        return CheckpointInfo(str(path), read, files.parse_json(metadata["config"], "its config"), step=step)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no weights file of ddim_jax: {error!r}") from error


def shipped_names() -> list[str]:
    """The configs whose weights ship with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.safetensors"))


def shipped(name: str) -> pathlib.Path | None:
    """The file of the weights that ship for a config's name, None if there is none."""
    return _FOLDER / f"{name}.safetensors" if name in shipped_names() else None
