"""Evaluates samples against real images, or a network by the likelihood of real images.

    python -m ddim_jax.evaluate --config configs/digits.py --samples DIR_OR_NPZ [--out FILE.json]
    python -m ddim_jax.evaluate --config configs/cifar10.py --save_reference train.npz
    python -m ddim_jax.evaluate --config configs/cifar10.py --config.evaluate.reference=train.npz --samples DIR_OR_NPZ
    python -m ddim_jax.evaluate --config configs/digits.py --metric bits_per_dim --config.sample.eta=1 [--workdir DIR]

FID, KID, Inception Score, improved precision and recall (config.evaluate.metrics) of the first
config.evaluate.num_images samples, from one pass through the network that config.evaluate.features names. --samples: a
folder of images, an .npz of them, or the output folder of `ddim_jax.sample`. The real images are those of config.data,
or in config.evaluate.reference: a folder, an .npz of images, statistics that --save_reference wrote, or `mu` and
`sigma` of another program.

bits_per_dim is J_sigma, Eq. (11), of the first config.evaluate.num_images real images (all, if there are fewer) of
config.evaluate.reference, or of config.evaluate.split, with the discretised decoder of DDPM: an upper bound of the bits
a value takes under the process of config.sample, whose eta must be above 0.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import json
import os
import pathlib
import types
from typing import Any

import jax

from ddim_jax import cli, data
from ddim_jax import config as config_lib
from ddim_jax.config import Config, evaluation, weights
from ddim_jax.evaluation import likelihood, reference
from ddim_jax.evaluation.evaluator import evaluate_samples
from ddim_jax.registry import lookup
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError, error_context

METRICS = {"bits_per_dim": None}
OPTIONS = {
    "metric": (None, "bits_per_dim: of the network itself. Default: config.evaluate.metrics, of --samples."),
    "workdir": (None, "The run whose latest checkpoint --metric is of."),
    "samples": (None, "A folder of images, an .npz of them, or the output folder of ddim_jax.sample."),
    "save_reference": (None, "Write the statistics of the real images to this .npz, for the next time."),
    "accept": ("", "Fields in which statistics may differ from what belongs to the samples, for example split,crop."),
    "out": (None, "Write the numbers to this file too, as JSON."),
    "overwrite": (False, "Replace --out and --save_reference if they are there."),
}
WRITTEN = ("out", "save_reference")
USED = {  # the options that have an effect beside each of these
    "metric": ("metric", "workdir", "out", "overwrite"),
    "samples": ("samples", "save_reference", "accept", "out", "overwrite"),
    "save_reference": ("save_reference", "overwrite"),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    check(options)
    if options.metric is not None:
        return bits_per_dim(options)
    accepted = evaluation.accepted_fields(options.accept)
    mesh, count = sharding.data_mesh(), config.evaluate.num_images
    samples = None if options.samples is None else evaluation.load_samples(options.samples, config)
    network = evaluation.open_network(config)
    evaluator = evaluation.evaluator(config, network, mesh, samples and samples.image_shape, accepted)
    about = evaluator.reference.about
    if options.save_reference is not None:
        if about is None:
            raise ConfigError(f"--save_reference: {config.evaluate.reference} does not say what it is of")
        if sharding.is_main_process():
            reference.save(pathlib.Path(options.save_reference), evaluator.reference)
            print(options.save_reference)
    if samples is None:
        return
    numbers = evaluate_samples(evaluator, samples, count, "--samples")
    if not sharding.is_main_process():
        return
    for name, value in numbers.items():
        print(f"{name:<22} {value:.6g}")
    if options.out is not None:
        report = {
            "samples": options.samples,
            **numbers,
            "images": count,
            "reference": None if about is None else dataclasses.asdict(about),
            "features": network.name,
            "weights": network.weights,
            "jax": jax.__version__,
        }
        write(options.out, report)


def check(options: types.SimpleNamespace) -> None:
    """ConfigError for an option without effect, and for a file to write that is there, cannot be written, or is also
    read.
    """
    if options.metric is not None:
        with error_context("--metric"):
            lookup(METRICS, options.metric)
    mode = next((name for name in USED if getattr(options, name) is not None), None)
    if mode is None:
        raise ConfigError("--samples is missing: a folder of images, or an .npz of them")
    for name, (default, _) in OPTIONS.items():
        if getattr(options, name) != default and name not in USED[mode]:
            others = " or ".join(f"--{other}" for other in USED if name in USED[other])
            raise ConfigError(f"--{name}: has no effect with --{mode}, it goes with {others}")
    written = {name: path for name in WRITTEN if (path := getattr(options, name)) is not None}
    if options.overwrite and not written:
        raise ConfigError("--overwrite: has no effect without --out or --save_reference")
    evaluate, config = options.config.evaluate, options.config
    paths = written | {
        "samples": options.samples,
        "config.evaluate.reference": evaluate.reference,
        "config.evaluate.weights": evaluate.weights,
        "config.data.path": config.data.path,
    }
    for name, path in written.items():
        with error_context(f"--{name}"):
            files.check_writable(pathlib.Path(path))
        if pathlib.Path(path).exists() and not options.overwrite:
            raise ConfigError(f"--{name}: {path} is already there; give another, or --overwrite")
        for other, there in paths.items():
            if there and other != name and os.path.realpath(there) == os.path.realpath(path):
                raise ConfigError(f"--{name}: {path} is also {other}; give another")


def write(path: str, report: dict[str, Any]) -> None:
    with files.replacing(pathlib.Path(path)) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    print(path)


def bits_per_dim(options: types.SimpleNamespace) -> None:
    """Prints the mean over real images, and its standard error."""
    config = options.config
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    if not config.sample.eta > 0:
        raise ConfigError(f"config.sample.eta: must be above 0 for bits_per_dim, got {config.sample.eta}")
    if config.sample.tau_end:
        raise ConfigError(f"config.sample.tau_end: must be 0 for bits_per_dim, got {config.sample.tau_end}")
    source, where = real_images(config)
    if source.image_shape != config_lib.image_shape(config.model):
        raise ConfigError(
            f"{where}: the network takes {reference.resolution(config_lib.image_shape(config.model))}, the images are "
            f"{reference.resolution(source.image_shape)}"
        )
    mesh = sharding.data_mesh()
    found = weights.find(config, options.workdir, mesh)
    count = min(len(source), config.evaluate.num_images)
    pipeline = config_lib.pipeline(config, found.params, mesh, process)._replace(batch_size=config.evaluate.batch_size)
    bits = likelihood.bits_per_dim(pipeline, source, count, config.sample.eta, where)
    mean, error, steps = float(bits.mean()), float(bits.std() / count**0.5), len(process.tau) - 1
    cli.say(
        f"{count} images ({config.evaluate.reference or config.evaluate.split}), {steps} steps, "
        f"eta {config.sample.eta:g}, {found.source}\n"
        f"{'bits_per_dim':<22} {mean:.6g}\n{'standard error':<22} {error:.2g}"
    )
    if options.out is not None and sharding.is_main_process():
        report = {
            "bits_per_dim": mean,
            "standard_error": error,
            "images": count,
            "of": config.evaluate.reference or [config.data.name, config.data.path, config.evaluate.split],
            "sample": dataclasses.asdict(config.sample) | {"tau": process.tau.tolist()},
            "weights": found.digest,
            "jax": jax.__version__,
        }
        write(options.out, report)


def real_images(config: Config) -> tuple[data.Source, str]:
    """The images of config.evaluate.reference, else of config.data, and the field that they are from. ConfigError where
    there are none.
    """
    evaluate = config.evaluate
    if not evaluate.reference:
        with error_context("config.data"):
            return data.load(config.data.name, config.data.path, evaluate.split), "config.data"
    where, path = "config.evaluate.reference", pathlib.Path(evaluate.reference)
    if path.exists():
        with error_context(where):
            statistics = evaluation.holds_statistics(path)
        if statistics:
            raise ConfigError(f"{where}: bits_per_dim is of images, {path} holds statistics")
    return evaluation.load_images(evaluate.reference, where), where


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
