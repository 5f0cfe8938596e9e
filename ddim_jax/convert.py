"""Writes a trained network in another format.

    python -m ddim_jax.convert --from WORKDIR --to FOLDER                        # for diffusers: DDIMPipeline
    python -m ddim_jax.convert --from WORKDIR --to FILE.safetensors              # one file of our own, with its config
    python -m ddim_jax.convert --from PATH_OR_HUB_ID --to WORKDIR --format orbax # a run to sample or to train further

--from is anything that --config.pretrained takes: a workdir, a diffusers folder or hub id, a ckpt.pth of the
official code, a .safetensors file. What is written says how the network is used and how it was trained, but neither
where its data lie nor other paths and names of accounts, unless --paths is given.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ddim_jax import checkpoints, cli, registry
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, model_card
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.config import weights
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError, error_context

OPTIONS = {
    "from": (None, "A workdir, or a published checkpoint: a path or a hub id."),
    "to": (None, "The folder, or the file ending in .safetensors, to write."),
    "format": (None, "diffusers, safetensors or orbax. Default: safetensors for a file of that name, else diffusers."),
    "ema": (True, "The moving average of the parameters, where there are both."),
    "overwrite": (False, "Replace what this command wrote there."),
    "code": ("", "Run this code of the checkpoint's author, names package.module:attribute with commas between."),
    "paths": (
        False,
        "Also write the fields of the config that name paths, modules and projects: data.path and others.",
    ),
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
    found = weights.read_info(source)
    allowed = (vars(options).get("code") or "").split(",")
    if needed := [name for name in config_lib.code_of(found).values() if name not in allowed]:
        raise ConfigError(f"{source} needs {needed[0]}, which is code of its author; --code={','.join(needed)} runs it")
    if kind == "diffusers" and found.model.name != "unet":
        raise ConfigError(f"--format: diffusers has no network {found.model.name}; orbax and safetensors hold it")
    check_free(to, kind, options.overwrite)
    params = found.read(weights.params_like(found.model, sharding.data_mesh()), options.ema)
    config = as_config(found)
    write(to, params, config if vars(options).get("paths") else config_lib.public(config), found.step)
    weights.show_note(found)
    print(f"{found.source} is in {to} ({kind}), {params_count(params):,} parameters")


def check_free(to: pathlib.Path, kind: str, overwrite: bool) -> None:
    """ConfigError if something is there that must not be replaced, or if nothing can be written there. A file of
    weights and a diffusers folder are replaced, if so asked, where they are this command's own and nothing else is
    with them; a run never is.
    """
    there = to.exists()
    if there and not (to.is_file() if kind == "safetensors" else to.is_dir()):
        raise ConfigError(f"{to} is a {'folder' if to.is_dir() else 'file'}; give another --to")
    occupied = there and (kind == "safetensors" or not all(map(files.is_temporary, to.iterdir())))
    if occupied and kind == "orbax":
        raise ConfigError(f"{to} is there already: a run is never written over; give another --to")
    if occupied and not overwrite:
        raise ConfigError(f"{to} is there already; give another --to, or --overwrite to replace it")
    if occupied and kind == "safetensors" and not checkpoints.is_ours(to):
        raise ConfigError(f"--overwrite: {to} is not a file that this command wrote; give another --to")
    if occupied and kind == "diffusers" and (other := not_written(to)):
        raise ConfigError(f"--overwrite: {to} holds what this command did not write, {other}; give another --to")
    cli.writable_folder(to if to.is_dir() else to.parent)


def not_written(folder: pathlib.Path) -> str | None:
    """What is in a folder that `write_diffusers` did not write; None if it wrote all of it."""
    other = next(diffusers_export.not_written(folder), None)
    is_own = model_card.is_ours(folder / diffusers_export.CARD)
    return other or (None if is_own else f"no {diffusers_export.CARD} of its own")


def as_config(found: weights.Checkpoint) -> dict[str, Any]:
    """The config to save beside the parameters: all of the run's where it was one, else what is known."""
    known = {
        "name": found.name,
        "model": dataclasses.asdict(found.model),
        "schedule": dataclasses.asdict(found.schedule),
        "sample": {**found.config.get("sample", {}), **found.sample},
    }
    return {**found.config, **known}


Config = Mapping[str, Any]


def write_safetensors(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    checkpoints.save(to, params, config, step)


def write_diffusers(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    diffusers_export.save(to, params, config, model_card.markdown(config, step, params_count(params)))


def write_orbax(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    """Step 0 of a run: the parameters, the same as their moving average, and no optimizer yet."""
    with files.filling(to) as temporary, Checkpoints(temporary, keep=1) as run:
        run.save(TrainState(jnp.int32(0), params, params, {}, jnp.int32(0)), dict(config))
        run.wait()


def params_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


WRITERS = {"safetensors": write_safetensors, "diffusers": write_diffusers, "orbax": write_orbax}


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
