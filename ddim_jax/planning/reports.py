"""Reports of compiled programs, cached by the content of the program."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections import Counter
from typing import Any, NamedTuple

import jax

from ddim_jax.planning import hlo
from ddim_jax.planning.programs import Program
from ddim_jax.utils import files
from ddim_jax.utils.download import cache_folder

VERSION = 4  # of the counts: a new one makes the cached reports unused
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # environment variables that change the compiled program


class Report(NamedTuple):
    """What a compiled program needs on each device. All sizes are in bytes."""

    arguments: int
    temporaries: int = 0
    outputs: int = 0  # without those that take the memory of a donated argument
    donated: int = 0  # of the arguments, whose memory the outputs take
    code: int = 0  # the machine code of the program
    traffic: dict[str, int] = {}  # kind of operation -> bytes that are read from HBM and written to it
    modules: dict[str, int] = {}  # module of the network -> the same bytes
    collectives: dict[str, hlo.Collective] = {}
    needed: int = 0  # the memory that the compiler asks for, if the program does not fit and was not compiled

    @property
    def memory(self) -> int:
        return self.needed or self.arguments + self.temporaries + self.outputs + self.code

    @property
    def compiled(self) -> bool:
        return not self.needed


def of(program: Program, keep_program: bool = False, cached: bool = True) -> tuple[Report, jax.stages.Compiled | None]:
    """The report of a program, from the cache if it was compiled before, and the compiled program.

    keep_program: False for no compiled program: None is returned then. cached: whether to use the cache.
    """
    path = cache_folder() / "plans" / f"{key(program)}.json"
    if cached and not keep_program and (found := _read(path)) is not None:
        return found, None
    report, compiled = compile_program(program)
    with contextlib.suppress(OSError):  # without a cache it is compiled again
        if cached:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with files.replacing(path) as file:
                file.write(json.dumps(report._asdict()).encode())
    return report, compiled if keep_program else None


def key(program: Program) -> str:
    """A digest of the program, of its devices and of the versions and flags of the compiler."""
    versions = [jax.__version__, *map(_version, ("jaxlib", "libtpu"))]
    flags = [os.environ.get(name, "") for name in FLAGS]
    devices = program.mesh.devices.flat
    kind = [devices[0].device_kind, str(dict(program.mesh.shape)), *(str(_place(device)) for device in devices)]
    text = "\n".join([str(VERSION), *versions, *flags, *kind, program.lowered.as_text()])
    return hashlib.sha256(text.encode()).hexdigest()


def _place(device: jax.Device) -> Any:
    """The position of a chip in its slice; the number of another device."""
    return getattr(device, "coords", None) or device.id


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _read(path: pathlib.Path) -> Report | None:
    """A cached report; None if there is none, or if the file is damaged."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        values["collectives"] = {kind: hlo.Collective(*each) for kind, each in values["collectives"].items()}
        return Report(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def compile_program(program: Program) -> tuple[Report, jax.stages.Compiled | None]:
    """Compiles a program, and returns (what it needs, the compiled program). The program is None if the compiler finds
    that it does not fit into the memory of a chip; then only the arguments and `Report.needed` are known.
    """
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        if needed is None:
            raise
        return Report(program.argument_bytes, needed=needed), None  # the message may leave out the arguments
    memory, text = compiled.memory_analysis(), compiled.as_text()
    by_operation, by_module = Counter(), Counter()
    for (opcode, module), count in hlo.traffic(text).items():
        by_operation[opcode] += count
        by_module[module or "outside of the network"] += count
    report = Report(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        {name: count for name, count in by_operation.most_common() if count},
        {name: count for name, count in by_module.most_common() if count},
        hlo.collectives(text),
    )
    return report, compiled


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NEEDED = (  # the messages of several versions of libtpu, with the memory that a program needs
    re.compile(r"total memory required for HLO temporaries \(([0-9.]+)([KMGT]?)\) exceeds available HBM"),
    re.compile(r"Used ([0-9.]+)([KMGT]?) of [0-9.]+[KMGT]? hbm"),
)


def needed_memory(error: str) -> int | None:
    """The bytes that a program needs, from the compiler's message that it does not fit into HBM. None if this is not
    such a message.
    """
    used = next((match for pattern in _NEEDED if (match := pattern.search(error))), None)
    if used is None or "RESOURCE_EXHAUSTED" not in error:
        return None
    return int(float(used[1]) * _UNITS[used[2]])
