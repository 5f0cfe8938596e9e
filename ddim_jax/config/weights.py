"""Trained networks: the checked description of a checkpoint, and its parameters. The checkpoint is that of a run, a
published one, or the weights shipped with the package.
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

# Fields of config.sample that a checkpoint may set: two groups, each of a field and its dependent fields.
SAMPLED = tuple((name, *unset.dependent) for name, unset in schema.DEFAULT_IF_UNSET.items())


class Checkpoint(NamedTuple):
    """The checked description of a trained network. No tensor is read yet."""

    name: str  # for the names of output folders
    source: str  # its location, for messages
    model: ModelConfig
    schedule: ScheduleConfig
    sample: Mapping[str, Any]  # the fields SAMPLED of config.sample, with which its authors sample it
    config: Mapping[str, Any]  # the complete config of training if ddim_jax saved the checkpoint, else empty
    step: int | None  # the number of updates, None if it is unknown
    read: Callable[[Any, bool], Any]  # (like, ema) -> params, in float32
    note: str = ""  # the settings of its files that ddim_jax ignores, for messages


class Weights(NamedTuple):
    """The parameters of a trained network."""

    params: Any  # replicated over the mesh
    source: str  # their location, for messages
    step: int | None = None  # the number of updates, None if it is unknown

    @property
    def digest(self) -> str:
        """SHA-256 of the parameters."""
        return tensors.digest(self.params)


class Loaded(NamedTuple):
    """A trained network that is ready to sample. Its denoiser does not clip x_0: see `gaussian.clip_x0`."""

    denoiser: Denoiser
    schedule: Schedule
    shape: tuple[int, ...]  # of one image, (H, W, C)
    num_classes: int  # 0 for an unconditional network; see `Denoiser.with_labels`
    clips: bool  # whether its authors clip the predicted x_0
    source: str  # its location, for messages


def load(where: str, *, ema: bool = True, code: Sequence[str] = (), image_size: int | None = None) -> Loaded:
    """Loads a trained network onto the first local device.

    where: a workdir, a .safetensors file, a diffusers folder or hub id, a checkpoint of the official code, or the name
        of shipped weights ("digits").
    ema: True for the EMA parameters, False for the raw parameters.
    code: the names "package.module:attribute" of networks and schedules of the checkpoint's author that may be
        imported. A file alone never imports code.
    image_size: the height and width of the images, for a checkpoint that does not tell them: a diffusers folder whose
        sample_size is null. Ignored for any other checkpoint.

    CheckpointError if the checkpoint cannot be used.
    """
    shipped = checkpoints.shipped(where) if where in checkpoints.shipped_names() else None
    checkpoint = read_info(str(shipped or where), image_size)
    needed = {field: name for field, name in compatibility.code_of(checkpoint).items() if field != "sample.tau"}
    if missing := [name for name in needed.values() if name not in code]:
        raise CheckpointError(
            f"{where} needs the code {missing[0]} of the checkpoint's author; to run it, pass code={missing}"
        )
    network = build.network(checkpoint.model)
    noise_schedule = build.noise_schedule(checkpoint.schedule)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = checkpoint.read(_shapes(checkpoint.model, device), ema)
    lowest = jax.tree.map(jnp.asarray, noise_schedule.level(1))
    denoiser = Denoiser(network, params, checkpoint.model.prediction, lowest=lowest)
    clips = bool(checkpoint.sample.get("clip_x0"))
    return Loaded(denoiser, noise_schedule, network.shape, network.num_classes, clips, checkpoint.source)


def find(config: Config, workdir: str | None, mesh: Mesh) -> Weights:
    """The weights that a command samples: the latest checkpoint of workdir; without a workdir those of
    config.pretrained, else the shipped weights of config.name.

    Raises CheckpointError or ConfigError if they do not exist, belong to another network, are not finite, or were
    trained with another schedule or prediction than that of the config; DamagedError if a file was changed after it was
    written.
    """
    if workdir is not None and config.pretrained:
        raise ConfigError(f"config.pretrained is {config.pretrained!r} and --workdir is {workdir!r}: set only one")
    shipped = checkpoints.shipped(config.name)
    if workdir is not None:
        checkpoint = checked(info_of_run(workdir))
    elif config.pretrained:
        checkpoint = read_info(config.pretrained, config.model.image_size)
    elif shipped is not None:
        checkpoint = checked(checkpoints.open_checkpoint(str(shipped)))
        checkpoint = checkpoint._replace(source=f"weights shipped with ddim_jax ({shipped.name})")
    else:
        raise ConfigError(
            f"no weights for config.name {config.name!r} are shipped with ddim_jax (available: "
            f"{', '.join(checkpoints.shipped_names())}); set --config.pretrained, or --workdir of a trained run"
        )
    compatibility.check_sampled(config, checkpoint, checkpoint.source)
    params = checkpoint.read(params_like(config.model, mesh), config.sample.ema)
    show_note(checkpoint)
    return Weights(params, checkpoint.source, checkpoint.step)


def show_note(checkpoint: Checkpoint) -> None:
    """Prints the note of a checkpoint to stderr, if it has one."""
    if checkpoint.note and sharding.is_main_process():
        print(files.printable(f"note: {checkpoint.note}"), file=sys.stderr)


def params_like(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters of config.model, replicated over the mesh."""
    return _shapes(config, sharding.replicated(mesh))


def _shapes(config: ModelConfig, placement: jax.sharding.Sharding) -> Any:
    like = param_shapes(build.network(config))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement), like)


def read_info(where: str, image_size: int | None = None) -> Checkpoint:
    """The checked description of a checkpoint: that of a run, or a published one.

    where: a path or a hub id. image_size: the size of the images if the checkpoint does not tell it.

    CheckpointError if there is no checkpoint, or if its network is invalid.
    """
    is_run = (pathlib.Path(where) / "checkpoints").is_dir()
    return checked(info_of_run(where) if is_run else checkpoints.open_checkpoint(where), image_size)


def info_of_run(workdir: str) -> CheckpointInfo:
    """The description of the latest checkpoint of a run."""
    with Checkpoints(pathlib.Path(workdir)) as run:
        step = run.require_latest()
        config = run.config(step)

    def read(like: Any, ema: bool) -> Any:
        with Checkpoints(pathlib.Path(workdir)) as run:
            run.check_network(step, like)
            return run.restore_params(step, like, ema)

    return CheckpointInfo(f"{workdir}, step {step}", read, config, step=step)


def checked(info: CheckpointInfo, image_size: int | None = None) -> Checkpoint:
    """Checks the description of a checkpoint. CheckpointError for fields that no network can have, and for a name that
    cannot be part of a path.

    image_size: see `read_info`.
    """
    if info.sized is not None:
        info = _with_size(info, image_size)
    if info.config is not None:
        info = _of_saved_config(info)
    try:
        with error_context("name"):
            if not isinstance(info.name, str):
                raise ValueError(f"must be a string, got {files.shown(info.name)}")
            files.check_name(info.name)
        with error_context("step"):
            if info.step is not None and not 0 <= info.step < 2**63:
                raise ValueError(f"must be in 0..2^63 - 1, got {files.shown(info.step)}")
        sample = parsing.part_of_section(SampleConfig, info.sample, "sample")
        assumed = {"name": "unet", "dropout": 0.0} if "name" not in info.model else {}
        model = parsing.section(ModelConfig, {**assumed, **info.model}, "model")
        schedule = parsing.section(ScheduleConfig, info.schedule, "schedule")
        if not registry.is_code(model.name):  # a file alone does not run code
            build.network(model)
        if not registry.is_code(schedule.name):
            build.noise_schedule(schedule)
    except ConfigError as error:
        raise CheckpointError(f"{info.source} cannot be used: {error}") from error
    return Checkpoint(
        info.name, info.source, model, schedule, sample, info.config or {}, info.step, info.read, info.note
    )


def _with_size(info: CheckpointInfo, image_size: int | None) -> CheckpointInfo:
    """The description for images of this size, of a checkpoint that does not tell the size of its images."""
    unknown = f"{info.source} does not tell the size of its images (sample_size is null)"
    if image_size is None:
        raise CheckpointError(f"{unknown}: give image_size (config.model.image_size, or --image_size of convert)")
    note = f"{unknown}: it is {image_size}x{image_size}, as image_size gives it"
    return info._replace(model=info.sized(image_size), sized=None, note="; ".join(filter(None, (note, info.note))))


def _of_saved_config(info: CheckpointInfo) -> CheckpointInfo:
    """The description, with the fields of the saved config, which may be that of an earlier version."""
    try:
        config = compatibility.filled(info.config)
        name, model, schedule, sample = (config[section] for section in ("name", "model", "schedule", "sample"))
        sampled = {field: sample[field] for group in SAMPLED for field in group}
        return info._replace(name=name, model=dict(model), schedule=dict(schedule), sample=sampled, config=config)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {info.source} is incomplete: {error!r}") from error


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, completed from the checkpoint of config.pretrained. The checkpoint sets the name, the
    schedule, the model (except dropout, dtype and remat, and image_size if the checkpoint does not tell it), and the
    fields of config.sample that are unset.
    """
    with error_context("config.model.image_size"):
        image_size = ranges.typed(int, values["model"].get("image_size", 0)) or None
    with error_context("config.pretrained"):
        checkpoint = read_info(ranges.typed(str, values["pretrained"]), image_size)
    current, model = values["model"], dataclasses.asdict(checkpoint.model)
    compatibility.check_trusted(values, checkpoint, checkpoint.source)
    from_config = {field: current[field] for field in schema.NOT_ARCHITECTURE if field in current and field in model}
    return {
        **values,
        "name": checkpoint.name,
        "model": model | from_config,
        "schedule": dataclasses.asdict(checkpoint.schedule),
        "sample": parsing.decided(values["sample"], checkpoint.sample),
    }


def as_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config to save with the parameters of a checkpoint: the complete config of its training if the checkpoint
    holds it, else the fields that are known.
    """
    known = {
        "name": checkpoint.name,
        "model": dataclasses.asdict(checkpoint.model),
        "schedule": dataclasses.asdict(checkpoint.schedule),
        "sample": {**checkpoint.config.get("sample", {}), **checkpoint.sample},
    }
    return {**checkpoint.config, **known}
