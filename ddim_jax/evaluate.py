"""Judges samples beside real images.

    python -m ddim_jax.evaluate --config configs/digits.py --samples DIR_OR_NPZ [--out FILE.json]
    python -m ddim_jax.evaluate --config configs/cifar10.py --save_reference train.npz
    python -m ddim_jax.evaluate --config configs/cifar10.py --config.evaluate.reference=train.npz --samples DIR_OR_NPZ

FID, KID, Inception Score, improved precision and recall (config.evaluate.metrics) of the first
config.evaluate.num_images samples, from one pass through the network that config.evaluate.features names. The real
images are those of config.data, or in config.evaluate.reference: a folder, an .npz of images, statistics that
--save_reference wrote, or somebody's `mu` and `sigma`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types

import jax

from ddim_jax import cli, images, sharding, yardstick
from ddim_jax.config import ConfigError
from ddim_jax.evaluation import reference

OPTIONS = {
    "samples": (None, "A folder of images, or an .npz of them."),
    "save_reference": (None, "Write the statistics of the real images to this .npz, for the next time."),
    "accept": ("", "Fields in which statistics may differ from what belongs to the samples, for example split,crop."),
    "out": (None, "Write the numbers to this file too, as JSON."),
    "overwrite": (False, "Replace --out and --save_reference if they are there."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
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
        with images.replacing(pathlib.Path(options.out)) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())
        print(options.out)


if __name__ == "__main__":
    cli.start(main, OPTIONS, several=True)
