"""Parameters in the safetensors format: data, never code. The config travels in the file's own metadata."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from ddim_jax import images

_FOLDER = pathlib.Path(__file__).parent


def save(path: pathlib.Path, params: Any, config: dict[str, Any], step: int) -> None:
    """Writes nested dicts of arrays as tensors named "module/leaf", the config (JSON values) and the step as
    metadata.
    """
    flat = {name: np.asarray(leaf) for name, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}
    content = safetensors.numpy.save(
        flat, metadata={"format": "ddim_jax", "config": json.dumps(config), "step": str(step)}
    )
    with images.replacing(path) as file:
        file.write(content)


def load(path: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """(params, config) of a file that `save` wrote. ValueError if it is anything else."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}
        return flax.traverse_util.unflatten_dict(flat, sep="/"), json.loads(metadata["config"])
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is no weights file of ddim_jax: {error}") from error


def shipped_names() -> list[str]:
    """The configs whose weights ship with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.safetensors"))


def shipped(name: str) -> pathlib.Path | None:
    """The file of the weights that ship for a config's name, None if there is none."""
    return _FOLDER / f"{name}.safetensors" if name in shipped_names() else None
