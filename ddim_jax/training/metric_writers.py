"""Writes the metrics of training to a progress bar, metrics.jsonl, TensorBoard, and optionally Weights & Biases. Only
the main process writes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from tensorboardX import summary as summaries
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tqdm import tqdm

from ddim_jax.training import train_step
from ddim_jax.training.log_file import truncate_after, warn
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError, error_context

FLUSH_SECONDS = 10  # between flushes of the TensorBoard file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors that affect all files, not only that of one writer
# Weights & Biases receives the public part of the config and the numbers. These settings prevent that it also records
# paths, the host name, the command line, the code or the console output.
WANDB_PRIVACY = {
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "console": "off",
    "host": "-",
}


class Writer(Protocol):
    """Writes the numbers and the pictures of a step."""

    def write(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """An event file of TensorBoard, which is created at its first event. This thread writes it: the writer thread of
    tensorboardX never ends if the file cannot be written.
    """

    _file: RecordWriter | None = None
    _flushed = 0.0

    def __init__(self, workdir: pathlib.Path, begin: int):
        self._folder, self._begin = workdir / "tensorboard", begin

    def write(self, step, numbers, pictures):
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            # TensorBoard reads the event files in the order of their names.
            name = f"events.out.tfevents.{time.time():.6f}.{uuid.uuid4().hex[:8]}"
            self._file = RecordWriter(str(self._folder / name))
            # SessionLog.START makes TensorBoard discard the later steps that an earlier process wrote.
            self._event(self._begin + 1, file_version="brain.Event:2")
            self._event(self._begin + 1, session_log=SessionLog(status=SessionLog.START))
        for name, value in numbers.items():
            self._event(step, summary=summaries.scalar(name, value))
        for name, picture in pictures.items():
            layout = "HWC" if picture.ndim == 3 else "HW"
            self._event(step, summary=summaries.image(name, picture, dataformats=layout))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def _event(self, step, **content):
        self._file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def close(self):
        if self._file is not None:
            self._file.close()


class WeightsAndBiases:
    """A run in a project of Weights & Biases. When training resumes, the same run is used."""

    def __init__(self, workdir: pathlib.Path, project: str, name: str, config: Mapping[str, Any]):
        """name: of a new run. config: the public part of the config, see `compatibility.public`."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("config.train.wandb: Weights & Biases: pip install 'ddim-jax[wandb]'") from error
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=project,
                name=files.name_from(name),
                dir=workdir,
                id=wandb_id(workdir),
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(silent=True, **WANDB_PRIVACY),
            )
        except (wandb.errors.Error, ValueError) as error:  # ValueError: an unknown setting
            raise ConfigError(f"config.train.wandb: {error}") from error
        # The step of wandb itself must increase, but steps repeat after a resume.
        self._run.define_metric("*", step_metric="step")

    def write(self, step, numbers, pictures):
        self._run.log({"step": step, **numbers, **{name: self._image(picture) for name, picture in pictures.items()}})

    def close(self):
        self._run.finish()


class MetricWriters:
    """Writes the metrics every log_every steps, as means over the updates that were not skipped. Only then are they
    transferred to the host.

    An update between two lines is also saved with a checkpoint, so that the lines of a resumed run equal those of an
    uninterrupted one.
    """

    flops = 0.0  # floating-point operations of one update

    def __init__(
        self,
        workdir: pathlib.Path,
        begin: int,
        pending: Sequence[Any] = (),
        *,
        num_steps: int,
        log_every: int,
        batch_size: int,
        num_levels: int,
        wandb: Callable[[], Writer] | None = None,
    ):
        """begin: the step that training starts or resumes from.
        pending: the return value of `pending` at that step, in the process that saved it.
        num_steps: the last step.
        log_every: the number of steps between lines.
        batch_size: over all devices.
        num_levels: T of the noise schedule.
        wandb: a function that opens the writer for Weights & Biases. None: no such writer.
        """
        self._log_every, self._batch_size, self._num_levels = log_every, batch_size, num_levels
        self._workdir = workdir
        with error_context(str(workdir)):
            self._pending = [_from_json(metrics) for metrics in pending]
        self._writers: list[Writer] = []
        if sharding.is_main_process():
            with error_context(str(workdir)):
                for name in ("metrics.jsonl", "evaluations.jsonl"):
                    truncate_after(begin, workdir / name)
            self._writers.append(TensorBoard(workdir, begin))
            if wandb is not None:
                self._writers.append(wandb())
        self._bar = tqdm(
            total=num_steps, initial=begin, unit="step", desc="training", disable=not sharding.is_main_process()
        )
        self._since = None

    def add_update(self, step: int, metrics: train_step.Metrics) -> None:
        """Adds the metrics of one update; every log_every steps their means are written."""
        self._pending.append(metrics)
        self._bar.update()
        if self._since is None:  # the time is measured from the end of the first step
            jax.block_until_ready(metrics)
            self._since = time.perf_counter(), step
        if step % self._log_every == 0:
            means = summary(jax.device_get(self._pending), self._num_levels)
            self._pending.clear()
            now = time.perf_counter()
            begin, first = self._since
            if step > first:
                means["images_per_second"] = (step - first) * self._batch_size / (now - begin)
                means["teraflops_per_second"] = (step - first) * self.flops / (now - begin) / 1e12
            self._since = now, step
            displayed = ("loss", "images_per_second")
            self._bar.set_postfix({name: f"{means[name]:.4g}" for name in displayed if means.get(name) is not None})
            self._write("metrics.jsonl", step, means)

    def pending(self) -> list[Any]:
        """The metrics of the updates after the last line, as JSON values."""
        return [_to_json(metrics) for metrics in jax.device_get(self._pending)]

    def write_evaluation(self, step: int, numbers: Mapping[str, float] | None = None, **pictures: np.ndarray) -> None:
        """Writes the numbers of an evaluation of a step, and pictures. The time since the last step is not counted as
        training time.
        """
        if numbers and sharding.is_main_process():
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
        if not sharding.is_main_process():
            return
        if numbers:
            with open(self._workdir / file, "a") as lines:
                lines.write(json.dumps({"step": step, **numbers}) + "\n")
        defined = {name: value for name, value in numbers.items() if value is not None}
        self._for_each_writer(lambda writer: writer.write(step, defined, pictures or {}))

    def _for_each_writer(self, call: Callable[[Writer], None]) -> None:
        """Calls a function with every writer. A writer that fails is removed with a warning: metrics.jsonl has all
        numbers. A full disk is an error.
        """
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                self._writers.remove(writer)
                with contextlib.suppress(Exception):
                    writer.close()
                warn(f"training continues without {type(writer).__name__}: {error}")

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()
        with contextlib.suppress(OSError) if exception[0] else contextlib.nullcontext():  # keep the first error
            self._for_each_writer(lambda writer: writer.close())


def wandb_id(workdir: pathlib.Path) -> str:
    """The id of the run at Weights & Biases: the content of the file WORKDIR/wandb_id, which is created with a new id
    if it does not exist or is invalid.
    """
    path = workdir / "wandb_id"
    with contextlib.suppress(FileNotFoundError, ValueError):
        files.check_regular(path)
        with open(path, "rb") as file:
            name = file.read(200).decode()
        files.check_name(name)
        return name
    with files.replacing(path) as file:
        file.write(uuid.uuid4().hex.encode())
    return wandb_id(workdir)


def _to_json(metrics: train_step.Metrics) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).tolist(), metrics)._asdict()


def _from_json(value: Any) -> train_step.Metrics:
    """The inverse of `_to_json`. ValueError if the value is not of its form."""
    try:
        arrays = {name: np.array(leaf, np.float64) for name, leaf in value.items() if name != "more"}
        more = {name: np.array(leaf, np.float64) for name, leaf in value["more"].items()}
        metrics = train_step.Metrics(**arrays, more=more)
        bins = (metrics.bin_losses, metrics.bin_counts)
        scalars = [*metrics[: train_step.Metrics._fields.index("bin_losses")], *more.values()]
        if any(leaf.shape != (train_step.BINS,) for leaf in bins) or any(leaf.ndim for leaf in scalars):
            raise ValueError("a metric has another shape")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the metrics of the checkpoint cannot be read: {error}") from error
    return metrics


def summary(steps: list[train_step.Metrics], num_levels: int) -> dict[str, float | None]:
    """The means over the updates that were not skipped, None if all were skipped; the number of skipped updates; and
    the mean loss of the images whose t is in each quarter of 1..num_levels, None if there are none.
    """
    applied = [metrics for metrics in steps if metrics.skipped == 0]
    # In float64: the metrics that a checkpoint holds have this type, and the mean of an interrupted run is the same.
    mean = lambda values: float(np.mean(np.array(values, np.float64)))
    names = ("loss", "grad_norm", "ema_distance")
    means = {name: mean([getattr(metrics, name) for metrics in applied]) if applied else None for name in names}
    means["skipped"] = len(steps) - len(applied)
    for name in applied[-1].more if applied else ():
        means[name] = mean([metrics.more[name] for metrics in applied if name in metrics.more])
    for i in range(train_step.BINS):
        first, last = (-(-num_levels * k // train_step.BINS) for k in (i, i + 1))
        count = sum(float(metrics.bin_counts[i]) for metrics in applied)
        total = sum(float(metrics.bin_losses[i]) for metrics in applied)
        means[f"loss_t{first + 1}_to_{last}"] = float(total / count) if count else None
    return means
