"""Plans training and sampling on devices that are not at hand: compiles the programs of a config for them.

    python -m ddim_jax.plan --config configs/cifar10.py --chips v5e-8 [--what train,sample] [--out plan.json]

Prints whether the update and the sampler of one batch fit into the memory of a chip, their collectives, operations and
memory traffic, and the lower bound of their time at the published peak of the chip. Nothing is executed on a TPU: a
bound is not a measurement. If a program does not fit, changes of the config are compiled until one fits.

TPUs need no TPU, but `pip install "ddim-jax[plan]"` on Linux with an x86-64 processor; compiling takes minutes. --chips
cpu-N or gpu: the devices of this machine, on which the programs are also executed and timed.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import json
import pathlib
import types

import jax

from ddim_jax import cli
from ddim_jax import config as config_lib
from ddim_jax.config import Config
from ddim_jax.models.network import param_shapes
from ddim_jax.planning import chips, measure, programs, reports, table
from ddim_jax.planning.changes import changes
from ddim_jax.planning.progress import progress
from ddim_jax.planning.table import Row
from ddim_jax.planning.target import Target, target_of
from ddim_jax.utils import files
from ddim_jax.utils.errors import ConfigError

OPTIONS = {
    "chips": (None, "The devices: a TPU slice such as v5e-8, v5p-8, v6e-8, v4-8 or tpu7x-8, or cpu-N, or gpu."),
    "what": ("train,sample", "The programs, comma-separated: train, sample."),
    "out": (None, "A JSON file for the numbers. It must not exist."),
}


def main(options: types.SimpleNamespace) -> None:
    config, what = options.config, programs_of(options.what)
    if options.chips is None:
        supported = ", ".join(f"{name}-N" for name in ("cpu", *chips.CHIPS))
        raise ConfigError(f"--chips is missing, for example --chips v5e-8; supported: gpu, {supported}")
    if options.out is not None:
        if pathlib.Path(options.out).exists():
            raise ConfigError(f"--out: {options.out} exists")
        cli.writable_folder(pathlib.Path(options.out).parent)
    target = target_of(options.chips, getattr(config.model, "dtype", "float32"))
    cached = options.compilation_cache
    rows = [ROWS[name](config, target, cached) for name in what]
    shape = dict(target.mesh_of(config.mesh.data, config.mesh.fsdp).shape)
    cli.say(f"{config.name} on {options.chips}: {shape['data']} x {shape['fsdp']} devices (data x fsdp)")
    if target.hosts > 1:
        cli.say(f"{target.hosts} hosts: start the command on each of them, with --distributed")
    cli.say("\n" + "\n".join(table.lines(rows, target.rates)))
    advice = {row.program: change_that_fits(config, row, target, cached) for row in rows if is_too_large(row, target)}
    for name, change in advice.items():
        cli.say(f"{name} does not fit; {change}")
    if options.out is not None:
        numbers = {"config": config.name, "chips": options.chips, "mesh": shape, "hosts": target.hosts}
        numbers |= {"jax": jax.__version__, "dtype": getattr(config.model, "dtype", None)}
        numbers |= {"programs": [table.as_json(row, target.rates) for row in rows], "changes": advice}
        with files.replacing(pathlib.Path(options.out)) as file:
            file.write(json.dumps(numbers, indent=1).encode())


def programs_of(text: str) -> list[str]:
    """The names in --what. ConfigError for an unknown one."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in ROWS:
            raise ConfigError(f"--what: must be of {', '.join(ROWS)}, got {name[:50]!r}")
    return names


def train_row(config: Config, target: Target, cached: bool = True) -> Row:
    """The update of config.train."""
    mesh, train = target.mesh_of(config.mesh.data, config.mesh.fsdp), config.train
    config_lib.check_batch(train, mesh)
    with progress("the update"):
        program = programs.update(config_lib.recipe(config), mesh, config_lib.image_shape(config.model))
        report, compiled = reports.of(program, target.executes, cached)
    seconds = measure.update(program, compiled) if compiled else None
    return Row("train", report, program.flops / mesh.size, train.batch_size, train.num_steps, seconds)


def sample_row(config: Config, target: Target, cached: bool = True) -> Row:
    """The sampler of one batch of config.sample. Sampling uses no fsdp."""
    mesh, shapes = target.mesh_of(-1, 1), param_shapes(config_lib.network(config.model))
    pipeline = config_lib.pipeline(config, shapes, mesh)
    with progress("the sampler"):
        program = programs.sampler(pipeline)
        report, compiled = reports.of(program, target.executes, cached)
    seconds = measure.sampler(program, pipeline.process, compiled) if compiled else None
    return Row("sample", report, program.flops / mesh.size, program.images, 0, seconds)


ROWS = {"train": train_row, "sample": sample_row}


def is_too_large(row: Row, target: Target) -> bool:
    return table.fits(row, target.rates) is False


def change_that_fits(config: Config, row: Row, target: Target, cached: bool = True) -> str:
    """The first change of the config with which the program fits, as compiled; or that none does."""
    count = target.mesh_of(config.mesh.data, config.mesh.fsdp).size
    for change in changes(config, row.program, count):
        cli.say(f"trying {change.options}")
        changed = ROWS[row.program](change.config, target._replace(executes=False), cached)
        if table.fits(changed, target.rates):
            size = files.human_size(changed.report.memory)
            return f"{change.options} fits, with {size} per device; {change.images} images are in memory at once"
    return "none of the changes that were tried fits: take more chips, or a smaller network"


if __name__ == "__main__":
    cli.start(main, OPTIONS)
