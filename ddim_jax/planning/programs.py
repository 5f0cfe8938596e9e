"""The programs that training and sampling run, lowered for devices that need not exist, and compiled for them."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ddim_jax import samplers, sampling
from ddim_jax.planning import hlo
from ddim_jax.planning.chips import Slice
from ddim_jax.sampling import Pipeline
from ddim_jax.training import loop, train_state
from ddim_jax.training.recipe import Recipe
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError


class Report(NamedTuple):
    """What a compiled program needs on each device. All sizes are in bytes."""

    arguments: int
    temporaries: int
    outputs: int  # without those that take the memory of a donated argument
    donated: int  # of the arguments, whose memory the outputs take
    traffic: dict[str, int]  # kind of operation -> bytes that are read from HBM and written to it
    modules: dict[str, int]  # module of the network -> the same bytes
    collectives: dict[str, hlo.Collective]
    needed: int = 0  # the memory that the compiler asks for, if the program does not fit and was not compiled

    @property
    def memory(self) -> int:
        return self.needed or self.arguments + self.temporaries + self.outputs


def mesh_of(slice_: Slice, data: int = -1, fsdp: int = 1) -> Mesh:
    """The mesh of a TPU slice, as `sharding.data_mesh` makes it of the devices of this machine.

    ConfigError if libtpu is not installed, and unless data x fsdp is the number of devices.
    """
    check_libtpu()
    from jax.experimental import topologies

    chip = slice_.chip
    host = {2: (1, 1, 1) if slice_.chips == 1 else (2, 2, 1), 3: (2, 2, 1)}[chip.dimensions]
    if slice_.chips in (1, 4, 8) and chip.dimensions == 2:  # one host has up to 8 chips
        host = (*slice_.shape, 1)
    options: dict[str, Any] = {"chips_per_host_bounds": host, "wrap": tuple(False for _ in slice_.shape)}
    if chip.config:
        options["chip_config_name"] = chip.config
    if chip.dimensions == 2:
        options.pop("wrap")
    attempts = [{}, options, {"chips_per_host_bounds": host}, {"chip_config_name": chip.config}]
    error: Exception | None = None
    for keywords in attempts:
        if "" in keywords.values():
            continue
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=slice_.topology, **keywords)
            break
        except Exception as raised:  # libtpu raises errors of several classes for a topology that it does not have
            error = raised
    else:
        raise ConfigError(f"--chips {slice_.name}: libtpu has no topology {slice_.topology}: {error}") from error
    return mesh_of_devices(topology.devices, data, fsdp)


def local_mesh() -> Mesh:
    """A mesh of one device of this machine."""
    return mesh_of_devices(jax.local_devices()[:1], 1, 1)


def mesh_of_devices(devices: Any, data: int, fsdp: int) -> Mesh:
    """A mesh with the axes "data" and "fsdp". ConfigError unless data x fsdp is the number of devices."""
    count = len(devices)
    if fsdp < 1 or count % fsdp or data not in (-1, count // fsdp):
        raise ConfigError(f"config.mesh: data x fsdp must be the number of devices, {count}, got {data} x {fsdp}")
    return Mesh(np.array(devices).reshape(count // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def check_libtpu() -> None:
    """ConfigError that names the extra if libtpu is not installed. Sets the environment that it needs without a TPU."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        if "TPU_LIBRARY_PATH" not in os.environ:
            raise ConfigError("--chips: TPUs need the compiler of libtpu: pip install 'ddim-jax[plan]'") from None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it waits for the metadata server of a cloud
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def update(
    recipe: Recipe, mesh: Mesh, shape: tuple[int, ...], dtype: Any = np.uint8
) -> tuple[jax.stages.Lowered, float]:
    """(the lowered update of a recipe, its floating-point operations over all devices).

    shape, dtype: of one example.
    """
    one = sharding.replicated(local_mesh())
    init = lambda key: train_state.init(recipe.network, recipe.optimizer, key, recipe.objective.init())
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(init, key)
    placement = sharding.fully_sharded(mesh, shapes)
    state = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placement)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    traced, flops = loop.traced_update(recipe, mesh, state, key, shape, dtype)
    if not flops:  # XLA counts operations only for devices that exist
        on_one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), (state, key))
        flops = loop.traced_update(recipe, one.mesh, *on_one, shape, dtype)[1]
    return traced.lower(lowering_platforms=(platform(mesh),)), flops


def batch_of(pipeline: Pipeline) -> int:
    """The images of one batch: the batch size, rounded up to a multiple of the devices."""
    return -(-pipeline.batch_size // pipeline.mesh.size) * pipeline.mesh.size


def sampler(pipeline: Pipeline, params: Any) -> tuple[jax.stages.Lowered, float]:
    """(the lowered sampler of one batch of a pipeline, its floating-point operations over all devices).

    params: the shapes of the network's parameters. The operations are those of the network calls.
    """
    mesh, process, count = pipeline.mesh, pipeline.process, batch_of(pipeline)
    along = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.along_batch(mesh))
    replicated = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))
    x = along((count, *pipeline.shape), np.float32)
    keys = along((count,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    labels = along((count,), np.int32) if pipeline.num_classes else None

    def model_of(params, labels):
        denoiser = pipeline.denoiser
        rebuilt = type(denoiser)(denoiser.network, params, denoiser.prediction, None, denoiser.lowest)
        return sampling.conditioned(pipeline._replace(denoiser=rebuilt), labels)

    def draw(params, labels, x, keys):
        keys = keys if process.sampler.stochastic else None
        return samplers.integrate(process.sampler, model_of(params, labels), process.transitions, x, keys)

    def call(params, labels, x):
        return model_of(params, labels)(x, jax.tree.map(lambda leaf: leaf[0], process.transitions.level_t))

    params = jax.tree.map(replicated, params)
    one = sharding.replicated(local_mesh())  # XLA counts operations only for devices that exist
    on_one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
    # Lowered for a TPU, where a convolution is one operation.
    counted = jax.jit(call).trace(*jax.tree.map(on_one, (params, labels, x)))
    cost = counted.lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    calls = len(process.transitions.t) * getattr(process.sampler, "calls_per_step", 1)
    traced = jax.jit(draw, out_shardings=sharding.along_batch(mesh)).trace(params, labels, x, keys)
    return traced.lower(lowering_platforms=(platform(mesh),)), calls * float(cost.get("flops", 0))


def platform(mesh: Mesh) -> str:
    """The platform of the devices of a mesh: "cpu", "tpu" or "cuda"."""
    name = mesh.devices.flat[0].platform
    return "cuda" if name == "gpu" else name


_NEEDED = re.compile(r"Used ([0-9.]+)([KMGT]?) of ([0-9.]+)([KMGT]?) hbm")
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def report(lowered: jax.stages.Lowered) -> tuple[Report, jax.stages.Compiled | None]:
    """Compiles a program, and returns (what it needs, the compiled program). The program is None if the compiler finds
    that it does not fit into the memory of a chip; then only `Report.needed` is known.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = int(float(found[1]) * UNITS[found[2]]) if found else -1
        return Report(0, 0, 0, 0, {}, {}, {}, needed), None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved = hlo.traffic(text)
    kinds, modules = {}, {}
    for (opcode, module), count in moved.items():
        kinds[opcode] = kinds.get(opcode, 0) + count
        modules[module] = modules.get(module, 0) + count
    largest_first = lambda counts: dict(sorted(counts.items(), key=lambda item: -item[1]))
    return (
        Report(
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.alias_size_in_bytes,
            largest_first(kinds),
            largest_first(modules),
            hlo.collectives(text),
        ),
        compiled,
    )
