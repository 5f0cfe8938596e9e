"""Where arrays live. The only file that knows that there are devices; one device is the special case of a
mesh of one.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddim_jax.utils import files


def start_processes() -> None:
    """Makes this process one of several, by what the environment says: that of a TPU pod slice, of Slurm, of MPI, or
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Before anything else of JAX. ValueError if it says
    nothing.
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
    except ValueError as error:
        raise ValueError(
            f"the environment does not say which process of how many this is ({error}): start it by Slurm or MPI, on a "
            f"TPU pod slice, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


MAX_CPU_DEVICES = 4  # each has its own copy of the parameters
SMALL_WIDTH = 128  # channels: wider, one operation has work for all cores, and copies of the parameters cost more


def split_cpu_into_devices(batch: int, width: int) -> None:
    """Lets a CPU be several devices, one for each core, as many as divide a batch, for a network of at most SMALL_WIDTH
    channels: in its operations there is too little work for all cores. Unless the environment says how many, by
    JAX_NUM_CPU_DEVICES or XLA_FLAGS. Before anything else of JAX.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if width <= SMALL_WIDTH and not said and jax.config.jax_num_cpu_devices < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = 1
        while 2 * count <= min(cores, MAX_CPU_DEVICES) and batch % (2 * count) == 0:
            count *= 2
        jax.config.update("jax_num_cpu_devices", count)


def is_main_process() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast_from_main(number: int) -> int:
    """What the first process says; all have to ask."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


def should_stop(step: int, asked: bool) -> bool:
    """Whether to stop after this step: for one process, whether it was asked to; of several, whether any was, at a step
    that they agree on.
    """
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else asked


def data_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """All devices of all processes along two axes: "data", and "fsdp", along which parameters are divided too.

    data: -1 for what fsdp leaves. ValueError if the two do not make up the devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp or data not in (-1, devices // fsdp):
        raise ValueError(f"data x fsdp must be the number of devices, {devices}, got {data} x {fsdp}")
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def along_batch(mesh: Mesh) -> NamedSharding:
    """Over all axes of the mesh: whoever has a part of the parameters has a part of the batch too."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def fully_sharded(mesh: Mesh, shapes: Any) -> Any:
    """The sharding of every leaf: its longest axis that the mesh's "fsdp" divides, the last of them, is divided along
    it; what has none is replicated, and so is everything where "fsdp" is 1.
    """
    parts = dict(mesh.shape).get("fsdp", 1)

    def place(leaf):
        axes = [axis for axis, length in enumerate(leaf.shape) if parts > 1 and length % parts == 0]
        if not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))

    return jax.tree.map(place, shapes)


def bytes_on_a_device(placement: Any, shapes: Any) -> int:
    """The most that a device holds of a tree: of arrays or their shapes, with a sharding for each."""
    size = lambda place, leaf: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, placement, shapes)))


def device_memory() -> int | None:
    """Bytes of memory of one device, None where it is not known. Virtual CPU devices have equal parts of the machine's,
    or of what its control group allows.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return files.machine_memory() // jax.local_device_count()


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


def batches_ahead() -> int:
    """How many batches of images are dispatched beside the one that is waited for, so that writing it costs a device no
    time. A CPU would only share its cores between them.
    """
    return 0 if jax.default_backend() == "cpu" else 1
