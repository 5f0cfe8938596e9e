"""Prepares a data set of the paper: converts the published files to a random-access format for training.

    python -m ddim_jax.prepare --data cifar10 --from FOLDER

cifar10: FOLDER holds cifar-10-binary.tar.gz (www.cs.toronto.edu/~kriz/cifar.html). celeba64: img_align_celeba.zip and
list_eval_partition.txt (mmlab.ie.cuhk.edu.hk/projects/CelebA.html). lsun_bedroom256 and lsun_church256: the folders
bedroom_train_lmdb and bedroom_val_lmdb, or church_outdoor_..., unpacked from their zip files (github.com/fyu/lsun).

The result is written to $TFDS_DATA_DIR, else to ~/tensorflow_datasets. TensorFlow is not required; LSUN requires
`pip install "ddim-jax[lsun]"`.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import pathlib
import types

from ddim_jax import cli, data
from ddim_jax.data import preparing
from ddim_jax.registry import lookup
from ddim_jax.utils.errors import ConfigError, error_context

OPTIONS = {
    "data": (None, f"The data set: {', '.join(preparing.RECIPES)}."),
    "from": (None, "The folder of the published files."),
}


def main(options: types.SimpleNamespace) -> None:
    folder = vars(options)["from"]
    if not options.data or not folder:
        raise ConfigError("--data NAME and --from FOLDER are both required")
    with error_context("--data"):
        lookup(preparing.RECIPES, options.data)
    if not pathlib.Path(folder).is_dir():
        raise ConfigError(f"--from: there is no folder {folder}")
    with error_context("--from"):
        target = preparing.prepare(options.data, pathlib.Path(folder))
    train = data.load(options.data)
    print(f"{len(train):,} training images, {'x'.join(map(str, train.image_shape))}, are in {target}")


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
