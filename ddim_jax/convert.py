"""Writes a trained network in another format.

    python -m ddim_jax.convert --from WORKDIR --to FOLDER                        # for diffusers: DDIMPipeline
    python -m ddim_jax.convert --from WORKDIR --to FILE.safetensors              # one file of our own, with its config
    python -m ddim_jax.convert --from PATH_OR_HUB_ID --to WORKDIR --format orbax # a run to sample or to train further

--from is anything that --config.pretrained takes: a workdir, a diffusers folder or hub id, a ckpt.pth of the
official code, a .safetensors file.
"""

from __future__ import annotations

from ddim_jax import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp

from ddim_jax import cli, pretrained, registry, sharding, weights
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.pretrained import Published
from ddim_jax.train_state import TrainState

OPTIONS = {
    "from": (None, "A workdir, or a published checkpoint: a path or a hub id."),
    "to": (None, "The folder, or the file ending in .safetensors, to write."),
    "format": (None, "diffusers, safetensors or orbax. Default: safetensors for a file of that name, else diffusers."),
    "ema": (True, "The moving average of the parameters, where there are both."),
    "overwrite": (False, "Replace what is there."),
}


def main(options: types.SimpleNamespace) -> None:
    source, target = vars(options)["from"], options.to
    if not source or not target:
        raise ConfigError("--from WORKDIR_OR_CHECKPOINT and --to FOLDER_OR_FILE are both needed")
    to = pathlib.Path(target)
    kind = options.format or ("safetensors" if to.suffix == ".safetensors" else "diffusers")
    with error_context("--format"):
        write = registry.lookup(WRITERS, kind)
    if kind == "safetensors" and to.suffix != ".safetensors":
        raise ConfigError(f"--to must end in .safetensors for --format safetensors, got {to}")
    published = weights.describe(source)
    check_free(to, kind, options.overwrite)
    params = published.read(weights.params_like(published.model, sharding.data_mesh()), options.ema)
    write(to, params, published)
    print(f"{published.source} is in {to} ({kind}), {params_count(params):,} parameters")


def check_free(to: pathlib.Path, kind: str, overwrite: bool) -> None:
    """ConfigError if something is there that would be replaced, or if nothing can be written there."""
    occupied = to.exists() and (to.is_file() or any(to.iterdir()))
    if occupied and kind == "orbax":
        raise ConfigError(f"{to} is there already: a run is never written over; give another --to")
    if occupied and not overwrite:
        raise ConfigError(f"{to} is there already; give another --to, or --overwrite to replace it")
    if to.exists() and (kind == "safetensors") != to.is_file():
        raise ConfigError(f"{to} is a {'file' if to.is_file() else 'folder'}; give another --to")
    cli.writable_folder(to.parent if kind == "safetensors" else to)


def as_config(published: Published) -> dict[str, Any]:
    """The config to save beside the parameters: all of the run's where it was one, else what is known."""
    known = {
        "name": published.name,
        "model": dataclasses.asdict(published.model),
        "schedule": dataclasses.asdict(published.schedule),
        "sample": {**published.config.get("sample", {}), **published.sample},
    }
    return {**published.config, **known}


def write_safetensors(to: pathlib.Path, params: Any, published: Published) -> None:
    pretrained.save(to, params, as_config(published), published.step)


def write_diffusers(to: pathlib.Path, params: Any, published: Published) -> None:
    card = pretrained.model_card(as_config(published), published.step, params_count(params))
    pretrained.save_diffusers(to, params, as_config(published), card)


def write_orbax(to: pathlib.Path, params: Any, published: Published) -> None:
    """Step 0 of a run: the parameters, the same as their moving average, and no optimizer yet."""
    with Checkpoints(to, keep=1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(0), params, params, {}, jnp.int32(0)), as_config(published))


def params_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


WRITERS = {"safetensors": write_safetensors, "diffusers": write_diffusers, "orbax": write_orbax}


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
