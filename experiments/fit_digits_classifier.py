"""Fits the judge of the digits, which ships with the package, again.

python -m experiments.fit_digits_classifier --out FILE.safetensors
python -m ddim_jax.evaluate --config configs/digits.py --config.evaluate.weights=FILE.safetensors --samples ...
"""

from __future__ import annotations

import pathlib
import types

import flax.traverse_util
import numpy as np
import safetensors.numpy

from ddim_jax import cli, data, images
from ddim_jax.config import ConfigError
from ddim_jax.evaluation import digits_classifier

OPTIONS = {"out": (None, "The file to write.")}


def main(options: types.SimpleNamespace) -> None:
    if not options.out or pathlib.Path(options.out).exists():
        raise ConfigError(f"--out must name a file that is not there yet, got {options.out}")
    train, held_out = (data.load("digits", split=split) for split in data.SPLITS)
    params = digits_classifier.fit(train)
    logits = digits_classifier.apply(params, held_out.images).logits
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    with images.replacing(pathlib.Path(options.out)) as file:
        file.write(safetensors.numpy.save({name: np.asarray(leaf) for name, leaf in flat.items()}))
    right = float((np.asarray(logits).argmax(1) == held_out.labels).mean())
    print(f"{right:.3f} of {len(held_out)} held-out digits right\n{options.out}")


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
