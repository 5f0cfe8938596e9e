"""The devices of a plan: those of a TPU slice, which need not exist, or those of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ddim_jax.planning import chips, measure, programs
from ddim_jax.planning.table import Rates
from ddim_jax.utils.errors import ConfigError


class Target(NamedTuple):
    """The devices of a plan."""

    mesh_of: Callable[[int, int], Mesh]  # (data, fsdp) -> their mesh
    rates: Rates
    hosts: int = 1
    executes: bool = False  # whether programs are also executed


def target_of(name: str, dtype: str) -> Target:
    """The devices of --chips. dtype: of the computation. ConfigError for an unknown name."""
    if name == "gpu":
        if jax.default_backend() != "gpu":
            raise ConfigError(f"--chips gpu: this machine has no GPU that JAX can use, but {jax.default_backend()}")
    elif match := re.fullmatch(r"cpu-([1-9][0-9]?)", name):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(match[1]))
        if jax.local_device_count() != int(match[1]):
            raise ConfigError(f"--chips {name}: JAX has {jax.local_device_count()} devices, as XLA_FLAGS sets")
    else:
        return tpu(chips.slice_of(name))
    mesh_of = lambda data, fsdp: programs.mesh_of(jax.local_devices(), data, fsdp)
    return Target(mesh_of, measure.local_rates(dtype), executes=True)


def tpu(slice_: chips.Slice) -> Target:
    """The devices of a TPU slice."""
    programs.prepare_libtpu(slice_)
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")  # else JAX looks for a TPU of this machine
    chip, count = slice_.chip, slice_.chip.devices
    rates = Rates(chip.memory // count, chip.flops / count, chip.bandwidth / count)
    return Target(lambda data, fsdp: programs.mesh_of_slice(slice_, data, fsdp), rates, slice_.hosts)
