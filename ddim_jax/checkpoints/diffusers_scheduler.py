"""The scheduler_config.json of diffusers: conversion to and from the fields of config.schedule and config.sample.

Settings have the meaning that they have in diffusers' schedulers. A setting that is missing in a file has the default
of its scheduler class. Unsupported settings that change the numbers raise an error that names them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from ddim_jax import registry
from ddim_jax.checkpoints.diffusers_settings import settings, unsupported
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

# The supported fields of schedulers, with the defaults of DDIMScheduler.
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}

# Fields that change the meaning of the network's output or timestep: name -> (the only supported value, text for
# messages).
FIXED_NOISE = {
    "use_flow_sigmas": (False, "False (the noise of flow matching is not that of DDPM)"),
    "use_dynamic_shifting": (False, "False (the noise of flow matching is not that of DDPM)"),
    "timestep_type": ("discrete", "'discrete' (timesteps are integers)"),
    "timestep_values": (None, "None (the timesteps are 0..num_train_timesteps - 1)"),
}

# Fields of other schedulers and of the first versions, which have no effect on the supported schedulers.
HARMLESS = ("tensor_format", "interpolation_type", "original_inference_steps", "timestep_scaling")

PREDICT_EPSILON = "predict_epsilon"  # the predecessor of prediction_type, before diffusers 0.9


class Scheduler(NamedTuple):
    """The fields of a scheduler class, with their defaults."""

    noise: Mapping[str, Any]  # the fields of NOISE that the class has; their meaning is the same in all classes
    own_steps: Mapping[str, Any] = {}  # the fields that change only its update step, which is not used


def _noise(*missing: str, **changed: Any) -> dict[str, Any]:
    return {name: changed.get(name, default) for name, default in NOISE.items() if name not in missing}


_SOLVER = {
    "solver_order": 2,
    "lower_order_final": True,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "flow_shift": 1.0,
    "time_shift_type": "exponential",
}

_DPM = {
    **_SOLVER,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}

_NEVER_CLIPS = ("clip_sample", "clip_sample_range", "set_alpha_to_one")  # fields that the solvers do not have

_DDPM = Scheduler(_noise("set_alpha_to_one"), {"variance_type": "fixed_small"})

# Schedulers with the forward process of DDPM: alpha_bar has the same meaning in all. Their update steps are not used.
SCHEDULERS = {
    "DDIMScheduler": Scheduler(NOISE),
    "DDPMScheduler": _DDPM,
    "PNDMScheduler": Scheduler(
        _noise(
            *("clip_sample", "clip_sample_range", "rescale_betas_zero_snr"),
            *("thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
            set_alpha_to_one=False,
        ),
        {"skip_prk_steps": False},
    ),
    "DDIMParallelScheduler": Scheduler(NOISE),
    "DDPMParallelScheduler": _DDPM,
    "DPMSolverMultistepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, timestep_spacing="linspace"), {**_DPM, "euler_at_final": False, "use_lu_lambdas": False}
    ),
    "DPMSolverSinglestepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, "timestep_spacing", "steps_offset", "rescale_betas_zero_snr"),
        {**_DPM, "lower_order_final": False},
    ),
    "DEISMultistepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, "rescale_betas_zero_snr", timestep_spacing="linspace"),
        {**_SOLVER, "algorithm_type": "deis", "solver_type": "logrho"},
    ),
    "UniPCMultistepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, timestep_spacing="linspace"),
        {
            **_SOLVER,
            "solver_type": "bh2",
            "final_sigmas_type": "zero",
            "predict_x0": True,
            "disable_corrector": [],
            "solver_p": None,
            "sigma_min": None,
            "sigma_max": None,
            "shift_terminal": None,
        },
    ),
}

# The values for a class that does not have the field. The spacing of DPMSolverSinglestepScheduler is linspace.
ABSENT = {**NOISE, "clip_sample": False, "timestep_spacing": "linspace"}

OWN_STEPS = {name for scheduler in SCHEDULERS.values() for name in scheduler.own_steps}

KNOWN = {*NOISE, *FIXED_NOISE, *OWN_STEPS, *HARMLESS, PREDICT_EPSILON}

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

TAUS = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}

# tau -> the spacing of diffusers, the most similar one if diffusers does not have that tau.
SPACINGS = {**TAUS, "uniform": "trailing", "quadratic": "trailing", "official_uniform": "leading"}


def noise_fields(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(fields of config.schedule, the prediction, fields of config.sample) for a scheduler_config.json.

    where: the file, for messages. CheckpointError, naming the setting, for an unsupported value and for a field that no
    scheduler has.
    """
    refuse = partial(unsupported, where)
    scheduler = _scheduler(values, where)
    for name in values:
        if not name.startswith("_") and name not in KNOWN:
            nearest = difflib.get_close_matches(name, sorted(KNOWN), 1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise CheckpointError(f"{where}: {files.shown(name)} is not a field of a scheduler{hint}")
    for name, (supported, text) in FIXED_NOISE.items():
        if values.get(name, supported) != supported:
            refuse(name, values[name], text)
    if str(values.get("variance_type")).startswith("learned"):  # a setting of DDPMScheduler
        refuse("variance_type", values["variance_type"], "a fixed variance, which the network does not predict")
    noise = ABSENT | settings(values, scheduler.noise, where)
    for name, table in (("prediction_type", PREDICTIONS), ("timestep_spacing", TAUS)):
        if noise[name] not in table:
            refuse(name, noise[name], ", ".join(table))
    prediction = noise["prediction_type"]
    if PREDICT_EPSILON in values:
        implied = "epsilon" if values[PREDICT_EPSILON] else "sample"
        if not isinstance(values[PREDICT_EPSILON], bool) or values.get("prediction_type", implied) != implied:
            refuse(PREDICT_EPSILON, values[PREDICT_EPSILON], f"a bool that agrees with prediction_type, {prediction!r}")
        prediction = implied

    if noise["rescale_betas_zero_snr"] and prediction == "epsilon":
        refuse("rescale_betas_zero_snr", True, "False, or True with the prediction_type sample or v_prediction")
    betas, steps = noise["trained_betas"], noise["num_train_timesteps"]
    if betas is None and noise["beta_schedule"] not in SCHEDULES:
        refuse("beta_schedule", noise["beta_schedule"], ", ".join(SCHEDULES))
    if betas is not None and len(betas) != steps:
        refuse("num_train_timesteps", steps, f"the length of trained_betas, {len(betas)}")
    schedule_fields = {
        "name": SCHEDULES[noise["beta_schedule"]] if betas is None else "from_betas",
        "num_steps": steps,
        "beta_start": noise["beta_start"],
        "beta_end": noise["beta_end"],
        "betas": tuple(betas or ()),
        "zero_terminal_snr": noise["rescale_betas_zero_snr"],
    }
    thresholding = noise["thresholding"]
    sample = {
        "clip_x0": thresholding or noise["clip_sample"],
        "clip_range": noise["sample_max_value"] if thresholding else noise["clip_sample_range"],
        "clip_quantile": noise["dynamic_thresholding_ratio"] if thresholding else 0.0,
        "tau": TAUS[noise["timestep_spacing"]],
        "tau_offset": noise["steps_offset"] if noise["timestep_spacing"] == "leading" else 0,
        "tau_end": 0 if noise["set_alpha_to_one"] else 1,
    }
    return schedule_fields, PREDICTIONS[prediction], sample


def own_steps(values: Mapping[str, Any], where: str) -> str:
    """A note that names the settings of the update step that differ from the defaults of the scheduler class: one line,
    "" if there are none. values: a scheduler_config.json that `noise_fields` accepts. where: the file.
    """
    defaults = _scheduler(values, where).own_steps
    usual = lambda name: [other.own_steps[name] for other in SCHEDULERS.values() if name in other.own_steps]
    changed = ", ".join(
        f"{name} = {files.shown(values[name])}"
        for name in values
        if name in OWN_STEPS and values[name] not in ([defaults[name]] if name in defaults else usual(name))
    )
    return changed and f"{where}: ignored, because config.sample defines the update step: {changed}"


def _scheduler(values: Mapping[str, Any], where: str) -> Scheduler:
    name = values.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        unsupported(where, "_class_name", name, ", ".join(SCHEDULERS))
    return SCHEDULERS[name]


def scheduler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler for a config with the sections model, schedule and sample. The
    inverse of `noise_fields` for all settings that diffusers has.
    """
    noise, sample = config["schedule"], config["sample"]
    beta_schedules = {name: beta_schedule for beta_schedule, name in SCHEDULES.items()}
    del beta_schedules["sigmoid"]  # DDIMScheduler does not have it
    betas = None
    if noise["name"] not in beta_schedules:
        factory = registry.resolve(registry.SCHEDULES, noise["name"])
        fields = {name: noise[name] for name in noise if name not in ("name", "options", "zero_terminal_snr")}
        alpha_bar = registry.build(factory, fields, noise.get("options", {})).alpha_bar
        betas = list(noise["betas"]) or (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
    thresholding = bool(sample["clip_x0"] and sample["clip_quantile"])
    clip_range = {"sample_max_value" if thresholding else "clip_sample_range": sample["clip_range"]}
    return {
        **NOISE,
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas) if betas else noise["num_steps"],
        "beta_start": noise["beta_start"],
        "beta_end": noise["beta_end"],
        "beta_schedule": beta_schedules.get(noise["name"], "linear"),
        "trained_betas": betas,
        "rescale_betas_zero_snr": noise["zero_terminal_snr"],
        "prediction_type": {name: kind for kind, name in PREDICTIONS.items()}[config["model"]["prediction"]],
        "clip_sample": bool(sample["clip_x0"]) and not thresholding,
        "thresholding": thresholding,
        "dynamic_thresholding_ratio": sample["clip_quantile"] or NOISE["dynamic_thresholding_ratio"],
        **clip_range,
        "timestep_spacing": SPACINGS.get(sample["tau"], "trailing"),
        "steps_offset": sample["tau_offset"],
        "set_alpha_to_one": sample["tau_end"] == 0,
    }
