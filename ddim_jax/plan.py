"""Plans training and sampling on devices that are not at hand: compiles the programs of a config for them.

    python -m ddim_jax.plan --config configs/cifar10.py --chips v5e-8 [--what train,sample] [--out plan.json]

Prints whether the update and the sampler of one batch fit into the memory of a chip, their collectives, operations and
memory traffic, and the lower bound of their time at the published peak of the chip. Nothing is executed on a TPU: a
bound is not a measurement. If training does not fit, it compiles changes of the config until one fits.

TPUs need no TPU, but `pip install "ddim-jax[plan]"` on Linux with an x86-64 processor; compiling takes minutes. --chips
cpu-N or gpu: the devices of this machine, on which the programs are also executed and timed.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

import jax

from ddim_jax import cli
from ddim_jax import config as config_lib
from ddim_jax.config import Config
from ddim_jax.models.network import param_shapes
from ddim_jax.planning import chips, measure, programs, reports, table
from ddim_jax.planning.table import Rates, Row
from ddim_jax.utils import files, sharding
from ddim_jax.utils.errors import ConfigError

WHAT = ("train", "sample")
PROGRESS_SECONDS = 20

OPTIONS = {
    "chips": (None, "The devices: a TPU slice such as v5e-8, v5p-8, v6e-8, v4-8 or tpu7x-8, or cpu-N, or gpu."),
    "what": ("train,sample", "The programs, comma-separated: train, sample."),
    "out": (None, "A JSON file for the numbers. It must not exist."),
}


def main(options: types.SimpleNamespace) -> None:
    if options.chips is None:
        supported = ", ".join(f"{name}-N" for name in ("cpu", *chips.CHIPS))
        raise ConfigError(f"--chips is missing, for example --chips v5e-8; supported: gpu, {supported}")
    what = options.what.split(",")
    for name in what:
        if name not in WHAT:
            raise ConfigError(f"--what: must be of {', '.join(WHAT)}, got {name[:50]!r}")
    if options.out is not None and pathlib.Path(options.out).exists():
        raise ConfigError(f"--out: {options.out} exists")
    config = options.config
    mesh_of, rates = devices(options.chips)
    mesh = mesh_of(config)
    at_hand = not options.chips.startswith(tuple(chips.CHIPS))
    rows = []
    for name in what:
        row = (train_row if name == "train" else sample_row)(config, mesh, at_hand)
        rows.append(row)
    cli.say(f"{config.name} on {options.chips}: data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} devices\n")
    cli.say("\n".join(table.lines(rows, rates)))
    changes = {
        row.program: change_that_fits(config, row, mesh_of, rates) for row in rows if table.fits(row, rates) is False
    }
    for name, change in changes.items():
        cli.say(f"{name} does not fit; {change}")
    if options.out is not None:
        numbers = {"config": config.name, "chips": options.chips, "jax": jax.__version__}
        numbers |= {"programs": [table.as_json(row, rates) for row in rows], "changes": changes}
        with files.replacing(pathlib.Path(options.out)) as file:
            file.write(json.dumps(numbers, indent=1).encode())


def devices(name: str) -> tuple[Callable[[Config], jax.sharding.Mesh], Rates]:
    """(config -> the mesh of these devices, their peak rates). ConfigError for an unknown name."""
    if match := re.fullmatch(r"cpu-([1-9][0-9]{0,2})", name):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(match[1]))
        return local_mesh, Rates(sharding.device_memory(), None, None)
    if name == "gpu":
        if jax.default_backend() != "gpu":
            raise ConfigError(f"--chips gpu: this machine has no GPU that JAX can use, but {jax.default_backend()}")
        return local_mesh, measure.gpu_rates()
    slice_ = chips.slice_of(name)
    programs.check_libtpu()
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU of this machine
    chip, count = slice_.chip, slice_.chip.devices
    rates = Rates(chip.memory // count, chip.flops / count, chip.bandwidth / count)
    return lambda config: programs.mesh_of(slice_, config.mesh.data, config.mesh.fsdp), rates


def local_mesh(config: Config) -> jax.sharding.Mesh:
    return programs.mesh_of_devices(jax.local_devices(), config.mesh.data, config.mesh.fsdp)


def train_row(config: Config, mesh: jax.sharding.Mesh, execute: bool) -> Row:
    """The update of config.train."""
    check_batch("config.train.batch_size", config.train.batch_size, config.train.accumulate, mesh)
    recipe, shape = config_lib.recipe(config), config_lib.image_shape(config.model)
    with progress("the update"):
        lowered, flops = programs.update(recipe, mesh, shape)
        report, compiled = reports.of(lowered, mesh, keep_program=execute)
    seconds = measure.update(recipe, mesh, compiled, shape) if execute and compiled else None
    return Row("train", report, flops / mesh.size, config.train.batch_size, config.train.num_steps, seconds)


def sample_row(config: Config, mesh: jax.sharding.Mesh, execute: bool) -> Row:
    """The sampler of one batch of config.sample."""
    shapes = param_shapes(config_lib.network(config.model))
    pipeline = config_lib.pipeline(config, shapes, mesh)
    with progress("the sampler"):
        lowered, flops = programs.sampler(pipeline, shapes)
        report, compiled = reports.of(lowered, mesh, keep_program=execute)
    seconds = measure.sampler(pipeline, compiled) if execute and compiled else None
    return Row("sample", report, flops / mesh.size, programs.batch_of(pipeline), 0, seconds)


def check_batch(field: str, batch: int, accumulate: int, mesh: jax.sharding.Mesh) -> None:
    """ConfigError unless the devices divide the images of one accumulation step."""
    if batch % (accumulate * mesh.size):
        raise ConfigError(
            f"{field}: must be a multiple of the {mesh.size} devices times config.train.accumulate, "
            f"{accumulate * mesh.size}, got {batch}"
        )


def change_that_fits(config: Config, row: Row, mesh_of: Callable, rates: Rates) -> str:
    """The first change of the config with which the program fits, as compiled; or that none does."""
    for text, changed in alternatives(config, row.program, mesh_of(config).size):
        cli.say(f"trying {text}")
        mesh = mesh_of(changed)
        other = (train_row if row.program == "train" else sample_row)(changed, mesh, False)
        if table.fits(other, rates):
            return f"{text} fits, with {files.human_size(other.report.memory)} per device"
    return "none of the changes that were tried fits: take more chips, or a smaller network"


def alternatives(config: Config, program: str, count: int) -> Iterator[tuple[str, Config]]:
    """Changes of the config that need less memory, with their options: the cheapest first. count: of devices."""
    if program == "sample":
        batch = config.sample.batch_size
        while batch > count:
            batch //= 2
            sample = dataclasses.replace(config.sample, batch_size=batch)
            yield f"--config.sample.batch_size={batch}", dataclasses.replace(config, sample=sample)
        return
    for fsdp in (False, True) if count > 1 and config.mesh.fsdp == 1 else (False,):
        for remat in (False, True) if hasattr(config.model, "remat") and not config.model.remat else (False,):
            accumulate = config.train.accumulate
            while config.train.batch_size % (accumulate * count) == 0:
                text = [f"--config.train.accumulate={accumulate}"] * (accumulate != config.train.accumulate)
                text += ["--config.model.remat=True"] * remat + [f"--config.mesh.fsdp={count}"] * fsdp
                changed = dataclasses.replace(
                    config,
                    train=dataclasses.replace(config.train, accumulate=accumulate),
                    model=dataclasses.replace(config.model, remat=True) if remat else config.model,
                    mesh=dataclasses.replace(config.mesh, data=-1, fsdp=count) if fsdp else config.mesh,
                )
                if text:
                    yield " ".join(text), changed
                accumulate *= 2


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Prints to stderr that something is compiled, and every PROGRESS_SECONDS that it still is."""
    done, begin = threading.Event(), time.monotonic()
    note = lambda text: print(text, file=sys.stderr, flush=True)
    note(f"compiling {what}")

    def repeat() -> None:
        while not done.wait(PROGRESS_SECONDS):
            note(f"still compiling {what}, {time.monotonic() - begin:.0f} s")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        note(f"compiled {what} in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    cli.start(main, OPTIONS)
