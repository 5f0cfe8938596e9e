"""The TPU chips, their published memory and peak rates, and the slices of Cloud TPU.

Sources: the pages v4, v5e, v5p, v6e and tpu7x of https://docs.cloud.google.com/tpu/docs. Peak rates are those of
bfloat16 matrix products; GB of a page is read as GiB where it is the capacity of a memory, as libtpu has it.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import NamedTuple

from ddim_jax.utils.errors import ConfigError

GB = 1 << 30


class Chip(NamedTuple):
    """A generation of TPU chips. All rates are per chip."""

    name: str
    memory: int  # bytes of HBM
    flops: float  # peak floating-point operations per second, bfloat16
    bandwidth: float  # peak bytes per second between HBM and the chip
    platform: str  # the prefix of its topology names in libtpu
    cores_in_name: int  # the number in the name of a slice counts this many units per chip
    dimensions: int  # of the network between the chips
    most: int  # chips in the largest slice that is planned
    devices: int = 1  # JAX devices per chip
    config: str = ""  # chip_config_name of libtpu: "megacore": the two TensorCores of a chip are one device


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GB, 275e12, 1.2e12, "v4", 2, 3, 1024, config="megacore"),
        Chip("v5e", 16 * GB, 197e12, 0.819e12, "v5e", 1, 2, 256),
        Chip("v5p", 95 * GB, 459e12, 2.765e12, "v5", 2, 3, 1024, config="megacore"),
        Chip("v6e", 32 * GB, 918e12, 1.638e12, "v6e", 1, 2, 256),
        Chip("tpu7x", 192 * GB, 2307e12, 7.38e12, "tpu7x", 2, 3, 1024, devices=2),
    )
}
ALIASES = {"v5litepod": "v5e"}  # names of Cloud TPU for the same chip


class Slice(NamedTuple):
    """A number of connected chips."""

    name: str  # for example "v5e-8"
    chip: Chip
    shape: tuple[int, ...]  # the number of chips along each dimension

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def topology(self) -> str:
        """The name of the topology in libtpu."""
        return f"{self.chip.platform}:{'x'.join(map(str, self.shape))}"

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """The arrangement of the chips of one host. Up to 8 chips in two dimensions have one host."""
        if self.chip.dimensions == 2 and self.chips <= 8:
            return (*self.shape, 1)
        return (2, 2, 1)

    @property
    def hosts(self) -> int:
        return self.chips // math.prod(self.host_bounds)


def slice_of(name: str) -> Slice:
    """The slice of a name such as "v5e-8", "v5p-8" or "v6e-256". The number counts chips for v5e and v6e, and
    TensorCores, two per chip, for v4, v5p and tpu7x, as in the names of Cloud TPU. ConfigError for any other name.
    """
    match = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]{0,5})", name)
    chip = CHIPS.get(ALIASES.get(match[1], match[1])) if match else None
    if chip is None:
        nearest = difflib.get_close_matches(name[:50], names(), 1, 0.0)
        raise ConfigError(
            f"--chips: {name[:50]!r} is not known (did you mean {nearest[0]}?); supported: cpu-N, gpu, or "
            f"{', '.join(f'{chip.name}-N' for chip in CHIPS.values())} with N among the sizes of Cloud TPU"
        )
    count, rest = divmod(int(match[2]), chip.cores_in_name)
    if rest or count not in sizes(chip):
        supported = ", ".join(other for other in names() if other.startswith(f"{chip.name}-"))
        raise ConfigError(f"--chips: {name} does not exist; supported: {supported}")
    return Slice(f"{chip.name}-{match[2]}", chip, shape_of(count, chip.dimensions))


def sizes(chip: Chip) -> list[int]:
    """The numbers of chips of the slices that can be planned: the powers of two of Cloud TPU."""
    smallest = [1, 4] if chip.dimensions == 2 else [4]  # one host has four chips, in three dimensions always
    return smallest + [1 << exponent for exponent in range(3, chip.most.bit_length())]


def shape_of(count: int, dimensions: int) -> tuple[int, ...]:
    """The most cubic arrangement of a power of two of chips, with its sides in ascending order; 2x2x1 is one host."""
    if dimensions == 3 and count == 4:
        return 2, 2, 1
    exponent = count.bit_length() - 1
    sides = [exponent // dimensions + (axis >= dimensions - exponent % dimensions) for axis in range(dimensions)]
    return tuple(1 << side for side in sides)


def names() -> list[str]:
    """The names of all slices that can be planned."""
    return [f"{chip.name}-{count * chip.cores_in_name}" for chip in CHIPS.values() for count in sizes(chip)]
