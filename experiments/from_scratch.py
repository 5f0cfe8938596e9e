"""Training and evaluation by one command: trains a config for a given time, draws samples, and fills table 1.

    python -m experiments.from_scratch --config configs/cifar10.py --config.model.dtype=bfloat16 --minutes 600 --out DIR

The output folder DIR contains speed.json, the time of an update on this machine; run, the workdir; loss.png; and
step-N, N being the last training step, with samples and a table over eta and S. For CIFAR-10 the features are those of
a classifier that is trained first, instead of those of Inception, so that no downloaded weights are needed.

An interrupted command resumes when it is repeated. A repeated command trains for another --minutes; with --minutes=0 it
does not train.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import contextlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np

from ddim_jax import cli
from ddim_jax.config import Config
from ddim_jax.utils import files
from ddim_jax.utils.errors import ConfigError
from experiments import common, fit_classifier

OPTIONS = {
    "minutes": ("60", "The longest training time of this command."),
    "etas": ("0,0.2,0.5,1,hat", "The rows of the table."),
    "steps": ("10,20,50,100", "The columns of the table: values of S."),
    "classifier_steps": ("", "The number of updates of the classifier. Default: STEPS of its module."),
    "out": (None, "The output folder."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    (minutes,) = common.ints("minutes", options.minutes, 0)
    out = cli.writable_folder(options.out)
    given = cli.config_arguments()
    run = out / "run"
    evaluator = evaluator_options(config, out, options.classifier_steps)
    if not (out / "speed.json").exists():
        call("benchmarks.training", *given, f"--out={out / 'speed.json'}")
    speed = read_speed(out / "speed.json")
    if minutes:
        train(given, run, 60 * minutes)
    of_run = [arg for arg in given if not arg.startswith("--config.pretrained=")]
    of_run.append(f"--config.pretrained={run}" if config.pretrained else f"--workdir={run}")
    losses = lines_of(run / "metrics.jsonl")
    common.plot(out / "loss.png", lambda figure: curves(figure, losses))
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    place = cli.writable_folder(out / f"step-{step}")
    call("ddim_jax.sample", *of_run, f"--out={place / 'samples'}")
    table = place / "table1"
    call(
        "experiments.table1_fid",
        *of_run,
        *evaluator,
        f"--etas={options.etas}",
        f"--steps={options.steps}",
        f"--out={table}",
    )
    common.write_text(place / "report.md", report(speed, losses, step, (table / "table.md").read_text()))
    for path in (place / "report.md", out / "loss.png", place / "samples" / "grid.png", table / "table.md"):
        print(path)


def call(module: str, *args: str) -> None:
    """Runs a command. If its exit code is not 0, this process exits with the same code; the command has printed its
    error.
    """
    print(f"\npython -m {module} {' '.join(args)}", flush=True)
    if code := run_child(module, *args):
        sys.exit(code)


def run_child(module: str, *args: str, seconds: float = math.inf) -> int:
    """Runs a command and returns its exit code.

    The command receives SIGTERM after `seconds`, or when this process receives a signal. It then saves its state,
    and this process exits with the code of the signal.
    """
    deadline = time.monotonic() + seconds
    with interrupts.postponed() as signalled:
        process = subprocess.Popen([sys.executable, "-m", module, *args])
        sent = False
        while process.poll() is None:
            if not sent and (signalled() or time.monotonic() > deadline):
                process.send_signal(signal.SIGTERM)
                sent = True
            time.sleep(0.1)
    return process.returncode


def read_speed(path: pathlib.Path) -> dict:
    """The content of a file that benchmarks.training wrote. ConfigError for any other content."""
    try:
        speed = files.read_json(path)
        report(speed, [{"loss": 0.0}], 0, "")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it to measure the speed again") from error
    return speed


def evaluator_options(config: Config, out: pathlib.Path, steps: str) -> list[str]:
    """The options for config.evaluate: none if it names a feature network; instead of Inception, the data set's own
    classifier if there is one, which is trained first.
    """
    if config.evaluate.features != "inception" or config.data.name not in fit_classifier.CLASSIFIERS:
        return []
    module, _ = fit_classifier.CLASSIFIERS[config.data.name]
    weights = out / "classifier.safetensors"
    if not weights.exists():
        more = [f"--steps={steps}"] if steps else []
        call("experiments.fit_classifier", f"--data={config.data.name}", f"--out={weights}", *more)
    return [
        f"--config.evaluate.features={module.__name__}:open_network",
        f"--config.evaluate.weights={weights}",
        "--config.evaluate.metrics=fid,kid,confidence",
    ]


def train(given: list[str], run: pathlib.Path, seconds: float) -> None:
    """Trains for at most this number of seconds. The last step is saved."""
    code = run_child("ddim_jax.train", *given, f"--workdir={run}", seconds=seconds)
    if code not in (0, os.EX_TEMPFAIL):
        sys.exit(code)


def lines_of(path: pathlib.Path) -> list[dict]:
    """The records in a file of JSON lines, without the lines that a full disk or a killed process has damaged."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [values for values in records if isinstance(values, dict) and {"step", "loss"} <= values.keys()]


def curves(figure, losses: list[dict]) -> None:
    """Plots the loss over the steps, for all t and for each quarter of the range of t."""
    axes = figure.subplots()
    for name in [name for name in losses[0] if name.startswith("loss")]:
        points = [(line["step"], line[name]) for line in losses if line.get(name) is not None]
        label = name.replace("loss_t", "t ").replace("_to_", " to ") if name != "loss" else "all t"
        axes.plot(*zip(*points, strict=True), label=label, linewidth=2 if name == "loss" else 0.8)
    axes.set(xlabel="step", ylabel="mean square error of eps", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)


def report(speed: dict, losses: list[dict], step: int, table: str) -> str:
    """The text of report.md: the measured speed, the progress of training, and the table."""
    rates = [line["images_per_second"] for line in losses if line.get("images_per_second")]
    size = speed["config"]["train"]["batch_size"]
    return (
        f"{speed['config']['name']}, {speed['config']['model']['dtype']}, {speed['devices']} x {speed['device']}, jax "
        f"{speed['jax']}\n\n"
        f"- one update of {size} images: {1e3 * speed['seconds_per_step']:.1f} ms, "
        f"{size / speed['seconds_per_step']:.0f} images/s, {speed['tflops']:.2f} TFLOP/s of the model, "
        f"{speed['tflops'] / speed['ceiling_tflops']:.1%} of the {speed['ceiling_tflops']:.2f} of one matrix product\n"
        f"- in training: {np.median(rates or [np.nan]):.0f} images/s (median over the lines of metrics.jsonl)\n"
        f"- trained for {step:,} steps, {step * size:,} images; last loss {losses[-1]['loss']:.4f}\n\n"
        f"{table}"
    )


if __name__ == "__main__":
    common.start(main, OPTIONS)
