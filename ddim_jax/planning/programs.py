"""The programs that training and sampling run, lowered for devices that need not exist."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ddim_jax import samplers, sampling
from ddim_jax.planning.chips import Slice
from ddim_jax.sampling import Pipeline
from ddim_jax.training import loop, train_state
from ddim_jax.training.recipe import Recipe
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError, error_context


class Program(NamedTuple):
    """A program before it is compiled."""

    lowered: jax.stages.Lowered
    mesh: Mesh
    flops: float  # of the model over all devices; operations that are computed twice to save memory count once
    arguments: tuple  # shapes with shardings; the sampler is a pytree of numbers
    images: int  # over all devices

    @property
    def argument_bytes(self) -> int:
        """On one device, without the padding of tiles."""
        leaves = [leaf for leaf in jax.tree.leaves(self.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
        return sharding.bytes_on_a_device([leaf.sharding for leaf in leaves], leaves)


def mesh_of_slice(slice_: Slice, data: int = -1, fsdp: int = 1) -> Mesh:
    """The mesh of the devices of a TPU slice. ConfigError if libtpu is not installed or does not have the slice, and
    unless data x fsdp is the number of devices.
    """
    prepare_libtpu(slice_)
    from jax.experimental import topologies

    keywords: dict[str, Any] = {"chips_per_host_bounds": slice_.host_bounds}
    if slice_.chip.config:
        keywords["chip_config_name"] = slice_.chip.config
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_.topology, **keywords)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--chips {slice_.name}: libtpu cannot make the topology {slice_.topology}: {str(error)[:200]}"
        ) from error
    if len(topology.devices) != slice_.devices:
        raise ConfigError(f"--chips {slice_.name}: libtpu has {len(topology.devices)} devices for {slice_.topology}")
    return mesh_of(topology.devices, data, fsdp)


def mesh_of(devices: list[jax.Device], data: int = -1, fsdp: int = 1) -> Mesh:
    """The mesh of training on these devices. ConfigError unless data x fsdp is the number of devices."""
    with error_context("config.mesh"):
        try:
            return sharding.data_mesh(data, fsdp, devices)
        except NotImplementedError as error:  # JAX cannot lay the mesh out on the network of the chips
            raise ValueError(f"data x fsdp of {len(devices)} devices: {str(error)[:200]}") from error


def prepare_libtpu(slice_: Slice) -> None:
    """Sets the environment that libtpu needs where there is no TPU. ConfigError that names the extra without libtpu."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        if "TPU_LIBRARY_PATH" not in os.environ:
            raise ConfigError("--chips: TPUs need the compiler of libtpu: pip install 'ddim-jax[plan]'") from None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it waits for the metadata server of a cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else one process at a time: its lock is for a TPU
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", slice_.name.replace("v5e", "v5litepod"))  # else it prints a warning


def update(recipe: Recipe, mesh: Mesh, shape: tuple[int, ...], dtype: Any = np.uint8) -> Program:
    """The update of a recipe. shape, dtype: of one example."""
    one = sharding.replicated(one_device())
    init = lambda key: train_state.init(recipe.network, recipe.optimizer, key, recipe.objective.init())
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(init, key)
    state = jax.tree.map(_with_sharding, shapes, sharding.fully_sharded(mesh, shapes))
    key = _with_sharding(key, sharding.replicated(mesh))
    images = jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=sharding.along_batch(mesh))
    classes = recipe.network.num_classes
    labels = jax.ShapeDtypeStruct(images.shape[:1], np.int32, sharding=images.sharding) if classes else None
    traced, flops = loop.traced_update(recipe, mesh, state, key, shape, dtype)
    if not flops:  # XLA counts operations only for devices that exist
        on_one = jax.tree.map(lambda leaf: _with_sharding(leaf, one), (state, key))
        flops = loop.traced_update(recipe, one.mesh, *on_one, shape, dtype)[1]
    lowered = traced.lower(lowering_platforms=(platform(mesh),))
    return Program(lowered, mesh, flops, (state, images, labels, key), recipe.batch_size)


def batch_of(pipeline: Pipeline) -> int:
    """The images of one batch: the batch size, rounded up to a multiple of the devices."""
    return -(-pipeline.batch_size // pipeline.mesh.size) * pipeline.mesh.size


def sampler(pipeline: Pipeline) -> Program:
    """The sampler of one batch: the program of `samplers.integrate`. The parameters of the pipeline may be shapes."""
    mesh, process, count = pipeline.mesh, pipeline.process, batch_of(pipeline)
    along, replicated = sharding.along_batch(mesh), sharding.replicated(mesh)
    x = jax.ShapeDtypeStruct((count, *pipeline.shape), np.float32, sharding=along)
    keys = jax.ShapeDtypeStruct((count,), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=along)
    labels = jax.ShapeDtypeStruct((count,), np.int32) if pipeline.num_classes else None
    denoise = jax.eval_shape(conditioned(pipeline), pipeline.denoiser.params, labels)
    is_labels = lambda leaf: leaf.shape == (count,) and leaf.dtype == np.int32  # the other leaves are floats
    placed = lambda leaf: _with_sharding(leaf, along if is_labels(leaf) else replicated)
    transitions = _shapes(process.transitions, replicated)
    keys = keys if process.sampler.stochastic else None
    arguments = (process.sampler, jax.tree.map(placed, denoise), transitions, x, keys)
    lowered = samplers.scan_steps.trace(*arguments, keep=False).lower(lowering_platforms=(platform(mesh),))
    return Program(lowered, mesh, calls_of(process) * call_flops(denoise, process, x), arguments, count)


def conditioned(pipeline: Pipeline) -> Any:
    """The function (params, labels) -> the denoiser that the sampler calls, with guidance and clipping."""

    def denoiser(params, labels):
        plain = pipeline.denoiser
        rebuilt = type(plain)(plain.network, params, plain.prediction, None, plain.lowest)
        return sampling.conditioned(pipeline._replace(denoiser=rebuilt), labels)

    return denoiser


def calls_of(process: samplers.SamplingProcess) -> int:
    """Network calls of one batch."""
    return len(process.transitions.t) * getattr(process.sampler, "calls_per_step", 1)


def call_flops(denoise: Any, process: samplers.SamplingProcess, x: jax.ShapeDtypeStruct) -> float:
    """Floating-point operations of one call of a denoiser."""
    one = sharding.replicated(one_device())  # XLA counts operations only for devices that exist
    level = jax.tree.map(lambda leaf: leaf[0], process.transitions.level_t)
    arguments = jax.tree.map(lambda leaf: _with_sharding(leaf, one), (denoise, x))
    traced = jax.jit(lambda denoise, x: denoise(x, level)).trace(*arguments)
    # Lowered for a TPU, where a convolution is one operation. The CPU formulation of it has fewer operations.
    return float((traced.lower(lowering_platforms=("tpu",)).cost_analysis() or {}).get("flops", 0))


def one_device() -> Mesh:
    """A mesh of one device of this machine."""
    return sharding.data_mesh(devices=jax.local_devices()[:1])


def platform(mesh: Mesh) -> str:
    """The platform of the devices of a mesh: "cpu", "tpu" or "cuda"."""
    name = mesh.devices.flat[0].platform
    return "cuda" if name == "gpu" else name


def _with_sharding(leaf: Any, at: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)


def _shapes(tree: Any, at: Any) -> Any:
    """The shapes of host arrays, in the dtypes that they have on a device."""
    dtype = lambda leaf: jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), dtype(leaf), sharding=at), tree)
