"""Where arrays live. The only file that knows that there are devices; one device is the special case of a
mesh of one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices of all processes along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(mesh: Mesh, local: Any) -> Any:
    """Global arrays (B, ...), split along the batch, from the part (B / processes, ...) that this process has."""
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(along_batch(mesh), leaf), local)


def split_batch(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """A global array (B, ...), split along the batch, from one that every process has whole."""
    return jax.make_array_from_callback(batch.shape, along_batch(mesh), lambda part: batch[part])


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """The same tree of host arrays on every device."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            np.shape(leaf), replicated(mesh), lambda part: np.asarray(leaf)[part]
        ),
        tree,
    )


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def steps_in_flight() -> int:
    """How many updates may be dispatched before the oldest is waited for. Virtual CPU devices deadlock if they
    run far ahead.
    """
    return 2 if jax.default_backend() == "cpu" else 8
