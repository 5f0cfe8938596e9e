"""Judges samples beside real images, or a network by the likelihood of real images.

    python -m ddim_jax.evaluate --config configs/digits.py --samples DIR_OR_NPZ [--out FILE.json]
    python -m ddim_jax.evaluate --config configs/cifar10.py --save_reference train.npz
    python -m ddim_jax.evaluate --config configs/cifar10.py --config.evaluate.reference=train.npz --samples DIR_OR_NPZ
    python -m ddim_jax.evaluate --config configs/digits.py --metric bits_per_dim --config.sample.eta=1 [--workdir DIR]

FID, KID, Inception Score, improved precision and recall (config.evaluate.metrics) of the first
config.evaluate.num_images samples, from one pass through the network that config.evaluate.features names. The real
images are those of config.data, or in config.evaluate.reference: a folder, an .npz of images, statistics that
--save_reference wrote, or somebody's `mu` and `sigma`.

bits_per_dim is J_sigma, Eq. (11), of the first config.evaluate.num_images real images (all, if there are fewer) of
config.evaluate.split, with the discretised decoder of DDPM: an upper bound of the bits a value takes under the process
of config.sample, whose eta must be above 0.
"""

from __future__ import annotations

from ddim_jax import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
from tqdm import tqdm

from ddim_jax import cli, data, files, generate, sharding, weights, yardstick
from ddim_jax import config as config_lib
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.evaluation import reference
from ddim_jax.registry import lookup

METRICS = {"bits_per_dim": None}
OPTIONS = {
    "metric": (None, "bits_per_dim: of the network itself. Default: config.evaluate.metrics, of --samples."),
    "workdir": (None, "The run whose latest checkpoint --metric is of."),
    "samples": (None, "A folder of images, or an .npz of them."),
    "save_reference": (None, "Write the statistics of the real images to this .npz, for the next time."),
    "accept": ("", "Fields in which statistics may differ from what belongs to the samples, for example split,crop."),
    "out": (None, "Write the numbers to this file too, as JSON."),
    "overwrite": (False, "Replace --out and --save_reference if they are there."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if options.metric is not None:
        with error_context("--metric"):
            lookup(METRICS, options.metric)
        return bits_per_dim(options)
    if options.samples is None and options.save_reference is None:
        raise ConfigError("--samples is missing: a folder of images, or an .npz of them")
    for name in ("out", "save_reference"):
        path = getattr(options, name)
        if path is not None and pathlib.Path(path).exists() and not options.overwrite:
            raise ConfigError(f"--{name}: {path} is already there; give another, or --overwrite")
        if path is not None and not pathlib.Path(path).absolute().parent.is_dir():
            raise ConfigError(f"--{name}: there is no folder {pathlib.Path(path).parent}")
    accepted = yardstick.accepted_fields(options.accept)
    mesh = sharding.data_mesh()
    samples = None if options.samples is None else yardstick.load_samples(options.samples, config)
    network = yardstick.open_network(config)
    found = yardstick.build(config, network, mesh, samples and samples.image_shape, accepted)
    if options.save_reference is not None:
        if found.reference.about is None:
            raise ConfigError(f"--save_reference: nobody knows what {config.evaluate.reference} is of")
        if sharding.is_first():
            reference.save(pathlib.Path(options.save_reference), found.reference)
            print(options.save_reference)
    if samples is None:
        return
    numbers = yardstick.judge_samples(config, found, samples, mesh, "--samples")
    if not sharding.is_first():
        return
    for name, value in numbers.items():
        print(f"{name:<22} {value:.6g}")
    if options.out is not None:
        report = {
            "samples": options.samples,
            **numbers,
            "images": config.evaluate.num_images,
            "reference": None if found.reference.about is None else dataclasses.asdict(found.reference.about),
            "features": network.name,
            "weights": network.weights,
            "jax": jax.__version__,
        }
        with files.replacing(pathlib.Path(options.out)) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
        print(options.out)


def bits_per_dim(options: types.SimpleNamespace) -> None:
    """Prints the mean over real images, and its standard error."""
    config = options.config
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    if not config.sample.eta > 0:
        raise ConfigError(f"config.sample.eta: must be above 0 for bits_per_dim, got {config.sample.eta}")
    if config.sample.tau_end:
        raise ConfigError(f"config.sample.tau_end: must be 0 for bits_per_dim, got {config.sample.tau_end}")
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, config.evaluate.split)
    if source.image_shape != generate.image_shape(config):
        raise ConfigError(
            f"config.data: the network takes {reference.resolution(generate.image_shape(config))}, the images are "
            f"{reference.resolution(source.image_shape)}"
        )
    mesh = sharding.data_mesh()
    found = weights.find(config, options.workdir, mesh)
    count = min(len(source), config.evaluate.num_images)
    size = -(-min(config.evaluate.batch_size, count) // mesh.size) * mesh.size
    bits = []
    for begin in tqdm(range(0, count, size), "bits_per_dim", unit="batch", disable=not sharding.is_first()):
        index = np.arange(begin, begin + size)
        batch = source[np.minimum(index, count - 1)]
        own = batch.labels if config.model.num_classes else None
        labels = generate.labels_of(config, index) if own is None else own
        nats = generate.bound(config, process, found.params, mesh, batch.images, index, labels)
        bits.append(nats[: count - begin] / (np.log(2) * np.prod(source.image_shape)))
    bits = np.concatenate(bits)
    cli.say(
        f"{count} images ({config.evaluate.split}), {len(process.tau) - 1} steps, eta {config.sample.eta:g}, "
        f"{found.source}\n{'bits_per_dim':<22} {bits.mean():.6g}\n"
        f"{'standard error':<22} {bits.std() / np.sqrt(count):.2g}"
    )


if __name__ == "__main__":
    cli.start(main, OPTIONS, several=True)
