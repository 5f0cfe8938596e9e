"""The tables of names that configs use.

A new schedule, tau or sampler is a function and an entry of a table. The property tests run over all entries.
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

SCHEDULES = {  # (num_steps, other parameters) -> NoiseSchedule or ContinuousSchedule
    "linear": schedule.linear,
    "scaled_linear": schedule.scaled_linear,
    "cosine": schedule.cosine,
    "sigmoid": schedule.sigmoid,
    "vp": schedule.vp,
    "log_snr": schedule.log_snr,
    "from_betas": schedule.from_betas,
}

TAUS = {  # (T, S) -> tau, ints
    "uniform": trajectory.uniform,
    "quadratic": trajectory.quadratic,
    "leading": trajectory.leading,
    "trailing": trajectory.trailing,
    "linspace": trajectory.linspace,
    "official_uniform": trajectory.official_uniform,
    "official_quadratic": trajectory.official_quadratic,
}

SPACINGS = {  # (schedule, S) -> tau, reals
    "time": trajectory.time,
    "log_snr": trajectory.log_snr,
    "sigma": trajectory.sigma,
    "karras": trajectory.karras,
}

NAMED_TAUS = TAUS | SPACINGS

SAMPLERS = {  # (parameters) -> Sampler
    "ddim": samplers.ddim,
    "ddpm": samplers.ddpm,
    "ddpm_hat": samplers.ddpm_hat,
    "ddpm_learned": samplers.ddpm_learned,
    "heun": multistep.heun,
    "ab2": multistep.ab2,
    "ab4": multistep.ab4,
    "plms": multistep.plms,
    "dpm_solver_pp_2m": functools.partial(multistep.dpm_solver_pp, 2),
    "dpm_solver_pp_3m": functools.partial(multistep.dpm_solver_pp, 3),
    "unipc": multistep.unipc,
}

PREDICTIONS = gaussian.PREDICTIONS
WEIGHTS = losses.WEIGHTS  # (parameters) -> LossWeight, or a function level -> gamma_t


NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def is_code(name: Any) -> bool:
    """Whether a name is the address of code, "package.module:attribute", rather than an entry of a table."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None


def check_name(table: Mapping[str, Any], name: str) -> None:
    """Raises ValueError unless name is an entry of the table or has the form "package.module:attribute".

    The error suggests the nearest entry. Nothing is imported.
    """
    if not isinstance(name, str) or ":" not in name:
        lookup(table, name)
    elif not is_code(name):
        raise ValueError(f"must be one of {', '.join(table)}, or package.module:attribute, got {checks.shown(name)}")


def resolve(table: Mapping[str, Any], name: str) -> Any:
    """The entry `name` of a table, or the callable with the address "package.module:attribute".

    Raises a ValueError of one line if it does not exist, cannot be imported or is not callable.
    """
    check_name(table, name)
    if not is_code(name):
        return table[name]
    module, _, attribute = name.partition(":")
    try:
        value = importlib.import_module(module)
    except Exception as error:  # the module of the user may raise any exception
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {str(error)[:200]}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            nearest = difflib.get_close_matches(part, dir(value), 1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise ValueError(f"{name}: {module} has no attribute {part}{hint}")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"{name} must be a function or a class, got {checks.shown(value)}")
    return value


def accepts(factory: Callable) -> set[str]:
    """The names of the parameters of a factory. These fields of its config section are passed to it."""
    return set(inspect.signature(factory).parameters)


def build(factory: Callable, fields: Mapping[str, Any], options: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
    """Calls factory(**arguments) with the fields that are parameters of the factory, and with the options.

    fields: the fields of a config section. Those that the factory does not accept are not passed.
    options: further arguments. Raises ValueError for an option that the factory does not accept, with the nearest name.

    Raises ValueError if a required argument is missing.
    """
    parameters = inspect.signature(factory).parameters
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in options:
        if name in fields:
            raise ValueError(f"options.{name} is a config field: set the field and remove it from options")
        if name not in parameters and not accepts_any:
            nearest = difflib.get_close_matches(name, parameters, 1)
            allowed = f"; its arguments are {', '.join(parameters)}" if parameters else "; it has no arguments"
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else allowed
            raise ValueError(f"options.{name} is not an argument of {_name_of(factory)}{hint}")
    arguments = {name: value for name, value in fields.items() if name in parameters} | dict(options)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in arguments
    ]
    if missing:
        raise ValueError(f"options.{missing[0]} is missing: {_name_of(factory)} requires it")
    return factory(**arguments)


def _name_of(factory: Any) -> str:
    return getattr(factory, "__name__", type(factory).__name__)
