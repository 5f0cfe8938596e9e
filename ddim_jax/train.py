"""Trains a noise predictor.

    python -m ddim_jax.train --config configs/digits.py --workdir DIR [--config.FIELD=VALUE ...]

Writes into the workdir: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`, `grids/`, and
`evaluations.jsonl` where config.train.evaluate_every asks for it. The same command resumes from the last checkpoint, to
the same parameters as a run that was never interrupted.

SIGTERM saves a checkpoint and ends with exit code 75: run the same command again. Ctrl-C ends after the step, the
second one at once. With --distributed it is one of several processes, each started with the same command.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import json
import pathlib
import shlex
import types
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from ddim_jax import cli, data, sampling
from ddim_jax import config as config_lib
from ddim_jax.config import Config, evaluation, weights
from ddim_jax.evaluation.evaluator import Evaluator, evaluate_samples
from ddim_jax.samplers import SamplingProcess
from ddim_jax.training import loop, memory
from ddim_jax.training.log_file import steps_in
from ddim_jax.training.metric_writers import MetricWriters, WeightsAndBiases
from ddim_jax.training.recipe import Recipe
from ddim_jax.utils import files, images, sharding
from ddim_jax.utils.errors import ConfigError, error_context

GRID_IMAGES = 64

OPTIONS = {
    "workdir": (None, "Folder of the run: made if it is not there, resumed if it is."),
    "skip_damaged": (False, "Where the last checkpoint is damaged, set it aside and resume from the one before."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.workdir is None:
        raise ConfigError("--workdir is missing: the folder that the run is written to")
    recipe = config_lib.recipe(config)  # mistakes show before anything is read
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    with error_context("config.mesh"):
        mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    memory.check_training(recipe.network, recipe.optimizer, mesh, recipe.batch_size, recipe.accumulate)
    source = load_data(config, mesh)
    evaluator = None
    if config.train.evaluate_every:
        shape = config_lib.image_shape(config.model)
        evaluator = evaluation.evaluator(config, evaluation.open_network(config), mesh, shape)
    workdir = cli.writable_folder(options.workdir)
    on_step = partial(show_samples, workdir, config, process, mesh, evaluator)
    run(config, recipe, source, workdir, mesh, on_step, options.skip_damaged)
    cli.say(
        f"{config.train.num_steps} steps are done; checkpoints, metrics.jsonl and grids are in {workdir}\n"
        f"sample it: python -m ddim_jax.sample {shlex.join(sampling_arguments(config, workdir))}"
    )


def run(
    config: Config,
    recipe: Recipe,
    source: data.Source,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    on_step: loop.OnStep = lambda writers, step, ema_params, resumed=False: None,
    skip_damaged: bool = False,
) -> Any:
    """Trains as the recipe of a config says, from where the workdir is, and returns the moving average of the
    parameters. on_step, skip_damaged: see `loop.run`.
    """
    record = dataclasses.asdict(config)

    def check_saved(saved: Mapping[str, Any]) -> None:
        config_lib.check_resumed(config, config_lib.parse_saved(saved), f"the run in {workdir}")

    def initial_params(converted: bool) -> tuple[Any, str] | None:
        if not converted and not config.pretrained:
            return None
        found = weights.find(config, str(workdir) if converted else None, mesh)
        return found.params, found.source

    def open_writers(begin: int) -> MetricWriters:
        if begin < recipe.num_steps and sharding.is_main_process():
            with files.replacing(workdir / "config.json") as file:
                file.write(json.dumps(record, indent=1).encode())
        project, public = config.train.wandb, config_lib.public(record)
        return MetricWriters(
            workdir,
            begin,
            num_steps=recipe.num_steps,
            log_every=config.train.log_every,
            batch_size=recipe.batch_size,
            num_levels=config.schedule.num_steps,
            wandb=partial(WeightsAndBiases, workdir, project, config.name, public) if project else None,
        )

    state = loop.run(
        recipe,
        source,
        mesh,
        open_writers,
        workdir,
        record=record,
        check_saved=check_saved,
        initial_params=initial_params,
        on_step=on_step,
        skip_damaged=skip_damaged,
    )
    return state.ema_params


def show_samples(
    workdir: pathlib.Path,
    config: Config,
    process: SamplingProcess,
    mesh: jax.sharding.Mesh,
    evaluator: Evaluator | None,
    writers: MetricWriters,
    step: int,
    ema_params: Any,
    resumed: bool = False,
) -> None:
    """Samples of the moving average, always from the same noise: a grid, and what the evaluator computes, at the steps
    for either. resumed: only what is not there yet.
    """
    train, last = config.train, step == config.train.num_steps
    draws = last or _falls_on(step, train.grid_every)
    evaluates = evaluator is not None and (last or _falls_on(step, train.evaluate_every))
    if not draws and not evaluates:
        return
    pipeline = config_lib.pipeline(config, ema_params, mesh, process)
    grid = workdir / "grids" / f"{step:08d}.png"
    existing = resumed and sharding.broadcast_from_main(grid.exists())
    if draws and not existing:
        picture = images.grid(sampling.draw(pipeline, GRID_IMAGES))
        if sharding.is_main_process():
            images.write_png(cli.writable_folder(grid.parent) / grid.name, picture)
        writers.write_evaluation(step, samples=picture)
    existing = resumed and sharding.broadcast_from_main(step in steps_in(workdir / "evaluations.jsonl"))
    if evaluates and not existing:
        drawn = data.ArraySource(sampling.draw(pipeline, train.evaluate_images))
        numbers = evaluate_samples(evaluator, drawn, train.evaluate_images, "config.train.evaluate_images")
        writers.write_evaluation(step, numbers)


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def load_data(config: Config, mesh: jax.sharding.Mesh) -> data.Source:
    """The training images, which must be what the network takes."""
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, "train")
        source = data.in_memory(source) if config.data.in_memory else source
    expected = config_lib.image_shape(config.model)
    if source.image_shape != expected:
        raise ConfigError(
            f"config.model.image_size and image_channels: the network takes {'x'.join(map(str, expected))}, the images "
            f"of data set {config.data.name!r} are {'x'.join(map(str, source.image_shape))}"
        )
    if config.model.num_classes and source.num_classes != config.model.num_classes:
        raise ConfigError(
            f"config.model.num_classes: is {config.model.num_classes}, data set {config.data.name!r} "
            f"has {source.num_classes}"
        )
    if config.train.batch_size // config.train.accumulate % mesh.size:
        parts = f" in each of {config.train.accumulate} parts" if config.train.accumulate > 1 else ""
        raise ConfigError(
            f"config.train.batch_size: must divide over the {mesh.size} devices{parts}, got {config.train.batch_size}"
        )
    return source


def sampling_arguments(config: Config, workdir: pathlib.Path) -> list[str]:
    """The options with which ddim_jax.sample samples the run. A network that began as config.pretrained is read, as it
    was then, from the checkpoint's own files: the run is now that checkpoint.
    """
    given = [arg for arg in cli.config_arguments() if not arg.startswith("--config.pretrained=")]
    return [*given, f"--config.pretrained={workdir}" if config.pretrained else f"--workdir={workdir}"]


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
