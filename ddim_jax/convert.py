"""Converts a trained network to another format.

    python -m ddim_jax.convert --from WORKDIR --to FOLDER                        # a DDIMPipeline of diffusers
    python -m ddim_jax.convert --from WORKDIR --to FILE.safetensors              # one file of ddim_jax, with its config
    python -m ddim_jax.convert --from PATH_OR_HUB_ID --to WORKDIR --format orbax # a run, to sample or to resume

--from takes the same values as --config.pretrained: a workdir, a diffusers folder or hub id, a ckpt.pth of the official
code, a file of guided-diffusion, or a .safetensors file. The output records how the network was trained and how it is
sampled. It contains paths, modules and account names of the config only if --paths is given.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

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
    "to": (None, "The output folder, or the output file that ends in .safetensors."),
    "format": (None, "diffusers, safetensors or orbax. Default: safetensors if --to ends so, else diffusers."),
    "ema": (True, "Convert the EMA parameters, if the checkpoint holds both. --noema: the raw parameters."),
    "image_size": (
        None,
        "The height and width of the images, for a diffusers folder that does not tell it (sample_size is null).",
    ),
    "overwrite": (False, "Replace an earlier output of this command."),
    "code": ("", "Code of the checkpoint's author that may run: a comma-separated list of package.module:attribute."),
    "paths": (
        False,
        "Also write the fields of the config that name paths, modules and projects: data.path and others.",
    ),
}


def main(options: types.SimpleNamespace) -> None:
    source, target = vars(options)["from"], options.to
    if not source or not target:
        raise ConfigError("--from WORKDIR_OR_CHECKPOINT and --to FOLDER_OR_FILE are both required")
    to = pathlib.Path(target)
    kind = options.format or ("safetensors" if to.suffix == ".safetensors" else "diffusers")
    with error_context("--format"):
        write = registry.lookup(WRITERS, kind)
    if kind == "safetensors" and to.suffix != ".safetensors":
        raise ConfigError(f"--to must end in .safetensors for --format safetensors, got {to}")
    checkpoint = weights.read_info(source, image_size(vars(options).get("image_size")))
    allowed = (vars(options).get("code") or "").split(",")
    if needed := [name for name in config_lib.code_of(checkpoint).values() if name not in allowed]:
        raise ConfigError(
            f"{source} needs the code {needed[0]} of the checkpoint's author; to run it, add --code={','.join(needed)}"
        )
    if kind == "diffusers" and checkpoint.model.name != "unet":
        raise ConfigError(
            f"--format: must be orbax or safetensors for the network {checkpoint.model.name!r}, got {kind!r}"
        )
    check_free(to, kind, options.overwrite)
    params = checkpoint.read(weights.params_like(checkpoint.model, sharding.data_mesh()), options.ema)
    config = weights.as_config(checkpoint)
    write(to, params, config if vars(options).get("paths") else config_lib.public(config), checkpoint.step)
    weights.show_note(checkpoint)
    print(f"wrote {checkpoint.source} to {to} ({kind}), {params_count(params):,} parameters")


def image_size(text: str | None) -> int | None:
    """The value of --image_size. ConfigError if it is not an integer of at least 1."""
    if text is not None and not (text.isascii() and text.isdigit() and 0 < int(text[:10]) <= 2048):
        raise ConfigError(f"--image_size: must be an integer in 1..2048, got {text[:100]!r}")
    return None if text is None else int(text)


def check_free(to: pathlib.Path, kind: str, overwrite: bool) -> None:
    """ConfigError if `to` exists and must not be replaced, or if it cannot be written. --overwrite replaces a
    .safetensors file or a diffusers folder that this command wrote, if the folder holds no other files. It never
    replaces a run.
    """
    exists = to.exists()
    if exists and not (to.is_file() if kind == "safetensors" else to.is_dir()):
        raise ConfigError(f"{to} is a {'folder' if to.is_dir() else 'file'}; give another --to")
    occupied = exists and (kind == "safetensors" or not all(map(files.is_temporary, to.iterdir())))
    if occupied and kind == "orbax":
        raise ConfigError(f"{to} already exists: a run is never overwritten; give another --to")
    if occupied and not overwrite:
        raise ConfigError(f"{to} already exists; give another --to, or --overwrite to replace it")
    if occupied and kind == "safetensors" and not checkpoints.is_from_ddim_jax(to):
        raise ConfigError(f"--overwrite: {to} was not written by this command; give another --to")
    if occupied and kind == "diffusers" and (other := not_written(to)):
        raise ConfigError(f"--overwrite: {to} was not written by this command alone ({other}); give another --to")
    cli.writable_folder(to if to.is_dir() else to.parent)


def not_written(folder: pathlib.Path) -> str | None:
    """A file of the folder that `write_diffusers` did not write; None if it wrote all files and the model card."""
    other = next(diffusers_export.not_written(folder), None)
    has_card = model_card.is_from_ddim_jax(folder / diffusers_export.CARD)
    return other or (None if has_card else f"no {diffusers_export.CARD} of ddim_jax")


Config = Mapping[str, Any]


def write_safetensors(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    checkpoints.save(to, params, config, step)


def write_diffusers(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    diffusers_export.save(to, params, config, model_card.markdown(config, step, params_count(params)))


def write_orbax(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    """Writes step 0 of a run: the parameters, an EMA equal to them, and an empty optimizer state."""
    with files.filling(to) as temporary, Checkpoints(temporary, keep=1) as run:
        run.save(TrainState(jnp.int32(0), params, params, {}, jnp.int32(0)), dict(config))
        run.wait()


def params_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


WRITERS = {"safetensors": write_safetensors, "diffusers": write_diffusers, "orbax": write_orbax}


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
