"""Names, shapes and checksums of the arrays of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ddim_jax.utils.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def check_shapes(there: Shapes, expected: Shapes, where: str, said: str = "config.model") -> None:
    """CheckpointError, naming the first array that differs, unless both have the same names with the same shapes.
    said: what the expected ones follow from.
    """
    other = f"{where} is of another network"
    missing, surplus = [n for n in expected if n not in there], [n for n in there if n not in expected]
    more = lambda names: f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    for name in missing[:1]:
        raise CheckpointError(
            f"{other}: it has no {name}{more(missing)}, which {said} expects with shape {expected[name]}"
        )
    for name in expected:
        if there[name] != expected[name]:
            raise CheckpointError(f"{other}: {name} has shape {there[name]}, {said} expects {expected[name]}")
    for name in surplus[:1]:
        raise CheckpointError(f"{other}: it has {name}{more(surplus)} with shape {there[name]}, which {said} does not")


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of nested dicts of arrays, by names "module/leaf"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()
