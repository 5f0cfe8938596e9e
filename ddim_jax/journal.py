"""What training says of itself: a progress bar, metrics.jsonl, TensorBoard, and Weights & Biases where it is asked for.
Only the first process writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
import uuid
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ddim_jax import files, sharding, update
from ddim_jax.config import Config
from ddim_jax.errors import ConfigError


class Writer(Protocol):
    """Where numbers and pictures of a step go."""

    def write(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, workdir: pathlib.Path, begin: int):
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=begin + 1)

    def write(self, step, numbers, pictures):
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self._board.add_image(name, picture, step, dataformats="HWC" if picture.ndim == 3 else "HW")

    def close(self):
        self._board.close()


class WeightsAndBiases:
    """A run of a project of Weights & Biases; continued, the same run."""

    def __init__(self, workdir: pathlib.Path, project: str, config: Config):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("config.train.wandb: Weights & Biases: pip install 'ddim-jax[wandb]'") from error
        known = workdir / "wandb_id"
        if not known.exists():
            with files.replacing(known) as file:
                file.write(uuid.uuid4().hex.encode())
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                dir=workdir,
                id=known.read_text(),
                resume="allow",
                config=dataclasses.asdict(config),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(f"config.train.wandb: {error}") from error
        self._run.define_metric("*", step_metric="step")  # a step that is done again is not later than the last

    def write(self, step, numbers, pictures):
        self._run.log({"step": step, **numbers, **{name: self._image(picture) for name, picture in pictures.items()}})

    def close(self):
        self._run.finish()


class Log:
    """Metrics are fetched once every log_every steps, as means over the updates that were made."""

    flops = 0.0  # of one update

    def __init__(self, workdir: pathlib.Path, begin: int, config: Config):
        """begin: the step that the run goes on from."""
        train = config.train
        self._every, self._batch_size, self._levels = train.log_every, train.batch_size, config.schedule.num_steps
        self._workdir = workdir
        self._writers: list[Writer] = []
        if sharding.is_first():
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                keep_until(begin, workdir / name)
            self._writers.append(TensorBoard(workdir, begin))
            if train.wandb:
                self._writers.append(WeightsAndBiases(workdir, train.wandb, config))
        self._bar = tqdm(
            total=train.num_steps, initial=begin, unit="step", desc="training", disable=not sharding.is_first()
        )
        self._pending: list[update.Metrics] = []
        self._since = None

    def add(self, step: int, metrics: update.Metrics) -> None:
        """What an update measured."""
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
            self._write("metrics.jsonl", step, said)

    def show(self, step: int, numbers: Mapping[str, float] | None = None, **pictures: np.ndarray) -> None:
        """What else is known of a step: the numbers of an evaluation, pictures. The time since the last step does not
        count as training.
        """
        if numbers and self._writers:
            self._bar.write(f"step {step}: " + ", ".join(f"{name} {value:.5g}" for name, value in numbers.items()))
        self._write("evaluations.jsonl", step, numbers or {}, pictures)
        if self._since is not None:
            self._since = time.perf_counter(), step

    def _write(
        self,
        file: str,
        step: int,
        numbers: Mapping[str, float | None],
        pictures: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if numbers and self._writers:
            with open(self._workdir / file, "a") as lines:
                lines.write(json.dumps({"step": step, **numbers}) + "\n")
        known = {name: value for name, value in numbers.items() if value is not None}
        for writer in self._writers:
            writer.write(step, known, pictures or {})

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        for writer in self._writers:
            with contextlib.suppress(OSError) if exception[0] else contextlib.nullcontext():  # the first word counts
                writer.close()


def keep_until(step: int, file: pathlib.Path) -> None:
    """Removes lines of later steps, which will be written again."""
    if file.exists():
        lines = file.read_text().splitlines()
        with files.replacing(file) as kept:
            kept.writelines(f"{line}\n".encode() for line in lines if _step_of(line) <= step)


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


def steps_in(file: pathlib.Path) -> set[float]:
    """The steps that a file has lines of."""
    return {_step_of(line) for line in file.read_text().splitlines()} if file.exists() else set()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):  # half a line, of a run that was killed while it wrote
        return float("inf")
