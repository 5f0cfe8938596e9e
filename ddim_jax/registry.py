"""The names that configs use. A new schedule, tau or sampler is a function and an entry here; the property
tests run over these.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from ddim_jax import checks, gaussian, losses, multistep, samplers, schedule, trajectory
from ddim_jax.checks import lookup as lookup

SCHEDULES = {  # (num_steps, and what the signature names) -> NoiseSchedule or ContinuousSchedule
    "linear": schedule.linear,
    "scaled_linear": schedule.scaled_linear,
    "cosine": schedule.cosine,
    "sigmoid": schedule.sigmoid,
    "vp": schedule.vp,
    "log_snr": schedule.log_snr,
    "from_betas": schedule.from_betas,
}

TAUS = {  # (T, S) -> tau, of ints
    "uniform": trajectory.uniform,
    "quadratic": trajectory.quadratic,
    "leading": trajectory.leading,
    "trailing": trajectory.trailing,
    "linspace": trajectory.linspace,
    "official_uniform": trajectory.official_uniform,
    "official_quadratic": trajectory.official_quadratic,
}

SPACINGS = {  # (schedule, S) -> tau, of reals
    "time": trajectory.time,
    "log_snr": trajectory.log_snr,
    "sigma": trajectory.sigma,
    "karras": trajectory.karras,
}

NAMED_TAUS = TAUS | SPACINGS

SAMPLERS = {  # (what the signature names) -> Sampler
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
    "ddpm_hat": samplers.ddpm_hat,
    "heun": multistep.heun,
    "ab2": multistep.ab2,
    "ab4": multistep.ab4,
    "plms": multistep.plms,
    "dpm_solver_pp_2m": functools.partial(multistep.dpm_solver_pp, 2),
    "dpm_solver_pp_3m": functools.partial(multistep.dpm_solver_pp, 3),
    "unipc": multistep.unipc,
}

PREDICTIONS = gaussian.PREDICTIONS
WEIGHTS = losses.WEIGHTS  # (what the signature names) -> LossWeight, or a function level -> gamma_t


NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def is_code(name: Any) -> bool:
    """Whether a text names code of a user, "package.module:attribute", rather than an entry of a table."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def check_name(table: Mapping[str, Any], name: str) -> None:
    """ValueError, with the nearest name, unless it is an entry of the table, or of the form "package.module:attribute".
    Imports nothing.
    """
    if not isinstance(name, str) or ":" not in name:
        lookup(table, name)
    elif not is_code(name):
        raise ValueError(f"must be one of {', '.join(table)}, or package.module:attribute, got {checks.shown(name)}")


def resolve(table: Mapping[str, Any], name: str) -> Any:
    """The entry called name of a table, or what "package.module:attribute" names: anything that can be called.
    ValueError of one line if there is none, or if importing it fails.
    """
    check_name(table, name)
    if not is_code(name):
        return table[name]
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {str(error)[:200]}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), 1)
            raise ValueError(f"{name}: {module} has no {part}{f' (did you mean {near[0]!r}?)' if near else ''}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} must be a function or a class, got {checks.shown(found)}")
    return found


def accepts(factory: Callable) -> set[str]:
    """The parameters that a factory names: the fields of its config section that it will be given."""
    return set(inspect.signature(factory).parameters)


def build(factory: Callable, fields: Mapping[str, Any], options: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
    """factory(**those of the fields that its signature names, **options). ValueError for an option that it does not
    take, with the nearest name, and where it needs an argument that is not given.
    """
    parameters = inspect.signature(factory).parameters
    free = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for name in options:
        if name in fields:
            raise ValueError(f"options.{name} is a field of its own: leave it out of options")
        if name not in parameters and not free:
            near = difflib.get_close_matches(name, parameters, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else f"; it takes {', '.join(parameters) or 'none'}"
            raise ValueError(f"options.{name} is no argument of {_name_of(factory)}{hint}")
    given = {name: value for name, value in fields.items() if name in parameters} | dict(options)
    missing = [
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and name not in given
    ]
    if missing:
        raise ValueError(f"options.{missing[0]} is missing: {_name_of(factory)} needs it")
    return factory(**given)


def _name_of(factory: Any) -> str:
    return getattr(factory, "__name__", type(factory).__name__)
