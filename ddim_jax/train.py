"""Trains a noise predictor.

    python -m ddim_jax.train --config configs/digits.py --workdir DIR [--config.FIELD=VALUE ...]

Writes into the workdir: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`, `grids/`, and
`evaluations.jsonl` where config.train.evaluate_every asks for it. The same command goes on from the last checkpoint, to
the same parameters as a run that was never interrupted.

SIGTERM saves a checkpoint and ends with exit code 75: run me again. With --distributed it is one of several processes,
each started with the same command.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shlex
import signal
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from ddim_jax import cli, data, files, generate, images, schedule, sharding, train_state, update, weights, yardstick
from ddim_jax import config as config_lib
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.config import Config, Process
from ddim_jax.errors import CheckpointError, ConfigError, DamagedError, error_context
from ddim_jax.journal import Log, steps_in
from ddim_jax.memory import check_training
from ddim_jax.train_state import TrainState
from ddim_jax.yardstick import Yardstick

GRID_IMAGES = 64
READING_THREADS = 4
RUN_ME_AGAIN = 75  # what sysexits.h calls a temporary failure

ObjectiveOf = Callable[[Config], update.Objective]

OPTIONS = {
    "workdir": (None, "Folder of the run: made if it is not there, continued if it is."),
    "skip_damaged": (False, "Where the last checkpoint is damaged, set it aside and go on from the one before."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.workdir is None:
        raise ConfigError("--workdir is missing: the folder that the run is written to")
    config_lib.network(config.model)  # that its sizes fit shows before anything is read
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    with error_context("config.mesh"):
        mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    check_training(config, mesh)
    source = load_data(config, mesh)
    workdir = cli.writable_folder(options.workdir)
    yard = quick_yardstick(config, mesh) if config.train.evaluate_every else None
    show = partial(show_samples, workdir, config, process, mesh, yard)
    run(config, noise_prediction, source, workdir, mesh, show, options.skip_damaged)
    cli.say(
        f"{config.train.num_steps} steps are done; checkpoints, metrics.jsonl and grids are in {workdir}\n"
        f"sample it: python -m ddim_jax.sample {shlex.join(arg for arg in sys.argv[1:] if not _is_ours(arg))}"
    )


def run(
    config: Config,
    objective_of: ObjectiveOf,
    source: data.Source,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    show: Callable[..., None] = lambda log, step, ema_params, again=False: None,
    skip_damaged: bool = False,
) -> Any:
    """Trains the network of config.model on a source until config.train.num_steps are done, from where the workdir is,
    and returns the moving average of its parameters. objective_of: what of; see `noise_prediction`. show: told every
    step, and once more where a run goes on.
    """
    with error_context("config.data"):
        fingerprint = data.fingerprint(source)
    with (
        only_one(workdir),
        Preemption() as preemption,
        Checkpoints(workdir, config.train.keep, config.train.keep_every) as checkpoints,
    ):
        optimizer, state, step_key = first_state(config, mesh)
        state, begin = resumed(state, config, workdir, fingerprint, checkpoints, skip_damaged, mesh)
        record = dataclasses.asdict(config)
        if sharding.is_first():
            with files.replacing(workdir / "config.json") as file:
                file.write(json.dumps(record, indent=1).encode())

        in_flight = collections.deque()
        with Log(workdir, begin, config) as log:
            if begin < config.train.num_steps:
                shape = source.image_shape
                update_step, log.flops = compiled_update(config, optimizer, mesh, state, step_key, objective_of, shape)
            if begin:
                show(log, begin, state.ema_params, again=True)
            for step, batch in enumerate(training_batches(config, source, mesh, begin), begin + 1):
                state, metrics = update_step(state, batch.images, batch.labels, step_key)
                in_flight.append((step, metrics))
                log.add(step, metrics)
                last = step == config.train.num_steps
                while len(in_flight) > (0 if last else sharding.steps_in_flight()):
                    check_finite(config, *in_flight.popleft())
                stop = sharding.all_stop(step, preemption.asked)
                if last or stop or step % config.train.checkpoint_every == 0:
                    checkpoints.save(state, record, fingerprint)
                if stop and not last:
                    checkpoints.wait()
                    print(f"\nstopped at step {step}, which is saved; the same command goes on", file=sys.stderr)
                    sys.exit(RUN_ME_AGAIN)
                show(log, step, state.ema_params)
        checkpoints.wait()
    return state.ema_params


def first_state(config: Config, mesh: jax.sharding.Mesh) -> tuple[optax.GradientTransformation, TrainState, jax.Array]:
    """The optimizer, the state before the first update, where the mesh wants it, and the key of all updates."""
    optimizer = update.adam(config.train.learning_rate, config.train.warmup, config.train.clip_norm)
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    init = partial(train_state.init, config_lib.network(config.model), optimizer)
    placement = sharding.fully_sharded(mesh, jax.eval_shape(init, init_key))
    return optimizer, jax.jit(init, out_shardings=placement)(init_key), step_key


def resumed(
    state: TrainState,
    config: Config,
    workdir: pathlib.Path,
    fingerprint: str,
    checkpoints: Checkpoints,
    skip_damaged: bool,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, int]:
    """The state to begin with, and its step: that of the last checkpoint, which must be of the same config and data;
    else the first, with the parameters of config.pretrained where there are any.
    """
    for step in reversed(checkpoints.steps()):
        if step == 0:
            break
        try:
            checkpoints.check_network(step, state.params)
            saved = config_lib.parse_saved(checkpoints.config(step))
            config_lib.check_same(config, saved, config_lib.RESUMED_WITH, f"the run in {workdir}")
            if checkpoints.data(step) not in ("", fingerprint):
                raise ConfigError(f"config.data: the run in {workdir} was trained on other images")
            state = checkpoints.restore(step, jax.tree.map(placed, state))
            cli.say(f"goes on from step {step} of {workdir}")
            return state, step
        except DamagedError as error:
            if not skip_damaged:
                raise CheckpointError(f"{error}; --skip_damaged goes on from the checkpoint before it") from error
            cli.say(f"warning: {error}; it is now {checkpoints.set_aside(step)}")
    latest = checkpoints.latest()
    if latest == 0 or config.pretrained:  # parameters without an optimizer: converted into a run, or published
        found = weights.find(config, str(workdir) if latest == 0 else None, mesh)
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), found.params, state.params)
        state = state._replace(params=params, ema_params=jax.tree.map(jax.numpy.copy, params))
        cli.say(f"starts from {found.source}")
    return state, 0


def noise_prediction(config: Config) -> update.Objective:
    """The objective that the config describes."""
    table = schedule.levels(config_lib.noise_schedule(config.schedule))
    return update.noise_prediction(config_lib.network(config.model), table, config.model.prediction, config.train.gamma)


def update_of(config: Config, optimizer: optax.GradientTransformation, objective_of: ObjectiveOf) -> update.Update:
    """The update that the config describes."""
    return update.build(
        objective_of(config),
        optimizer,
        ema_decay=config.train.ema_decay,
        accumulate=config.train.accumulate,
        real_time=config.train.real_time,
    )


def compiled_update(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    key: jax.Array,
    objective_of: ObjectiveOf = noise_prediction,
    image_shape: tuple[int, int, int] | None = None,
) -> tuple[jax.stages.Compiled, float]:
    """The update, which takes over the memory of its state, and how many floating-point operations one takes as XLA
    counts them; what is computed twice to save memory counts once.
    """
    size, placed_ = config.train.batch_size, sharding.along_batch(mesh)
    images_ = jax.ShapeDtypeStruct((size, *(image_shape or generate.image_shape(config))), np.uint8, sharding=placed_)
    labels = jax.ShapeDtypeStruct((size,), np.int32, sharding=placed_) if config.model.num_classes else None
    where = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)

    def traced(config):
        made = jax.jit(update_of(config, optimizer, objective_of), donate_argnums=0, out_shardings=where)
        return made.trace(state, images_, labels, key)

    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=False),
        train=dataclasses.replace(config.train, accumulate=1),
    )
    program = traced(config)
    counted = program if plain == config else traced(plain)
    # As for a TPU, whose convolutions are convolutions: a CPU's are made of fewer operations.
    cost = counted.lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    return program.lower().compile(), float(cost.get("flops", 0))


def check_finite(config: Config, step: int, metrics: update.Metrics) -> None:
    """Waits for a step. ConfigError if it is the last of too many that were left out."""
    skipped = int(metrics.skipped)
    if skipped >= config.train.max_skipped:
        raise ConfigError(
            f"the loss or its gradient was not finite in {skipped} updates in a row, steps {step - skipped + 1} to "
            f"{step}; none of them was made, and the checkpoints are from before"
        )


class Preemption:
    """Remembers that SIGTERM came, instead of dying of it."""

    asked = False

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: Any) -> None:
        self.asked = True


def training_batches(config: Config, source: data.Source, mesh: jax.sharding.Mesh, begin: int) -> Iterator[data.Batch]:
    """The batches of steps begin + 1 .. num_steps, on the devices; labels only for a network with classes."""
    train = config.train
    plan = data.Plan(source, train.batch_size, train.seed, config.data.flip, jax.process_index(), jax.process_count())
    threads = 0 if source.instant else READING_THREADS
    stream = data.batches(plan, begin, threads, config.data.workers)
    for _ in range(begin, train.num_steps):
        with error_context("config.data"):
            batch = next(stream)
        yield sharding.put_batch(mesh, batch if config.model.num_classes else batch._replace(labels=None))


def quick_yardstick(config: Config, mesh: jax.sharding.Mesh) -> Yardstick:
    """What the samples of config.train.evaluate_every are measured by."""
    return yardstick.build(config, yardstick.open_network(config), mesh, generate.image_shape(config))


def show_samples(
    workdir: pathlib.Path,
    config: Config,
    process: Process,
    mesh: jax.sharding.Mesh,
    yard: Yardstick | None,
    log: Log,
    step: int,
    ema_params: Any,
    again: bool = False,
) -> None:
    """What the moving average draws by now, always from the same noise: a picture, and what config.evaluate measures,
    at the steps for either. again: only what is not there yet.
    """
    train, last = config.train, step == config.train.num_steps
    grid = workdir / "grids" / f"{step:08d}.png"
    if (last or _falls_on(step, train.grid_every)) and not (again and sharding.agreed(grid.exists())):
        picture = images.grid(draw(config, process, ema_params, mesh, GRID_IMAGES))
        if sharding.is_first():
            images.write_png(cli.writable_folder(grid.parent) / grid.name, picture)
        log.show(step, samples=picture)
    there = again and sharding.agreed(step in steps_in(workdir / "evaluations.jsonl"))
    if yard is not None and (last or _falls_on(step, train.evaluate_every)) and not there:
        quick = dataclasses.replace(
            config, evaluate=dataclasses.replace(config.evaluate, num_images=train.evaluate_images)
        )
        drawn = data.ArraySource(draw(config, process, ema_params, mesh, train.evaluate_images))
        log.show(step, yardstick.judge_samples(quick, yard, drawn, mesh, "config.train.evaluate_images"))


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def draw(config: Config, process: Process, params: Any, mesh: jax.sharding.Mesh, count: int) -> np.ndarray:
    """Images 0 .. count - 1, uint8 (count, H, W, C)."""
    sample = dataclasses.replace(config.sample, num_images=count)
    return np.concatenate(list(generate.batches(dataclasses.replace(config, sample=sample), process, params, mesh)))


def load_data(config: Config, mesh: jax.sharding.Mesh) -> data.Source:
    """The training images, which must be what the network takes."""
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, "train")
        source = data.in_memory(source) if config.data.in_memory else source
    expected = generate.image_shape(config)
    if source.image_shape != expected:
        raise ConfigError(
            f"config.model.image_size and image_channels: the network takes {'x'.join(map(str, expected))}, "
            f"the images of "
            f"data set {config.data.name!r} are {'x'.join(map(str, source.image_shape))}"
        )
    if config.model.num_classes and source.num_classes != config.model.num_classes:
        raise ConfigError(
            f"config.model.num_classes: is {config.model.num_classes}, data set {config.data.name!r} "
            f"has {source.num_classes}"
        )
    part = config.train.batch_size // config.train.accumulate
    if part % mesh.size:
        parts = f" in each of {config.train.accumulate} parts" if config.train.accumulate > 1 else ""
        raise ConfigError(
            f"config.train.batch_size: must divide over the {mesh.size} devices{parts}, got {config.train.batch_size}"
        )
    return source


def placed(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@contextlib.contextmanager
def only_one(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir against a second trainer on this machine, which would write over the first one's
    checkpoints.
    """
    if not sharding.is_first():
        yield
        return
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {workdir}") from None
        except OSError as error:  # mounted buckets cannot lock
            print(f"warning: {workdir} cannot be held against a second trainer: {error.strerror}", file=sys.stderr)
        yield


def _is_ours(arg: str) -> bool:
    """Whether it is a switch that sampling does not have."""
    return arg.lstrip("-").removeprefix("no").partition("=")[0] == "skip_damaged"


if __name__ == "__main__":
    cli.start(main, OPTIONS, several=True)
