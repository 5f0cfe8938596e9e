"""Names, shapes and checksums of the arrays of a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ddim_jax.utils import sharding
from ddim_jax.utils.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def check_shapes(saved: Shapes, expected: Shapes, where: str, expected_by: str = "config.model") -> None:
    """CheckpointError, naming the first array that differs, unless both have the same names with the same shapes.

    saved: the arrays of the file `where`. expected_by: what defines the expected arrays, for messages.
    """
    other = f"{where} is of another network"
    missing, unexpected = [n for n in expected if n not in saved], [n for n in saved if n not in expected]
    more = lambda names: f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    for name in missing[:1]:
        raise CheckpointError(
            f"{other}: it has no {name}{more(missing)}, which {expected_by} expects with shape {expected[name]}"
        )
    for name in expected:
        if saved[name] != expected[name]:
            raise CheckpointError(f"{other}: {name} has shape {saved[name]}, {expected_by} expects {expected[name]}")
    for name in unexpected[:1]:
        raise CheckpointError(
            f"{other}: it has {name}{more(unexpected)} with shape {saved[name]}, which {expected_by} does not have"
        )


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of nested dicts of arrays, with names "module/leaf"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def checksum(array: np.ndarray) -> str:
    """The SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def checksums(items: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of every array, with names "item/module/leaf"."""
    return {name: checksum(array) for name, array in arrays_on_host(items)}


def arrays_on_host(items: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(name "item/module/leaf", complete array on the host) of every array, whatever its sharding."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(items))[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), sharding.to_host(leaf)
