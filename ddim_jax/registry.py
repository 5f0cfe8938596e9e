"""The names that configs use. A new schedule, tau or sampler is a function and an entry here; the property
tests run over these.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ddim_jax import gaussian, losses, multistep, samplers, schedule, trajectory

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
GAMMAS = losses.GAMMAS


def lookup(table: Mapping[str, Any], name: str) -> Any:
    """The entry called name, or a ValueError with the names there are and the nearest of them."""
    if name not in table:
        name = str(name)[:100]
        nearest = difflib.get_close_matches(name, table, 1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(f"{name!r} is not one of {', '.join(table)}{hint}")
    return table[name]


def accepts(factory: Callable) -> set[str]:
    """The parameters that a factory names: the fields of its config section that it will be given."""
    return set(inspect.signature(factory).parameters)


def build(factory: Callable, fields: Mapping[str, Any]) -> Any:
    """factory(**those of the fields that its signature names)."""
    return factory(**{name: value for name, value in fields.items() if name in accepts(factory)})
