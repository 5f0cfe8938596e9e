"""Converts a trained network to another format.

    python -m ddim_jax.convert --from WORKDIR --to FOLDER                        # a DDIMPipeline of diffusers
    python -m ddim_jax.convert --from WORKDIR --to FILE.safetensors              # one file of ddim_jax, with its config
    python -m ddim_jax.convert --from PATH_OR_HUB_ID --to WORKDIR --format orbax # a run, to sample or to resume
    python -m ddim_jax.convert --from WORKDIR --to FILE.stablehlo --sample steps=20 # a sampler, without this package

--from takes the same values as --config.pretrained: a workdir, a diffusers folder or hub id, a ckpt.pth of the official
code, a file of guided-diffusion, or a .safetensors file. The output records how the network was trained and how it is
sampled. It contains paths, modules and account names of the config only if --paths is given. A .stablehlo file is a
sampler of a fixed batch size with its weights, which runs with JAX alone, on a CPU, a GPU or a TPU (needs
`pip install "ddim-jax[export]"`); FILE.md beside it says how.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import pathlib
import types
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ddim_jax import checkpoints, cli, registry, stablehlo
from ddim_jax import config as config_lib
from ddim_jax.checkpoints import diffusers_export, model_card
from ddim_jax.checkpoints.run import Checkpoints
from ddim_jax.config import ModelConfig, SampleConfig, ScheduleConfig, weights
from ddim_jax.training.train_state import TrainState
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError, error_context

OPTIONS = {
    "from": (None, "A workdir, or a published checkpoint: a path or a hub id."),
    "to": (None, "The output folder, or the output file that ends in .safetensors or .stablehlo."),
    "format": (None, "diffusers, safetensors, stablehlo or orbax. Default: as --to ends, else diffusers."),
    "sample": ([], "For a .stablehlo file: a field of config.sample, such as steps=20; may be repeated."),
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
    kind = options.format or (to.suffix[1:] if to.suffix[1:] in FILES else "diffusers")
    with error_context("--format"):
        write = registry.lookup(WRITERS, kind)
    if kind in FILES and to.suffix != f".{kind}":
        raise ConfigError(f"--to must end in .{kind} for --format {kind}, got {to}")
    fields = vars(options).get("sample") or []
    if fields and kind != "stablehlo":
        raise ConfigError(f"--sample: only for a .stablehlo file, got --format {kind}")
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
    config = weights.as_config(checkpoint)
    if kind == "stablehlo":  # the program has no fields of the config
        config = with_settings(config, fields, allowed)
    elif not vars(options).get("paths"):
        config = config_lib.public(config)
    params = checkpoint.read(weights.params_like(checkpoint.model, mesh_of(kind)), options.ema)
    write(to, params, config, checkpoint.step)
    weights.show_note(checkpoint)
    print(f"wrote {checkpoint.source} to {to} ({kind}), {params_count(params):,} parameters")


def mesh_of(kind: str) -> Mesh:
    """The devices for the parameters: a program is exported for one."""
    return sharding.data_mesh(devices=jax.local_devices()[:1] if kind == "stablehlo" else None)


def with_settings(config: Config, fields: list[str], allowed: Collection[str]) -> dict[str, Any]:
    """The config with a complete config.sample. fields: texts FIELD=VALUE. allowed: the code of a checkpoint that
    may run. ConfigError if a field is invalid.
    """
    values = {**config, "sample": stablehlo.settings(config["sample"])}
    given = dict(text.partition("=")[::2] for text in fields)
    for name, value in values["sample"].items():
        if isinstance(value, str) and registry.is_code(value) and name not in given and value not in allowed:
            raise ConfigError(f"config.sample.{name} of the checkpoint is code, {value}; to run it, add --code={value}")
    for name, value in given.items():
        values = config_lib.with_text(values, f"sample.{name}", value)
    return values


def image_size(text: str | None) -> int | None:
    """The value of --image_size. ConfigError if it is not an integer of at least 1."""
    if text is not None and not (text.isascii() and text.isdigit() and 0 < int(text[:10]) <= 2048):
        raise ConfigError(f"--image_size: must be an integer in 1..2048, got {text[:100]!r}")
    return None if text is None else int(text)


def check_free(to: pathlib.Path, kind: str, overwrite: bool) -> None:
    """ConfigError if `to` exists and must not be replaced, or if it cannot be written. --overwrite replaces a
    file or a diffusers folder that this command wrote, if the folder holds no other files. It never replaces a run.
    """
    exists = to.exists()
    if exists and not (to.is_file() if kind in FILES else to.is_dir()):
        raise ConfigError(f"{to} is a {'folder' if to.is_dir() else 'file'}; give another --to")
    occupied = exists and (kind in FILES or not all(map(files.is_temporary, to.iterdir())))
    occupied |= kind == "stablehlo" and to.with_suffix(".md").exists()
    if occupied and kind == "orbax":
        raise ConfigError(f"{to} already exists: a run is never overwritten; give another --to")
    if occupied and not overwrite:
        raise ConfigError(f"{to} already exists; give another --to, or --overwrite to replace it")
    if occupied and kind in FILES and not FILES[kind](to):
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


def has_readme(to: pathlib.Path) -> bool:
    """Whether a .stablehlo file has the text that this command writes beside it."""
    path = to.with_suffix(".md")
    return path.is_file() and stablehlo.CALL in path.read_text(errors="replace")


def write_safetensors(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    checkpoints.save(to, params, config, step)


def write_diffusers(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    diffusers_export.save(to, params, config, model_card.markdown(config, step, params_count(params)))


def write_orbax(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    """Writes step 0 of a run: the parameters, an EMA equal to them, and an empty optimizer state."""
    with files.filling(to) as temporary, Checkpoints(temporary, keep=1) as run:
        run.save(TrainState(jnp.int32(0), params, params, {}, jnp.int32(0)), dict(config))
        run.wait()


def write_stablehlo(to: pathlib.Path, params: Any, config: Config, step: int | None) -> None:
    """Writes the sampler of config.sample, and a text beside it."""
    sections = {"model": ModelConfig, "schedule": ScheduleConfig, "sample": SampleConfig}
    parsed = {name: config_lib.section(kind, config[name], f"config.{name}") for name, kind in sections.items()}
    pipeline = config_lib.pipeline(types.SimpleNamespace(**parsed), params, mesh_of("stablehlo"))
    try:
        program = stablehlo.serialized(pipeline)
    except ModuleNotFoundError as error:
        if error.name != "flatbuffers":
            raise
        raise ConfigError("--to: a .stablehlo file needs flatbuffers: pip install 'ddim-jax[export]'") from error
    for path, content in (
        (to, program),
        (to.with_suffix(".md"), stablehlo.readme(config["name"], to.name, pipeline).encode()),
    ):
        with files.replacing(path) as file:
            file.write(content)


def params_count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


WRITERS = {
    "safetensors": write_safetensors,
    "diffusers": write_diffusers,
    "orbax": write_orbax,
    "stablehlo": write_stablehlo,
}
# The formats of one file -> whether this command wrote a file.
FILES = {"safetensors": checkpoints.is_from_ddim_jax, "stablehlo": has_readme}


if __name__ == "__main__":
    cli.start(main, OPTIONS, config=False)
