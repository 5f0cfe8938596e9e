"""The training loop of a recipe, with checkpoints. A resumed run has the same parameters as an uninterrupted one."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddim_jax import data
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.training import train_state, train_step
from ddim_jax.training.recipe import Recipe
from ddim_jax.training.train_state import TrainState
from ddim_jax.training.workdir import check_disk, locked
from ddim_jax.utils import files, interrupts, sharding
from ddim_jax.utils.errors import CheckpointError, ConfigError, DamagedError, error_context

READING_THREADS = 4  # threads that read and decode images


class Writers(Protocol):
    """Receives the metrics of every update; see `metric_writers.MetricWriters`."""

    flops: float  # floating-point operations of one update

    def add_update(self, step: int, metrics: train_step.Metrics) -> None: ...

    def pending(self) -> list[Any]: ...  # JSON values: what a process that resumes here needs for its next line

    def __enter__(self) -> Writers: ...

    def __exit__(self, *exception) -> None: ...


OnStep = Callable[..., None]  # (writers, step, ema_params, resumed=False)


def run(
    recipe: Recipe,
    source: data.Source,
    mesh: Mesh,
    open_writers: Callable[[int, list[Any]], Writers],
    workdir: pathlib.Path | None = None,
    *,
    record: Mapping[str, Any] | None = None,
    check_saved: Callable[[Mapping[str, Any]], None] = lambda saved: None,
    initial_params: Callable[[bool], tuple[Any, str] | None] = lambda converted: None,
    on_step: OnStep = lambda writers, step, ema_params, resumed=False: None,
    skip_damaged: bool = False,
) -> TrainState:
    """Trains for recipe.num_steps updates in total, resuming from the last checkpoint, and returns the last state.

    source: the training data; its examples have the shape of the network.
    open_writers: a function (the step that training starts or resumes from, the `pending` metrics that were saved with
        that step) -> Writers.
    workdir: the folder to which checkpoints are written. None: no checkpoints.
    record: a JSON object that is saved with each checkpoint.
    check_saved: called with the record of a checkpoint. It raises ConfigError or CheckpointError if training must not
        resume from it.
    initial_params: a function (whether the workdir holds parameters without an optimizer state) -> (the initial
        parameters, their source for messages), or None for random initialization.
    on_step: called after every update, and once when training resumes.
    skip_damaged: if the last checkpoint is damaged, move it to WORKDIR/damaged and resume from the previous one.

    If `interrupts.install` was called, SIGTERM saves a checkpoint and ends the process with exit code os.EX_TEMPFAIL,
    and Ctrl-C raises KeyboardInterrupt after the current update. ConfigError if the parameters are not finite, if
    recipe.max_skipped consecutive updates are skipped, if the checkpoints do not fit on the disk, or if another process
    trains in the workdir; CheckpointError or DamagedError if a checkpoint cannot be used.
    """
    with contextlib.ExitStack() as stack:
        checkpoints, fingerprint, begin, pending = None, "", 0, []
        if workdir is not None:
            with error_context("config.data"):
                fingerprint = data.fingerprint(source)
            stack.enter_context(locked(workdir))
            checkpoints = stack.enter_context(Checkpoints(workdir, recipe.keep, recipe.keep_every))
        state, step_key = first_state(recipe, mesh)
        if checkpoints is not None:
            restored = _restore(state, recipe, workdir, fingerprint, checkpoints, check_saved, skip_damaged)
            state, begin = restored or (state, 0)
            pending = checkpoints.metrics(begin) if begin else []
        if not begin and (initial := initial_params(checkpoints is not None and checkpoints.latest() == 0)):
            params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), initial[0], state.params)
            state = state._replace(params=params, ema_params=jax.tree.map(jnp.copy, params))
            say(f"starts from {initial[1]}")
        if checkpoints is not None and begin < recipe.num_steps:
            check_disk(recipe, workdir, state, begin, checkpoints.steps())
        with open_writers(begin, pending) as writers:
            if begin < recipe.num_steps:
                example = source[np.arange(1)].images
                update, writers.flops = compiled_update(recipe, mesh, state, step_key, example.shape[1:], example.dtype)
            if begin:
                on_step(writers, begin, state.ema_params, resumed=True)

            def save(state: TrainState) -> None:
                checkpoints.save(state, dict(record), fingerprint, writers.pending())

            with interrupts.postponed() as pending_signal:
                in_flight = collections.deque()
                for step, batch in enumerate(training_batches(recipe, source, mesh, begin), begin + 1):
                    state, metrics = update(state, batch.images, batch.labels, step_key)
                    in_flight.append((step, metrics))
                    writers.add_update(step, metrics)
                    last, due = step == recipe.num_steps, step % recipe.checkpoint_every == 0
                    stop = sharding.should_stop(step, pending_signal() == signal.SIGTERM)
                    while len(in_flight) > (0 if last or due or stop else sharding.steps_in_flight()):
                        check_finite(recipe, *in_flight.popleft())
                    # No checkpoint while updates are skipped: it would replace an earlier checkpoint.
                    if checkpoints is not None and (last or stop or (due and not metrics.skipped)):
                        check_state(state)
                        save(state)
                    if checkpoints is not None and stop and not last:
                        checkpoints.wait()
                        print(
                            f"\nstopped at step {step}, which is saved; run the same command to resume", file=sys.stderr
                        )
                        sys.exit(os.EX_TEMPFAIL)
                    if pending_signal() == signal.SIGINT:
                        raise KeyboardInterrupt
                    on_step(writers, step, state.ema_params)
                if checkpoints is not None:
                    checkpoints.wait()
    return state


def say(text: str) -> None:
    """Prints the text in the main process. Control characters, which may come from files, are escaped."""
    if sharding.is_main_process():
        print(files.printable(text), flush=True)


def first_state(recipe: Recipe, mesh: Mesh) -> tuple[TrainState, jax.Array]:
    """The initial state, sharded over the mesh, and the PRNG key of the updates."""
    init_key, step_key = jax.random.split(jax.random.key(recipe.seed))
    init = lambda key: train_state.init(recipe.network, recipe.optimizer, key, recipe.objective.init())
    placement = sharding.fully_sharded(mesh, jax.eval_shape(init, init_key))
    return jax.jit(init, out_shardings=placement)(init_key), step_key


def _restore(
    state: TrainState,
    recipe: Recipe,
    workdir: pathlib.Path,
    fingerprint: str,
    checkpoints: Checkpoints,
    check_saved: Callable[[Mapping[str, Any]], None],
    skip_damaged: bool,
) -> tuple[TrainState, int] | None:
    """The state of the last checkpoint and its step. None if no checkpoint has an optimizer state. ConfigError or
    CheckpointError if the checkpoint belongs to another config or data set. state: a state of the same structure.
    """
    for step in reversed(checkpoints.steps()):
        if step == 0:
            break
        try:
            checkpoints.check_network(step, state.params)
            check_saved(checkpoints.config(step))
            if step > recipe.num_steps:
                raise ConfigError(f"config.train.num_steps is {recipe.num_steps}, but {workdir} is at step {step}")
            if checkpoints.data(step) not in ("", fingerprint):
                raise ConfigError(f"config.data: the run in {workdir} was trained on other images")
            state = checkpoints.restore(step, jax.tree.map(_shape_and_sharding, state))
            say(f"resumes from step {step} of {workdir}")
            return state, step
        except DamagedError as error:
            if not skip_damaged:
                raise CheckpointError(f"{error}; --skip_damaged resumes from the previous checkpoint") from error
            say(f"warning: {error}; it was moved to {checkpoints.set_aside(step)}")
    return None


def _shape_and_sharding(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def update_of(recipe: Recipe) -> train_step.Update:
    """The update function of a recipe; the caller jits it."""
    return train_step.build(
        recipe.objective, recipe.optimizer, ema_decay=recipe.ema_decay, accumulate=recipe.accumulate
    )


def compiled_update(
    recipe: Recipe,
    mesh: Mesh,
    state: TrainState,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any = np.uint8,
) -> tuple[jax.stages.Compiled, float]:
    """The compiled update, and the number of floating-point operations of one update by XLA's cost analysis. The update
    donates the memory of its state. Rematerialised operations count once. shape, dtype: of one example.
    """
    program, flops = traced_update(recipe, mesh, state, key, shape, dtype)
    return program.lower().compile(), flops


def traced_update(
    recipe: Recipe,
    mesh: Mesh,
    state: TrainState,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: Any = np.uint8,
) -> tuple[jax.stages.Traced, float]:
    """The traced update of a recipe, and the number of floating-point operations of one update, see `compiled_update`.

    state, key: arrays, or their shapes with shardings. shape, dtype: of one example.
    """
    along = sharding.along_batch(mesh)
    examples = jax.ShapeDtypeStruct((recipe.batch_size, *shape), dtype, sharding=along)
    labels = None
    if recipe.network.num_classes:
        labels = jax.ShapeDtypeStruct((recipe.batch_size,), np.int32, sharding=along)
    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)

    def trace(recipe):
        jitted = jax.jit(update_of(recipe), donate_argnums=0, out_shardings=out_shardings)
        return jitted.trace(state, examples, labels, key)

    program = trace(recipe)
    plain = recipe._replace(objective=recipe.counted or recipe.objective, accumulate=1)
    counted = program if recipe.counted is None and recipe.accumulate == 1 else trace(plain)
    # Lowered for a TPU, where a convolution is one operation. The CPU formulation of it has fewer operations.
    cost = counted.lower(lowering_platforms=("tpu",)).cost_analysis() or {}
    return program, float(cost.get("flops", 0))


def training_batches(recipe: Recipe, source: data.Source, mesh: Mesh, begin: int) -> Iterator[data.Batch]:
    """The batches of the steps begin + 1 .. num_steps, on the devices. They have labels only for a class-conditional
    network.
    """
    plan = data.Plan(source, recipe.batch_size, recipe.seed, recipe.flip, jax.process_index(), jax.process_count())
    stream = data.batches(plan, begin, 0 if source.instant else READING_THREADS, recipe.workers)
    for _ in range(begin, recipe.num_steps):
        with error_context("config.data"):
            batch = next(stream)
        yield sharding.put_batch(mesh, batch if recipe.network.num_classes else batch._replace(labels=None))


def check_finite(recipe: Recipe, step: int, metrics: train_step.Metrics) -> None:
    """Waits for a step. ConfigError if the parameters are not finite after it, or if recipe.max_skipped consecutive
    updates were skipped.
    """
    if not metrics.finite:
        raise ConfigError(
            f"the parameters are not finite after step {step}: the learning_rate may be too large; the checkpoints are "
            f"from before that step"
        )
    skipped = int(metrics.skipped)
    if skipped >= recipe.max_skipped:
        raise ConfigError(
            f"the loss or its gradient was not finite in {skipped} consecutive updates, steps {step - skipped + 1} to "
            f"{step}; these updates were skipped, and the checkpoints are from before these steps"
        )


def check_state(state: TrainState) -> None:
    """CheckpointError if a state is not finite: it must not replace a valid checkpoint."""
    if not all(np.isfinite(sharding.to_host(leaf)).all() for leaf in jax.tree.leaves(state)):
        raise CheckpointError(
            f"the parameters or the optimizer state of step {state.step} are not finite; they are not saved"
        )
