"""Trains a classifier on real images. Its features are used to compute distances between sets of images.

python -m experiments.fit_classifier --data digits --out FILE.safetensors     # the shipped one
python -m experiments.fit_classifier --data cifar10 --out FILE.safetensors
python -m ddim_jax.evaluate --config ... --config.evaluate.weights=FILE.safetensors --samples ...
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import pathlib
import types

from ddim_jax import cli, data
from ddim_jax.evaluation import classifier, digits_classifier
from ddim_jax.registry import lookup
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import cifar10_classifier, common

CLASSIFIERS = {"digits": (digits_classifier, False), "cifar10": (cifar10_classifier, True)}  # (module, random flips)
OPTIONS = {
    "data": ("digits", "digits or cifar10."),
    "steps": ("", "The number of updates. Default: STEPS of the classifier's module."),
    "out": (None, "The file to write, .safetensors."),
}


def main(options: types.SimpleNamespace) -> None:
    with error_context("--data"):
        module, flip = lookup(CLASSIFIERS, options.data)
    (steps,) = common.ints("steps", options.steps or str(module.STEPS))
    if not options.out or pathlib.Path(options.out).exists():
        raise ConfigError(f"--out: must be a file that does not exist yet, got {options.out}")
    with error_context("--data"):
        train, held_out = (data.in_memory(data.load(options.data, split=split)) for split in data.SPLITS)
    model = module.Classifier()
    params = classifier.fit(model, train, steps, flip=flip)
    classifier.write(pathlib.Path(options.out), params)
    accuracy = classifier.accuracy(model, params, held_out)
    print(f"accuracy {accuracy:.3f} on {len(held_out)} held-out images\n{options.out}")


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
