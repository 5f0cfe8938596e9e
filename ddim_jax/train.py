"""Trains a diffusion model.

    python -m ddim_jax.train --config configs/digits.py --workdir DIR [--config.FIELD=VALUE ...]

Writes `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/` and `grids/` to the workdir, and also
`evaluations.jsonl` if config.train.evaluate_every is above 0. The same command resumes from the last checkpoint. The
parameters are then equal to those of an uninterrupted run.

SIGTERM saves a checkpoint and ends the process with exit code 75; the same command resumes the run. The first Ctrl-C
ends the process after the current step, the second one ends it immediately. With --distributed the run
consists of several processes; start each of them with the same command.
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
    "workdir": (None, "Folder of the run. It is created if it does not exist; otherwise the run resumes."),
    "skip_damaged": (
        False,
        "If the last checkpoint is damaged, move it to WORKDIR/damaged and resume from the one before.",
    ),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.workdir is None:
        raise ConfigError("--workdir is missing: the folder that the run is written to")
    recipe = config_lib.recipe(config)  # first, so that a config error appears before any data is read
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    with error_context("config.mesh"):
        mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    memory.check_training(recipe.network, recipe.optimizer, mesh, recipe.batch_size, recipe.accumulate)
    source = config_lib.training_data(config, mesh)
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
    """Runs the training loop of a config, from the last checkpoint of the workdir, and returns the EMA parameters.

    recipe: of the config, see `config.recipe`. source: the training images. on_step, skip_damaged: see `loop.run`.
    """
    record = dataclasses.asdict(config)

    def check_saved(saved: Mapping[str, Any]) -> None:
        config_lib.check_resumed(config, config_lib.parse_saved(saved), f"the run in {workdir}")

    def initial_params(converted: bool) -> tuple[Any, str] | None:
        if not converted and not config.pretrained:
            return None
        pretrained = weights.find(config, str(workdir) if converted else None, mesh)
        return pretrained.params, pretrained.source

    def open_writers(begin: int, pending: list[Any]) -> MetricWriters:
        if begin < recipe.num_steps and sharding.is_main_process():
            with files.replacing(workdir / "config.json") as file:
                file.write(json.dumps(record, indent=1).encode())
        project, public = config.train.wandb, config_lib.public(record)
        return MetricWriters(
            workdir,
            begin,
            pending,
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
    """Samples with the EMA parameters, always from the same initial noise. Writes a grid of samples every grid_every
    steps and the metrics of the evaluator every evaluate_every steps, and both at the last step.

    evaluator: None for no evaluation. resumed: True where training resumes at this step; then only results that do not
    exist yet are computed.
    """
    train, last = config.train, step == config.train.num_steps
    draws_grid = last or _is_multiple(step, train.grid_every)
    evaluates = evaluator is not None and (last or _is_multiple(step, train.evaluate_every))
    if not draws_grid and not evaluates:
        return
    pipeline = config_lib.pipeline(config, ema_params, mesh, process)
    grid = workdir / "grids" / f"{step:08d}.png"
    exists = resumed and sharding.broadcast_from_main(grid.exists())
    if draws_grid and not exists:
        picture = images.grid(sampling.draw(pipeline, GRID_IMAGES))
        if sharding.is_main_process():
            images.write_png(cli.writable_folder(grid.parent) / grid.name, picture)
        writers.write_evaluation(step, samples=picture)
    exists = resumed and sharding.broadcast_from_main(step in steps_in(workdir / "evaluations.jsonl"))
    if evaluates and not exists:
        samples = data.ArraySource(sampling.draw(pipeline, train.evaluate_images))
        numbers = evaluate_samples(evaluator, samples, train.evaluate_images, "config.train.evaluate_images")
        writers.write_evaluation(step, numbers)


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def sampling_arguments(config: Config, workdir: pathlib.Path) -> list[str]:
    """The options with which ddim_jax.sample samples this run. For a run that started from config.pretrained, they set
    config.pretrained to the workdir: the network is then read from the run's checkpoint.
    """
    arguments = [arg for arg in cli.config_arguments() if not arg.startswith("--config.pretrained=")]
    return [*arguments, f"--config.pretrained={workdir}" if config.pretrained else f"--workdir={workdir}"]


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
