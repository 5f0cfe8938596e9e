"""Trains a noise predictor.

    python -m ddim_jax.train --config configs/digits.py --workdir DIR [--config.FIELD=VALUE ...]

Writes into the workdir: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/`, `grids/`, and
`evaluations.jsonl` where config.train.evaluate_every asks for it. The same command goes on from the last checkpoint, to
the same parameters as a run that was never interrupted.

SIGTERM saves a checkpoint and ends with exit code 75: run me again. Ctrl-C ends after the step, the second one at
once. With --distributed it is one of several processes, each started with the same command.
"""

from __future__ import annotations

from ddim_jax import interrupts

if __name__ == "__main__":
    interrupts.install()

import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import pathlib
import shlex
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddim_jax import (
    cli,
    data,
    files,
    generate,
    images,
    memory,
    sharding,
    train_state,
    weights,
    yardstick,
)
from ddim_jax import config as config_lib
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.config import Config, Process
from ddim_jax.errors import CheckpointError, ConfigError, DamagedError, error_context
from ddim_jax.journal import Log, steps_in
from ddim_jax.train_state import TrainState
from ddim_jax.training import train_step
from ddim_jax.training.objectives import Objective
from ddim_jax.yardstick import Yardstick

GRID_IMAGES = 64
READING_THREADS = 4
RUN_ME_AGAIN = 75  # what sysexits.h calls a temporary failure

ObjectiveOf = Callable[[Config], Objective]

OPTIONS = {
    "workdir": (None, "Folder of the run: made if it is not there, continued if it is."),
    "skip_damaged": (False, "Where the last checkpoint is damaged, set it aside and go on from the one before."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.workdir is None:
        raise ConfigError("--workdir is missing: the folder that the run is written to")
    config_lib.objective(config), config_lib.optimizer(config.train)  # mistakes show before anything is read
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    with error_context("config.mesh"):
        mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    check_memory(config, mesh)
    source = load_data(config, mesh)
    yard = quick_yardstick(config, mesh) if config.train.evaluate_every else None
    workdir = cli.writable_folder(options.workdir)
    show = partial(show_samples, workdir, config, process, mesh, yard)
    run(config, config_lib.objective, source, workdir, mesh, show, options.skip_damaged)
    cli.say(
        f"{config.train.num_steps} steps are done; checkpoints, metrics.jsonl and grids are in {workdir}\n"
        f"sample it: python -m ddim_jax.sample {shlex.join(sampling_arguments(config, workdir))}"
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
    and returns the moving average of its parameters. objective_of: see `config.objective`. show: told every
    step, and once more where a run goes on.
    """
    with error_context("config.data"):
        fingerprint = data.fingerprint(source)
    train = config.train
    with only_one(workdir), Checkpoints(workdir, train.keep, train.keep_every) as checkpoints:
        optimizer, state, step_key = first_state(config, mesh, objective_of(config))
        state, begin = resumed(state, config, workdir, fingerprint, checkpoints, skip_damaged, mesh)
        record = dataclasses.asdict(config)
        if begin < train.num_steps:
            check_disk(config, workdir, state, begin, checkpoints.steps())
            if sharding.is_first():
                with files.replacing(workdir / "config.json") as file:
                    file.write(json.dumps(record, indent=1).encode())

        in_flight = collections.deque()
        with Log(workdir, begin, config) as log:
            if begin < train.num_steps:
                shape = source.image_shape
                update_step, log.flops = compiled_update(config, optimizer, mesh, state, step_key, objective_of, shape)
            if begin:
                show(log, begin, state.ema_params, again=True)
            with interrupts.postponed() as signal_that_came:
                for step, batch in enumerate(training_batches(config, source, mesh, begin), begin + 1):
                    state, metrics = update_step(state, batch.images, batch.labels, step_key)
                    in_flight.append((step, metrics))
                    log.add(step, metrics)
                    last, due = step == train.num_steps, step % train.checkpoint_every == 0
                    stop = sharding.all_stop(step, signal_that_came() == signal.SIGTERM)
                    while len(in_flight) > (0 if last or due or stop else sharding.steps_in_flight()):
                        check_finite(config, *in_flight.popleft())
                    # Not while updates are left out: they would take the place of those from before.
                    if last or stop or (due and not metrics.skipped):
                        check_state(state)
                        checkpoints.save(state, record, fingerprint)
                    if stop and not last:
                        checkpoints.wait()
                        print(f"\nstopped at step {step}, which is saved; the same command goes on", file=sys.stderr)
                        sys.exit(RUN_ME_AGAIN)
                    if signal_that_came() == signal.SIGINT:
                        raise KeyboardInterrupt
                    show(log, step, state.ema_params)
                checkpoints.wait()
    return state.ema_params


def first_state(
    config: Config, mesh: jax.sharding.Mesh, objective: Objective
) -> tuple[optax.GradientTransformation, TrainState, jax.Array]:
    """The optimizer, the state before the first update, where the mesh wants it, and the key of all updates."""
    optimizer = config_lib.optimizer(config.train)
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    network = config_lib.network(config.model)
    init = lambda key: train_state.init(network, optimizer, key, objective.init())
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
            config_lib.check_resumed(config, saved, f"the run in {workdir}")
            if step > config.train.num_steps:
                raise ConfigError(
                    f"config.train.num_steps is {config.train.num_steps}, but {workdir} is at step {step}"
                )
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
        state = state._replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
        cli.say(f"starts from {found.source}")
    return state, 0


def update_of(config: Config, optimizer: optax.GradientTransformation, objective: Objective) -> train_step.Update:
    """The update that the config describes."""
    return train_step.build(
        objective, optimizer, ema_decay=config_lib.ema_decay(config.train), accumulate=config.train.accumulate
    )


def compiled_update(
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    key: jax.Array,
    objective_of: ObjectiveOf = config_lib.objective,
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
        made = jax.jit(update_of(config, optimizer, objective_of(config)), donate_argnums=0, out_shardings=where)
        return made.trace(state, images_, labels, key)

    model = config.model
    plain = dataclasses.replace(
        config,
        model=dataclasses.replace(model, remat=False) if getattr(model, "remat", False) else model,
        train=dataclasses.replace(config.train, accumulate=1),
    )
    program = traced(config)
    counted = program if plain == config else traced(plain)
    # As for a TPU, whose convolutions are convolutions: a CPU's are made of fewer operations.
    cost = counted.lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    return program.lower().compile(), float(cost.get("flops", 0))


def check_finite(config: Config, step: int, metrics: train_step.Metrics) -> None:
    """Waits for a step. ConfigError if the parameters are not finite after it, or if it is the last of too many that
    were left out.
    """
    if not metrics.finite:
        raise ConfigError(
            f"the parameters are not finite after step {step} (config.train.learning_rate is "
            f"{config.train.learning_rate}); the checkpoints are from before"
        )
    skipped = int(metrics.skipped)
    if skipped >= config.train.max_skipped:
        raise ConfigError(
            f"the loss or its gradient was not finite in {skipped} updates in a row, steps {step - skipped + 1} to "
            f"{step}; none of them was made, and the checkpoints are from before"
        )


def check_state(state: TrainState) -> None:
    """CheckpointError if a state is not finite: it must not take the place of a good checkpoint."""
    if not all(np.isfinite(sharding.to_host(leaf)).all() for leaf in jax.tree.leaves(state)):
        raise CheckpointError(
            f"the parameters or the optimizer of step {state.step} are not finite; they are not saved"
        )


def check_memory(config: Config, mesh: jax.sharding.Mesh) -> None:
    """ConfigError if training cannot fit into the memory of a device: a lower bound of what it takes is compared,
    unless the environment variable memory.SWITCH is 1.
    """
    limit = sharding.device_memory()
    if limit is None or memory.is_off():
        return
    model, train = config.model, config.train
    init = partial(train_state.init, config_lib.network(model), config_lib.optimizer(config.train))
    shapes = jax.eval_shape(init, jax.random.key(0))
    placed_ = sharding.fully_sharded(mesh, (shapes, shapes.params))  # the second is the gradient
    kept = sharding.bytes_on_a_device(placed_, (shapes, shapes.params))
    images_ = -(-train.batch_size // (train.accumulate * mesh.size))
    # Of a pixel: x_0, eps and x_t; of a position: what the way up of a U-Net is joined with.
    kept_layers = getattr(model, "num_res_blocks", 0) + 1
    batch = images_ * (
        model.image_size**2 * 3 * 4 * model.image_channels + kept_layers * memory.first_layer_bytes(model)
    )
    if kept + batch > limit:
        raise ConfigError(
            f"config.model and config.train.batch_size: training takes at least {files.human_size(kept)} of memory for "
            f"parameters, optimizer and gradient and {files.human_size(batch)} for {images_} images, a device has "
            f"{files.human_size(limit)}; {memory.SWITCH}=1 tries it"
        )


def check_disk(config: Config, workdir: pathlib.Path, state: TrainState, begin: int, there: list[int]) -> None:
    """ConfigError if the checkpoints to come, beside those of the steps that are there, do not fit on the disk."""
    train = config.train
    count = checkpoints_to_come(train, begin, there)
    needed = count * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if not sharding.agreed(needed <= free):
        raise ConfigError(
            f"config.train.keep is {train.keep} and keep_every {train.keep_every}: {count} checkpoints more need "
            f"{files.human_size(needed)} on the disk of {workdir}, which has {files.human_size(free)} left"
        )


def checkpoints_to_come(train: config_lib.TrainConfig, begin: int, there: list[int]) -> int:
    """How many more checkpoints there are at most at a time, the one being written among them, from the step `begin` to
    the end. there: the steps that have one, ascending. It is when the last one is written: then there are the latest
    keep + 1 and, of those before, the multiples of keep_every.
    """
    every, window = train.checkpoint_every, train.keep + 1
    saves = -(-train.num_steps // every) - begin // every
    before = there[: max(0, len(there) - max(0, window - saves))]
    for_ever = 0
    if train.keep_every:
        for_ever = sum(step % train.keep_every == 0 for step in before)
        oldest = (-(-train.num_steps // every) - train.keep) * every  # of the latest keep + 1, if all of them are new
        both = math.lcm(every, train.keep_every)
        for_ever += max(0, (oldest - 1) // both - begin // both)
    return max(1, min(window, len(there) + saves) + for_ever - len(there))


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


def sampling_arguments(config: Config, workdir: pathlib.Path) -> list[str]:
    """The options with which ddim_jax.sample samples the run. A network that began as config.pretrained is read, as it
    was then, from the checkpoint's own files: the run is now that checkpoint.
    """
    given = [arg for arg in cli.config_arguments() if not arg.startswith("--config.pretrained=")]
    return [*given, f"--config.pretrained={workdir}" if config.pretrained else f"--workdir={workdir}"]


if __name__ == "__main__":
    cli.start(main, OPTIONS, several=True)
