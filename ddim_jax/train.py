"""Trains a noise predictor.

    python -m ddim_jax.train --config configs/digits.py --workdir DIR [--config.FIELD=VALUE ...]

Writes into the workdir: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/` and `grids/`. The same
command goes on from the last checkpoint, to the same parameters as a run that was never interrupted.

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
import time
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ddim_jax import cli, data, generate, images, schedule, sharding, train_state, update, weights
from ddim_jax import config as config_lib
from ddim_jax.checkpoint import CheckpointError, Checkpoints, DamagedError
from ddim_jax.config import Config, ConfigError, Process, blame
from ddim_jax.train_state import TrainState

GRID_IMAGES = 64
READING_THREADS = 4
RUN_ME_AGAIN = 75  # what sysexits.h calls a temporary failure

OPTIONS = {
    "workdir": (None, "Folder of the run: made if it is not there, continued if it is."),
    "skip_damaged": (False, "Where the last checkpoint is damaged, set it aside and go on from the one before."),
    "distributed": (False, "This is one of several processes, as the environment says."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.workdir is None:
        raise ConfigError("--workdir is missing: the folder that the run is written to")
    if options.distributed:
        with blame("--distributed"):
            sharding.start_processes()
    model = config_lib.network(config.model)
    noise_schedule = config_lib.noise_schedule(config.schedule)
    process = config_lib.process(config.sample, noise_schedule)
    with blame("config.mesh"):
        mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    source = load_data(config, mesh)
    with blame("config.data"):
        fingerprint = data.fingerprint(source)
    workdir = cli.writable_folder(options.workdir)

    optimizer = update.adam(config.train.learning_rate, config.train.warmup, config.train.clip_norm)
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    init = partial(train_state.init, model, optimizer)
    placement = sharding.fully_sharded(mesh, jax.eval_shape(init, init_key))
    update_step = jax.jit(
        update.build(
            model,
            optimizer,
            schedule.levels(noise_schedule),
            prediction=config.model.prediction,
            gamma=config.train.gamma,
            ema_decay=config.train.ema_decay,
            accumulate=config.train.accumulate,
        ),
        donate_argnums=0,
        out_shardings=(placement, sharding.replicated(mesh)),
    )

    with (
        only_one(workdir),
        Preemption() as preemption,
        Checkpoints(workdir, config.train.keep, config.train.keep_every) as checkpoints,
    ):
        state = jax.jit(init, out_shardings=placement)(init_key)
        state, begin = resumed(state, config, workdir, fingerprint, checkpoints, options.skip_damaged, mesh)
        record = dataclasses.asdict(config)
        if sharding.is_first():
            with images.replacing(workdir / "config.json") as file:
                file.write(json.dumps(record, indent=1).encode())

        in_flight = collections.deque()
        with Log(workdir, begin, config) as log:
            for step, batch in enumerate(training_batches(config, source, mesh, begin), begin + 1):
                if step == begin + 1:  # compiled once, and asked what it costs
                    update_step = update_step.lower(state, batch.images, batch.labels, step_key).compile()
                    log.flops = flops_of(update_step) * mesh.size
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
                if last or (config.train.grid_every and step % config.train.grid_every == 0):
                    write_grid(workdir, step, config, process, state, mesh)
        checkpoints.wait()
    if sharding.is_first():
        print(
            f"{config.train.num_steps} steps are done; checkpoints, metrics.jsonl and grids are in {workdir}\n"
            f"sample it: python -m ddim_jax.sample {shlex.join(arg for arg in sys.argv[1:] if not _is_ours(arg))}"
        )


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
    say = print if sharding.is_first() else lambda *words: None
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
            say(f"goes on from step {step} of {workdir}")
            return state, step
        except DamagedError as error:
            if not skip_damaged:
                raise CheckpointError(f"{error}; --skip_damaged goes on from the checkpoint before it") from error
            say(f"warning: {error}; it is now {checkpoints.set_aside(step)}")
    latest = checkpoints.latest()
    if latest == 0 or config.pretrained:  # parameters without an optimizer: converted into a run, or published
        found = weights.find(config, str(workdir) if latest == 0 else None, mesh)
        params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), found.params, state.params)
        state = state._replace(params=params, ema_params=jax.tree.map(jax.numpy.copy, params))
        say(f"starts from {found.source}")
    return state, 0


def flops_of(compiled: jax.stages.Compiled) -> float:
    """Floating-point operations of one call on one device, as XLA counts them; 0 where it does not."""
    return float((compiled.cost_analysis() or {}).get("flops", 0))


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
        with blame("config.data"):
            batch = next(stream)
        yield sharding.put_batch(mesh, batch if config.model.num_classes else batch._replace(labels=None))


def write_grid(
    workdir: pathlib.Path, step: int, config: Config, process: Process, state: TrainState, mesh: jax.sharding.Mesh
) -> None:
    """What the moving average draws by now, always from the same noise."""
    sample = dataclasses.replace(config.sample, num_images=GRID_IMAGES, batch_size=GRID_IMAGES)
    drawn = next(generate.batches(dataclasses.replace(config, sample=sample), process, state.ema_params, mesh))
    if sharding.is_first():
        images.write_png(cli.writable_folder(workdir / "grids") / f"{step:08d}.png", images.grid(drawn))


def load_data(config: Config, mesh: jax.sharding.Mesh) -> data.Source:
    """The training images, which must be what the network takes."""
    with blame("config.data"):
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
        yield


class Log:
    """Progress bar, metrics.jsonl and TensorBoard. Metrics are fetched once every log_every steps, as means over the
    updates that were made. Only the first process writes.
    """

    flops = 0.0  # of one update

    def __init__(self, workdir: pathlib.Path, begin: int, config: Config):
        train = config.train
        self._every, self._batch_size, self._levels = train.log_every, train.batch_size, config.schedule.num_steps
        self._path, self._board = workdir / "metrics.jsonl", None
        if sharding.is_first():
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            with images.replacing(self._path) as file:  # what was logged after the checkpoint will be logged again
                file.writelines(f"{line}\n".encode() for line in lines if _step_of(line) <= begin)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=begin + 1)
        self._bar = tqdm(
            total=train.num_steps, initial=begin, unit="step", desc="training", disable=not sharding.is_first()
        )
        self._pending: list[update.Metrics] = []
        self._since = None

    def add(self, step: int, metrics: update.Metrics) -> None:
        self._pending.append(metrics)
        self._bar.update()
        if self._since is None:  # from the end of the first step
            jax.block_until_ready(metrics)
            self._since = time.perf_counter(), step
        if step % self._every == 0:
            said = summary(jax.device_get(self._pending), self._levels)
            self._pending.clear()
            now = time.perf_counter()
            begin, first = self._since
            if step > first:
                said["images_per_second"] = (step - first) * self._batch_size / (now - begin)
                said["teraflops_per_second"] = (step - first) * self.flops / (now - begin) / 1e12
            self._since = now, step
            shown = ("loss", "images_per_second")
            self._bar.set_postfix({name: f"{said[name]:.4g}" for name in shown if said.get(name) is not None})
            if self._board is not None:
                with open(self._path, "a") as file:
                    file.write(json.dumps({"step": step, **said}) + "\n")
                for name, value in said.items():
                    if value is not None:
                        self._board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        if self._board is not None:
            with contextlib.suppress(OSError) if exception[0] else contextlib.nullcontext():  # the first word counts
                self._board.close()


def summary(steps: list[update.Metrics], num_levels: int) -> dict[str, float | None]:
    """Means over the updates that were made, None where there was none; how many were not; and the loss of the images
    whose t fell into each part of 1..num_levels.
    """
    made = [metrics for metrics in steps if metrics.skipped == 0]
    mean = lambda name: float(np.mean([getattr(metrics, name) for metrics in made])) if made else None
    said = {name: mean(name) for name in ("loss", "grad_norm", "ema_distance")}
    said["skipped"] = len(steps) - len(made)
    for i in range(update.BINS):
        first, last = (-(-num_levels * k // update.BINS) for k in (i, i + 1))
        count = sum(metrics.bin_counts[i] for metrics in made)
        total = sum(metrics.bin_losses[i] for metrics in made)
        said[f"loss_t{first + 1}_to_{last}"] = float(total / count) if count else None
    return said


def _is_ours(arg: str) -> bool:
    """Whether it is a switch that sampling does not have."""
    return arg.lstrip("-").removeprefix("no").partition("=")[0] in ("skip_damaged", "distributed")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # half a line, of a run that was killed while it wrote
        return float("inf")


if __name__ == "__main__":
    cli.start(main, OPTIONS)
