"""Turns a run's checkpoint into one file of weights.

    python -m ddim_jax.convert --from WORKDIR --to FILE.safetensors

The file holds the moving average of the parameters (or, with --noema, the parameters) and the config.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types

import jax

from ddim_jax import cli, pretrained, train_state
from ddim_jax import config as config_lib
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.config import ConfigError

OPTIONS = {
    "from": (None, "The workdir of a trained run."),
    "to": (None, "The file to write, ending in .safetensors."),
    "ema": (True, "The moving average of the parameters."),
    "overwrite": (False, "Replace the file if it is there."),
}


def main(options: types.SimpleNamespace) -> None:
    workdir, target = vars(options)["from"], options.to
    if not workdir or not target:
        raise ConfigError("--from WORKDIR and --to FILE.safetensors are both needed")
    path = pathlib.Path(target)
    if path.suffix != ".safetensors":
        raise ConfigError(f"--to must end in .safetensors, got {path}")
    if path.exists() and not options.overwrite:
        raise ConfigError(f"{path} is there already; give another --to, or --overwrite to replace it")
    cli.writable_folder(path.parent)
    with Checkpoints(pathlib.Path(workdir)) as checkpoints:
        step = checkpoints.require_latest()
        config = config_lib.parse(checkpoints.config(step))
        model = config_lib.network(config.model)
        like = jax.eval_shape(lambda key: train_state.init_params(model, key), jax.random.key(0))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = checkpoints.restore_params(
            step,
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like),
            options.ema,
        )
    pretrained.save(path, params, dataclasses.asdict(config), step)
    print(f"step {step} of {workdir} is in {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
