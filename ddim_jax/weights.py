"""Where the parameters to sample come from: a run's checkpoint, a published one, or the file that ships with the
package.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ddim_jax import config as config_lib
from ddim_jax import files, pretrained, ranges, sharding, train_state
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.config import Config, ModelConfig
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.pretrained import Published, tensors


class Weights(NamedTuple):
    params: Any  # replicated over the mesh
    source: str  # for people: where they came from
    step: int | None = None  # how many updates made them, where that is known

    @property
    def digest(self) -> str:
        return tensors.digest(self.params)


def find(config: Config, workdir: str | None, mesh: Mesh) -> Weights:
    """The latest checkpoint of workdir; without one what config.pretrained names, or the weights that ship for
    config.name.

    Raises CheckpointError or ConfigError where there are none, where they are of another network or not finite, or
    where the network was trained with another schedule or prediction than the config says; DamagedError where they are
    not what was written.
    """
    if workdir is not None and config.pretrained:
        raise ConfigError(f"config.pretrained is {config.pretrained!r} and --workdir is {workdir!r}: give one of them")
    shipped = pretrained.shipped(config.name)
    if workdir is not None:
        published = of_run(workdir)
    elif config.pretrained:
        published = describe(config.pretrained)
    elif shipped is not None:
        published = pretrained.open_checkpoint(str(shipped))
        published = published._replace(source=f"weights shipped with ddim_jax ({shipped.name})")
    else:
        raise ConfigError(
            f"no weights for config.name {config.name!r} ship with ddim_jax (those that do: "
            f"{', '.join(pretrained.shipped_names())}); give --config.pretrained, or --workdir of a trained run"
        )
    config_lib.check_sampled(config, published, published.source)
    params = published.read(params_like(config.model, mesh), config.sample.ema)
    show_note(published)
    return Weights(params, published.source, published.step)


def show_note(published: Published) -> None:
    """Prints what of a checkpoint's files has no influence here, if there is something."""
    if published.note and sharding.is_first():
        print(files.printable(f"note: {published.note}"), file=sys.stderr)


def params_like(config: ModelConfig, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters of config.model, replicated over the mesh."""
    like = train_state.param_shapes(config_lib.network(config))
    placed = sharding.replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), like)


def describe(where: str) -> Published:
    """What the checkpoint at a path, or under a hub id, says of itself: a run of ours, or a published one."""
    is_run = (pathlib.Path(where) / "checkpoints").is_dir()
    return of_run(where) if is_run else pretrained.open_checkpoint(where)


def of_run(workdir: str) -> Published:
    """What the latest checkpoint of a run says of itself."""
    with Checkpoints(pathlib.Path(workdir)) as checkpoints:
        step = checkpoints.require_latest()
        config = checkpoints.config(step)

    def read(like: Any, ema: bool) -> Any:
        with Checkpoints(pathlib.Path(workdir)) as checkpoints:
            checkpoints.check_network(step, like)
            return checkpoints.restore_params(step, like, ema)

    return pretrained.describe_own(config, step, f"{workdir}, step {step}", read)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config in which config.pretrained decides: name, schedule and model (but for dropout, dtype and
    remat) are the checkpoint's, and so is what config.sample leaves open.
    """
    with error_context("config.pretrained"):
        published = describe(ranges.typed(str, values["pretrained"]))
    given, model = values["model"], dataclasses.asdict(published.model)
    config_lib.check_trusted(values, published, published.source)
    computed = {field: given[field] for field in config_lib.FREE_OF_NETWORK if field in given and field in model}
    return {
        **values,
        "name": published.name,
        "model": model | computed,
        "schedule": dataclasses.asdict(published.schedule),
        "sample": config_lib.decided(values["sample"], published.sample),
    }
