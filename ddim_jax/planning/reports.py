"""Reports of programs, cached by the content of the program."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from ddim_jax.planning import hlo, programs
from ddim_jax.planning.programs import Report
from ddim_jax.utils import files
from ddim_jax.utils.download import cache_folder

VERSION = 1  # of the counts: a new one makes the cached reports unused


def of(
    lowered: jax.stages.Lowered, mesh: Mesh, keep_program: bool = False
) -> tuple[Report, jax.stages.Compiled | None]:
    """The report of a program, from the cache if it was compiled before, and the compiled program.

    mesh: of the program. keep_program: False for no compiled program: None is returned then.
    """
    path = cache_folder() / "plans" / f"{key(lowered, mesh)}.json"
    if not keep_program and (found := _read(path)) is not None:
        return found, None
    report, compiled = programs.report(lowered)
    with contextlib.suppress(OSError):  # without a cache it is compiled again
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with files.replacing(path) as file:
            file.write(json.dumps(report._asdict()).encode())
    return report, compiled if keep_program else None


def key(lowered: jax.stages.Lowered, mesh: Mesh) -> str:
    """A digest of the program, of its devices and of the versions of the compiler."""
    versions = [jax.__version__, *map(_version, ("jaxlib", "libtpu"))]
    devices = f"{mesh.devices.flat[0].device_kind} {dict(mesh.shape)}"
    text = "\n".join([str(VERSION), *versions, devices, lowered.as_text()])
    return hashlib.sha256(text.encode()).hexdigest()


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
