"""The scheduler_config.json of diffusers: conversion to and from the fields of config.schedule and config.sample.

Settings have the meaning that they have in diffusers' schedulers. A setting that is missing in a file has the default
of its scheduler class. Unsupported settings that change the numbers raise an error that names them.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ddim_jax import registry
from ddim_jax.checkpoints.diffusers_scheduler_fields import (
    ABSENT,
    FIXED_NOISE,
    KNOWN,
    NOISE,
    PREDICT_EPSILON,
    REFUSED,
    SCHEDULERS,
    UPDATE_STEP,
    Scheduler,
)
from ddim_jax.checkpoints.diffusers_settings import settings, unsupported
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

OLD_PREDICTIONS = {"original_sample": "x0"}  # a name that EulerDiscreteScheduler has for "sample"

LEARNED = "learned_range"  # the variance_type of `samplers.ddpm_learned`

MOST_BETAS = 1_000_000  # of these schedules
MAX_BETA = 0.999  # of the schedules that alpha_bar defines


def _laplace(u: float) -> float:
    """The signal of the schedule "laplace" at u = t / T in [0, 1]: sqrt(snr / (1 + snr)) for a log-SNR with the
    quantiles of a Laplace distribution of scale 1/2. diffusers takes beta from its ratios, as if it were alpha_bar.
    """
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


# Schedules of diffusers that config.schedule does not name: beta_t = 1 - f(t / T) / f((t - 1) / T), at most MAX_BETA.
SIGNALS: Mapping[str, Callable[[float], float]] = {"laplace": _laplace, "exp": lambda u: math.exp(-12 * u)}

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
    if values.get("variance_type") == "learned":  # the network outputs the variance, not a fraction
        refuse("variance_type", "learned", f"{LEARNED}, or a fixed variance")
    noise = ABSENT | settings(values, scheduler.noise, where)
    predictions = PREDICTIONS | OLD_PREDICTIONS
    for name, table in (("prediction_type", predictions), ("timestep_spacing", TAUS)):
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
    if betas is None and noise["beta_schedule"] not in SCHEDULES | SIGNALS:
        refuse("beta_schedule", noise["beta_schedule"], ", ".join(SCHEDULES | SIGNALS))
    if betas is None and noise["beta_schedule"] in SIGNALS:
        if not isinstance(steps, int) or not 1 <= steps <= MOST_BETAS:
            refuse("num_train_timesteps", steps, f"1..{MOST_BETAS}")
        signal = [SIGNALS[noise["beta_schedule"]](t / steps) for t in range(steps + 1)]
        betas = [min(1 - b / a, MAX_BETA) for a, b in itertools.pairwise(signal)]
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
    return schedule_fields, predictions[prediction], sample


def learns_variance(values: Mapping[str, Any]) -> bool:
    """Whether the network also predicts the variance. values: a scheduler_config.json that `noise_fields` accepts."""
    return values.get("variance_type") == LEARNED


def update_step(values: Mapping[str, Any], where: str) -> str:
    """A note that names the settings of the update step that differ from the defaults of the scheduler class: one line,
    "" if there are none. values: a scheduler_config.json that `noise_fields` accepts. where: the file.
    """
    own = lambda scheduler: {**scheduler.update_step, **scheduler.removed}
    defaults = own(_scheduler(values, where))
    usual = lambda name: [own(other)[name] for other in SCHEDULERS.values() if name in own(other)]
    changed = ", ".join(
        f"{name} = {files.shown(values[name])}"
        for name in values
        if name in UPDATE_STEP and values[name] not in ([defaults[name]] if name in defaults else usual(name))
    )
    return changed and f"{where}: ignored, because config.sample defines the update step: {changed}"


def _scheduler(values: Mapping[str, Any], where: str) -> Scheduler:
    name = values.get("_class_name", "DDIMScheduler")
    if isinstance(name, str) and name in REFUSED:
        unsupported(where, "_class_name", name, f"DDIMScheduler, DDPMScheduler and others of DDPM; {REFUSED[name]}")
    if not isinstance(name, str) or name not in SCHEDULERS:
        unsupported(where, "_class_name", name, ", ".join(SCHEDULERS))
    return SCHEDULERS[name]


def scheduler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler for a config with the sections model, schedule and sample. The
    inverse of `noise_fields` for all settings that diffusers has.

    A network that predicts a variance has a DDPMScheduler: DDIMScheduler cannot use its output.
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
    learned = config["model"].get("learn_sigma", False)
    known = NOISE if not learned else SCHEDULERS["DDPMScheduler"].noise
    values = {
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
    return {
        "_class_name": "DDPMScheduler" if learned else "DDIMScheduler",
        **{name: values.get(name, default) for name, default in known.items()},
        **({"variance_type": LEARNED} if learned else {}),
    }
