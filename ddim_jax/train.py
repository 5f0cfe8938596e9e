"""Trains a noise predictor.

    python -m ddim_jax.train --config configs/digits.py --workdir DIR [--config.FIELD=VALUE ...]

Writes into the workdir: `checkpoints/`, `config.json`, `metrics.jsonl`, `tensorboard/` and `grids/`. The same
command goes on from the last checkpoint, to the same parameters as a run that was never interrupted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import pathlib
import shlex
import sys
import time
import types
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ddim_jax import cli, data, generate, images, schedule, sharding, train_state, update, weights
from ddim_jax import config as config_lib
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.config import Config, ConfigError, Process, blame
from ddim_jax.train_state import TrainState

GRID_IMAGES = 64
READING_THREADS = 4

OPTIONS = {"workdir": (None, "Folder of the run: made if it is not there, continued if it is.")}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.workdir is None:
        raise ConfigError("--workdir is missing: the folder that the run is written to")
    model = config_lib.network(config.model)
    noise_schedule = config_lib.noise_schedule(config.schedule)
    process = config_lib.process(config.sample, noise_schedule)
    mesh = sharding.data_mesh()
    source = load_data(config, mesh)
    workdir = cli.writable_folder(options.workdir)

    optimizer = update.adam(config.train.learning_rate, config.train.warmup, config.train.clip_norm)
    init_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    init = jax.jit(partial(train_state.init, model, optimizer), out_shardings=sharding.replicated(mesh))
    update_step = jax.jit(
        update.build(
            model,
            optimizer,
            schedule.levels(noise_schedule),
            prediction=config.model.prediction,
            gamma=config.train.gamma,
            ema_decay=config.train.ema_decay,
        ),
        donate_argnums=0,
        out_shardings=sharding.replicated(mesh),
    )

    with only_one(workdir), Checkpoints(workdir, config.train.keep, config.train.keep_every) as checkpoints:
        state = init(init_key)
        latest = checkpoints.latest()
        begin = latest or 0
        if begin:
            checkpoints.check_network(begin, state.params)
            saved = config_lib.parse_saved(checkpoints.config(begin))
            config_lib.check_same(config, saved, config_lib.RESUMED_WITH, f"the run in {workdir}")
            state = checkpoints.restore(begin, jax.tree.map(placed, state))
            print(f"goes on from step {begin} of {workdir}")
        elif latest == 0 or config.pretrained:  # parameters without an optimizer: converted into a run, or published
            found = weights.find(config, str(workdir) if latest == 0 else None, mesh)
            state = state._replace(params=found.params, ema_params=jax.tree.map(jax.numpy.copy, found.params))
            print(f"starts from {found.source}")
        record = dataclasses.asdict(config)
        with images.replacing(workdir / "config.json") as file:
            file.write(json.dumps(record, indent=1).encode())

        in_flight = collections.deque()
        with Log(workdir, begin, config) as log:
            for step, batch in enumerate(training_batches(config, source, mesh, begin), begin + 1):
                state, metrics = update_step(state, batch.images, batch.labels, step_key)
                in_flight.append(metrics)
                if len(in_flight) > sharding.steps_in_flight():
                    jax.block_until_ready(in_flight.popleft())
                log.add(step, metrics)
                last = step == config.train.num_steps
                if last or step % config.train.checkpoint_every == 0:
                    checkpoints.save(state, record)
                if last or (config.train.grid_every and step % config.train.grid_every == 0):
                    write_grid(workdir, step, config, process, state, mesh)
    print(
        f"{config.train.num_steps} steps are done; checkpoints, metrics.jsonl and grids are in {workdir}\n"
        f"sample it: python -m ddim_jax.sample {shlex.join(sys.argv[1:])}"
    )


def training_batches(config: Config, source: data.Source, mesh: jax.sharding.Mesh, begin: int) -> Iterator[data.Batch]:
    """The batches of steps begin + 1 .. num_steps, on the devices; labels only for a network with classes."""
    train = config.train
    plan = data.Plan(source, train.batch_size, train.seed, config.data.flip, jax.process_index(), jax.process_count())
    stream = data.batches(plan, begin, READING_THREADS, config.data.workers)
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
    if config.train.batch_size % mesh.size:
        raise ConfigError(
            f"config.train.batch_size: must divide over the {mesh.size} devices, got {config.train.batch_size}"
        )
    return source


def placed(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@contextlib.contextmanager
def only_one(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir against a second trainer on this machine, which would write over the first one's
    checkpoints.
    """
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is training in {workdir}") from None
        yield


class Log:
    """Progress bar, metrics.jsonl and TensorBoard. Metrics are fetched once every log_every steps, as means over
    them.
    """

    def __init__(self, workdir: pathlib.Path, begin: int, config: Config):
        train = config.train
        self._every, self._batch_size = train.log_every, train.batch_size
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        with images.replacing(self._path) as file:  # what was logged after the checkpoint will be logged again
            file.writelines(f"{line}\n".encode() for line in lines if _step_of(line) <= begin)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=begin + 1)
        self._bar = tqdm(total=train.num_steps, initial=begin, unit="step", desc="training")
        self._pending: list[update.Metrics] = []
        self._since = None

    def add(self, step: int, metrics: update.Metrics) -> None:
        self._pending.append(metrics)
        self._bar.update()
        if self._since is None:  # from the end of the first step, which compiles
            jax.block_until_ready(metrics)
            self._since = time.perf_counter(), step
        if step % self._every == 0:
            means = jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(self._pending))._asdict()
            self._pending.clear()
            now = time.perf_counter()
            begin, first = self._since
            if step > first:
                means["images_per_second"] = (step - first) * self._batch_size / (now - begin)
            self._since = now, step
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in means.items() if name != "grad_norm"})
            if jax.process_index() == 0:
                with open(self._path, "a") as file:
                    file.write(json.dumps({"step": step, **means}) + "\n")
                for name, value in means.items():
                    self._board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # half a line, of a run that was killed while it wrote
        return float("inf")


if __name__ == "__main__":
    cli.start(main, OPTIONS)
