"""Devices, processes, and the sharding of arrays. No other file depends on the number of devices: a single device is a
mesh of size 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddim_jax.utils import files


def start_processes() -> None:
    """Initializes `jax.distributed` from the environment of a TPU pod slice, of Slurm or of MPI, or from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call it before any other function of JAX. ValueError
    if the environment has none of these.
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
    except ValueError as error:
        raise ValueError(
            f"the environment does not define the number and the index of this process ({error}): start it by Slurm or "
            f"MPI, on a TPU pod slice, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


MAX_CPU_DEVICES = 4  # each has a copy of the parameters
SMALL_WIDTH = 128  # channels; in wider networks each operation uses all cores, and copies of the parameters cost more


def split_cpu_into_devices(batch: int, width: int) -> None:
    """Splits the CPU into virtual devices: the largest power of two that divides `batch`, at most one per core and
    MAX_CPU_DEVICES. Call it before any other function of JAX.

    It applies to networks of at most SMALL_WIDTH channels (`width`), whose operations are too small to use all cores.
    It does nothing if JAX_NUM_CPU_DEVICES or XLA_FLAGS sets the number of devices.
    """
    is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if width <= SMALL_WIDTH and not is_set and jax.config.jax_num_cpu_devices < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = 1
        while 2 * count <= min(cores, MAX_CPU_DEVICES) and batch % (2 * count) == 0:
            count *= 2
        jax.config.update("jax_num_cpu_devices", count)


def is_main_process() -> bool:
    """Whether this process is the main process, the only one that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached this point. name: the same in all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(number: int) -> int:
    """The number of the main process. All processes must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


def should_stop(step: int, requested: bool) -> bool:
    """Whether to stop after this step. For a single process, this is `requested`. In a distributed run, it is whether
    any process was requested to stop; all processes then stop after the same step.
    """
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else requested


def data_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices of all processes, with the axes "data" and "fsdp". The batch is sharded along both, the
    parameters along "fsdp".

    data: the size of its axis, -1 for the number of devices divided by fsdp. devices: None for those of JAX.
    ValueError unless data x fsdp is the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp or data not in (-1, count // fsdp):
        raise ValueError(f"data x fsdp must be the number of devices, {count}, got {data} x {fsdp}")
    # jax.make_mesh refuses axes that divide a physical axis of the chips: 2 x 8 on a TPU slice of 4x4.
    arranged = mesh_utils.create_device_mesh((count // fsdp, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(arranged, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding with a copy of the array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of the batch axis, along all axes of the mesh: each device has a shard of the batch."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def fully_sharded(mesh: Mesh, shapes: Any) -> Any:
    """The shardings of a tree of parameters (FSDP).

    Each leaf is sharded over "fsdp" along its longest axis whose length the size of "fsdp" divides; of equally long
    axes, the last one. A leaf without such an axis is replicated, and so are all leaves if "fsdp" has size 1.
    """
    size = dict(mesh.shape).get("fsdp", 1)

    def sharding_of(leaf):
        axes = [axis for axis, length in enumerate(leaf.shape) if size > 1 and length % size == 0]
        if not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))

    return jax.tree.map(sharding_of, shapes)


def bytes_on_a_device(shardings: Any, shapes: Any) -> int:
    """The bytes of a tree on one device. shardings: a tree of shardings. shapes: the tree of arrays or their shapes."""
    size = lambda sharding, leaf: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, shardings, shapes)))


def device_memory() -> int | None:
    """The memory of one device in bytes, None if it is not known. For virtual CPU devices, an equal fraction of the
    memory of the machine, or of the limit of its control group.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return files.machine_memory() // jax.local_device_count()


def put_batch(mesh: Mesh, local: Any) -> Any:
    """Global arrays (B, ...), sharded along the batch, from the shards (B / processes, ...) of the processes. local:
    the shard of this process.
    """
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(along_batch(mesh), leaf), local)


def split_batch(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """A global array (B, ...), sharded along the batch, from the complete array that every process has."""
    return jax.make_array_from_callback(batch.shape, along_batch(mesh), lambda index: batch[index])


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Copies a tree of host arrays to every device."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(
            np.shape(leaf), replicated(mesh), lambda index: np.asarray(leaf)[index]
        ),
        tree,
    )


def to_host(array: jax.Array) -> np.ndarray:
    """The complete global array, on the host of every process."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def steps_in_flight() -> int:
    """The number of updates that may be dispatched before the host waits for the oldest. Virtual CPU devices deadlock
    if too many are dispatched.
    """
    return 2 if jax.default_backend() == "cpu" else 8


def batches_ahead() -> int:
    """The number of batches of images that are dispatched in addition to the one that the host waits for. The device
    then computes while the host writes images. On a CPU this has no advantage: all batches use the same cores.
    """
    return 0 if jax.default_backend() == "cpu" else 1
