"""Trained networks: what a checkpoint is of, checked, and its parameters. A run's checkpoint, a published one, or the
weights that ship with the package.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddim_jax import checkpoints, registry
from ddim_jax.checkpoints import CheckpointInfo, tensors
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.config import build, compatibility, parsing, schema
from ddim_jax.config.schema import Config, ModelConfig, SampleConfig, ScheduleConfig
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.models.network import param_shapes
from ddim_jax.schedule import Schedule
from ddim_jax.utils import files, ranges, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError, error_context

# Fields of config.sample that go with a network: two groups, each decided by its first field.
SAMPLED = tuple((name, *field.beside) for name, field in schema.DEFAULT_IF_UNSET.items())


class Checkpoint(NamedTuple):
    """A trained network whose description is checked; no tensor is read yet."""

    name: str  # for output folders
    source: str  # where it is, for people
    model: ModelConfig
    schedule: ScheduleConfig
    sample: Mapping[str, Any]  # the fields SAMPLED of config.sample: how its authors sample it
    config: Mapping[str, Any]  # all of the config that it was trained with, where ddim_jax saved it; else nothing
    step: int | None  # how many updates made it, where that is known
    read: Callable[[Any, bool], Any]  # (like, ema) -> params, in float32
    note: str = ""  # which settings of its files have no influence here, for people


class Weights(NamedTuple):
    params: Any  # replicated over the mesh
    source: str  # where they are from, for people
    step: int | None = None  # how many updates made them, where that is known

    @property
    def digest(self) -> str:
        return tensors.digest(self.params)


class Loaded(NamedTuple):
    """A trained network, ready to sample. Nothing of it is clipped: see `gaussian.clip_x0`."""

    denoiser: Denoiser
    schedule: Schedule
    shape: tuple[int, ...]  # of one image, (H, W, C)
    num_classes: int  # 0 for a network without labels; see `Denoiser.with_labels`
    clips: bool  # whether its authors clip the predicted x_0
    source: str  # where it is from, for people


def load(where: str, *, ema: bool = True, code: Sequence[str] = ()) -> Loaded:
    """The network of a workdir, a .safetensors file, a diffusers folder or hub id, a checkpoint of the official code,
    or the name of weights that ship ("digits").

    ema: the moving average of the parameters, or the raw ones. code: names "package.module:attribute" of the
    checkpoint's author that may be imported, a network or a schedule: a file alone imports nothing. CheckpointError
    where it cannot be used.
    """
    shipped = checkpoints.shipped(where) if where in checkpoints.shipped_names() else None
    found = read_info(str(shipped or where))
    needed = {field: name for field, name in compatibility.code_of(found).items() if field != "sample.tau"}
    if missing := [name for name in needed.values() if name not in code]:
        raise CheckpointError(f"{where} needs {missing[0]}, which is code of its author; code={missing} runs it")
    network = build.network(found.model)
    noise_schedule = build.noise_schedule(found.schedule)
    placed = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = found.read(_shapes(found.model, placed), ema)
    lowest = jax.tree.map(jnp.asarray, noise_schedule.level(1))
    denoiser = Denoiser(network, params, found.model.prediction, lowest=lowest)
    clips = bool(found.sample.get("clip_x0"))
    return Loaded(denoiser, noise_schedule, network.shape, network.num_classes, clips, found.source)


def find(config: Config, workdir: str | None, mesh: Mesh) -> Weights:
    """The latest checkpoint of workdir; without one what config.pretrained names, or the weights that ship for
    config.name.

    Raises CheckpointError or ConfigError where there are none, where they are of another network or not finite, or
    where the network was trained with another schedule or prediction than the config says; DamagedError where they are
    not what was written.
    """
    if workdir is not None and config.pretrained:
        raise ConfigError(f"config.pretrained is {config.pretrained!r} and --workdir is {workdir!r}: give one of them")
    shipped = checkpoints.shipped(config.name)
    if workdir is not None:
        found = checked(info_of_run(workdir))
    elif config.pretrained:
        found = read_info(config.pretrained)
    elif shipped is not None:
        found = checked(checkpoints.open_checkpoint(str(shipped)))
        found = found._replace(source=f"weights shipped with ddim_jax ({shipped.name})")
    else:
        raise ConfigError(
            f"no weights for config.name {config.name!r} ship with ddim_jax (those that do: "
            f"{', '.join(checkpoints.shipped_names())}); give --config.pretrained, or --workdir of a trained run"
        )
    compatibility.check_sampled(config, found, found.source)
    params = found.read(params_like(config.model, mesh), config.sample.ema)
    show_note(found)
    return Weights(params, found.source, found.step)


def show_note(found: Checkpoint) -> None:
    """Prints which settings of a checkpoint's files have no influence here, if there are any."""
    if found.note and sharding.is_main_process():
        print(files.printable(f"note: {found.note}"), file=sys.stderr)


def params_like(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters of config.model, replicated over the mesh."""
    return _shapes(config, sharding.replicated(mesh))


def _shapes(config: ModelConfig, placed: jax.sharding.Sharding) -> Any:
    like = param_shapes(build.network(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), like)


def read_info(where: str) -> Checkpoint:
    """What the checkpoint at a path, or under a hub id, is of: a run's, or a published one. CheckpointError where there
    is none, or none of a network that can be.
    """
    is_run = (pathlib.Path(where) / "checkpoints").is_dir()
    return checked(info_of_run(where) if is_run else checkpoints.open_checkpoint(where))


def info_of_run(workdir: str) -> CheckpointInfo:
    """What the latest checkpoint of a run is of."""
    with Checkpoints(pathlib.Path(workdir)) as run:
        step = run.require_latest()
        config = run.config(step)

    def read(like: Any, ema: bool) -> Any:
        with Checkpoints(pathlib.Path(workdir)) as run:
            run.check_network(step, like)
            return run.restore_params(step, like, ema)

    return CheckpointInfo(f"{workdir}, step {step}", read, config, step=step)


def checked(info: CheckpointInfo) -> Checkpoint:
    """The same, with its fields of a config checked: CheckpointError for those that no network can have, and for a name
    that cannot be part of a path.
    """
    if info.config is not None:
        info = _of_saved_config(info)
    try:
        with error_context("name"):
            if not isinstance(info.name, str):
                raise ValueError(f"must be a text, got {files.shown(info.name)}")
            files.check_name(info.name)
        with error_context("step"):
            if info.step is not None and not 0 <= info.step < 2**63:
                raise ValueError(f"must be in 0..2^63 - 1, got {files.shown(info.step)}")
        sample = parsing.part_of_section(SampleConfig, info.sample, "sample")
        assumed = {"name": "unet", "dropout": 0.0} if "name" not in info.model else {}
        model = parsing.section(ModelConfig, {**assumed, **info.model}, "model")
        schedule = parsing.section(ScheduleConfig, info.schedule, "schedule")
        if not registry.is_code(model.name):  # else it is code, which a file alone does not run
            build.network(model)
        if not registry.is_code(schedule.name):
            build.noise_schedule(schedule)
    except ConfigError as error:
        raise CheckpointError(f"{info.source} cannot be used: {error}") from error
    return Checkpoint(
        info.name, info.source, model, schedule, sample, info.config or {}, info.step, info.read, info.note
    )


def _of_saved_config(info: CheckpointInfo) -> CheckpointInfo:
    """The same, with the fields of the config that was saved with it, also by an earlier version."""
    try:
        config = compatibility.filled(info.config)
        name, model, schedule, sample = (config[section] for section in ("name", "model", "schedule", "sample"))
        sampled = {field: sample[field] for group in SAMPLED for field in group}
        return info._replace(name=name, model=dict(model), schedule=dict(schedule), sample=sampled, config=config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {info.source} is not whole: {error!r}") from error


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config in which config.pretrained decides: name, schedule and model (but for dropout, dtype and
    remat) are the checkpoint's, and so is what config.sample leaves open.
    """
    with error_context("config.pretrained"):
        found = read_info(ranges.typed(str, values["pretrained"]))
    given, model = values["model"], dataclasses.asdict(found.model)
    compatibility.check_trusted(values, found, found.source)
    computed = {field: given[field] for field in schema.NOT_ARCHITECTURE if field in given and field in model}
    return {
        **values,
        "name": found.name,
        "model": model | computed,
        "schedule": dataclasses.asdict(found.schedule),
        "sample": parsing.decided(values["sample"], found.sample),
    }
