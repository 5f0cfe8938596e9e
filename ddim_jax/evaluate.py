"""Evaluates samples against real images, or the likelihood of real images under a network.

    python -m ddim_jax.evaluate --config configs/digits.py --samples DIR_OR_NPZ [--out FILE.json]
    python -m ddim_jax.evaluate --config configs/cifar10.py --save_reference train.npz
    python -m ddim_jax.evaluate --config configs/cifar10.py --config.evaluate.reference=train.npz --samples DIR_OR_NPZ
    python -m ddim_jax.evaluate --config configs/digits.py --metric bits_per_dim --config.sample.eta=1 [--workdir DIR]

With --samples it computes the metrics of config.evaluate.metrics: FID, KID, Inception Score, improved precision and
recall. It evaluates the first config.evaluate.num_images samples, in one pass through the feature network
config.evaluate.features. --samples is a folder of images, an .npz file of images, or the output folder of
`ddim_jax.sample`. The real images are those of config.data, or of config.evaluate.reference: a folder, an .npz file of
images, statistics written by --save_reference, or `mu` and `sigma` of another program.

bits_per_dim is J_sigma, Eq. (11), with the discretised decoder of DDPM: an upper bound of the negative log-likelihood
in bits per dimension, under the process of config.sample, whose eta must be above 0. It is computed for the first
config.evaluate.num_images real images (all, if there are fewer) of config.evaluate.reference, or of the split
config.evaluate.split of config.data.
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

from ddim_jax import cli
from ddim_jax import config as config_lib
from ddim_jax.config import evaluation, weights
from ddim_jax.evaluation import likelihood, reference
from ddim_jax.evaluation.evaluator import evaluate_samples
from ddim_jax.registry import lookup
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError, error_context

METRICS = {"bits_per_dim": None}
OPTIONS = {
    "metric": (None, "bits_per_dim: evaluate the network. Default: compute config.evaluate.metrics of --samples."),
    "workdir": (None, "With --metric: evaluate the latest checkpoint of this run."),
    "samples": (None, "A folder of images, an .npz file of images, or the output folder of ddim_jax.sample."),
    "save_reference": (None, "Write the statistics of the real images to this .npz file, for later evaluations."),
    "accept": ("", "Fields in which the reference statistics may differ from the samples, for example split,crop."),
    "out": (None, "Also write the numbers to this JSON file."),
    "overwrite": (False, "Replace the files of --out and --save_reference if they exist."),
}
WRITTEN = ("out", "save_reference")
USED = {  # mode -> the options that have an effect in it
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
            raise ConfigError(f"--save_reference: {config.evaluate.reference} has no metadata: its origin is unknown")
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
    """ConfigError for an option without effect, and for an output file that exists, cannot be written, or is also an
    input file.
    """
    if options.metric is not None:
        with error_context("--metric"):
            lookup(METRICS, options.metric)
    mode = next((name for name in USED if getattr(options, name) is not None), None)
    if mode is None:
        raise ConfigError("--samples is missing: a folder of images, or an .npz file of images")
    for name, (default, _) in OPTIONS.items():
        if getattr(options, name) != default and name not in USED[mode]:
            others = " or ".join(f"--{other}" for other in USED if name in USED[other])
            raise ConfigError(f"--{name}: has no effect with --{mode}, only with {others}")
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
            raise ConfigError(f"--{name}: {path} already exists; give another path, or --overwrite")
        for other, used in paths.items():
            if used and other != name and os.path.realpath(used) == os.path.realpath(path):
                raise ConfigError(f"--{name}: {path} is also {other}; give another path")


def write(path: str, report: dict[str, Any]) -> None:
    with files.replacing(pathlib.Path(path)) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    print(path)


def bits_per_dim(options: types.SimpleNamespace) -> None:
    """Prints J_sigma, Eq. (11), in bits per dimension: the mean over the real images, and its standard error."""
    config = options.config
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    if not config.sample.eta > 0:
        raise ConfigError(f"config.sample.eta: must be above 0 for bits_per_dim, got {config.sample.eta}")
    if config.sample.tau_end:
        raise ConfigError(f"config.sample.tau_end: must be 0 for bits_per_dim, got {config.sample.tau_end}")
    source, field = evaluation.real_images(config)
    if source.image_shape != config_lib.image_shape(config.model):
        raise ConfigError(
            f"{field}: the network takes {reference.resolution(config_lib.image_shape(config.model))}, the images are "
            f"{reference.resolution(source.image_shape)}"
        )
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    count = min(len(source), config.evaluate.num_images)
    pipeline = config_lib.pipeline(config, trained.params, mesh, process)._replace(
        batch_size=config.evaluate.batch_size
    )
    bits = likelihood.bits_per_dim(pipeline, source, count, config.sample.eta, field)
    mean, error, steps = float(bits.mean()), float(bits.std() / count**0.5), len(process.tau) - 1
    cli.say(
        f"{count} images ({config.evaluate.reference or config.evaluate.split}), {steps} steps, "
        f"eta {config.sample.eta:g}, {trained.source}\n"
        f"{'bits_per_dim':<22} {mean:.6g}\n{'standard error':<22} {error:.2g}"
    )
    if options.out is not None and sharding.is_main_process():
        report = {
            "bits_per_dim": mean,
            "standard_error": error,
            "images": count,
            "of": config.evaluate.reference or [config.data.name, config.data.path, config.evaluate.split],
            "sample": dataclasses.asdict(config.sample) | {"tau": process.tau.tolist()},
            "weights": trained.digest,
            "jax": jax.__version__,
        }
        write(options.out, report)


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
