"""The fields of diffusers' schedulers: which of them are read, which change only the update step of a scheduler, and
which must have one value.

Each field of each class in SCHEDULERS is in exactly one of these groups. A test compares the tables with the signatures
of the installed version of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    "timestep_values": (None, "None (the timesteps are 0..num_train_timesteps - 1)"),  # diffusers 0.1 to 0.3
}

# Fields without effect on the supported schedulers: the array library, before diffusers 0.4; fields of LCMScheduler.
HARMLESS = ("tensor_format", "original_inference_steps", "timestep_scaling")

PREDICT_EPSILON = "predict_epsilon"  # the predecessor of prediction_type, before diffusers 0.9


class Scheduler(NamedTuple):
    """The fields of a scheduler class, with their defaults."""

    noise: Mapping[str, Any]  # the fields of NOISE that the class has; their meaning is the same in all classes
    update_step: Mapping[str, Any] = {}  # the fields that change only its update step, which is not used
    removed: Mapping[str, Any] = {}  # the same, of earlier versions of diffusers


def _noise(*missing: str, **changed: Any) -> dict[str, Any]:
    return {name: changed.get(name, default) for name, default in NOISE.items() if name not in missing}


_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}

_SOLVER = {"solver_order": 2, "lower_order_final": True, **_SIGMAS, "flow_shift": 1.0}

_SHIFT = {"time_shift_type": "exponential"}

_DPM = {
    **_SOLVER,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}

_NEVER_CLIPS = ("clip_sample", "clip_sample_range", "set_alpha_to_one")  # fields that the solvers do not have
_THRESHOLD = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_ZERO_SNR = "rescale_betas_zero_snr"

# The defaults of the schedulers that follow k-diffusion, which are those of Stable Diffusion.
_K_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "linspace"}

_DDPM = Scheduler(_noise("set_alpha_to_one"), {"variance_type": "fixed_small"})
_KDPM2 = Scheduler(_noise(*_NEVER_CLIPS, *_THRESHOLD, _ZERO_SNR, **_K_BETAS), _SIGMAS)

# Schedulers with the forward process of DDPM: alpha_bar has the same meaning in all. Their update steps are not used.
SCHEDULERS = {
    "DDIMScheduler": Scheduler(NOISE),
    "DDPMScheduler": _DDPM,
    "PNDMScheduler": Scheduler(
        _noise("clip_sample", "clip_sample_range", _ZERO_SNR, *_THRESHOLD, set_alpha_to_one=False),
        {"skip_prk_steps": False},
    ),
    "DDIMParallelScheduler": Scheduler(NOISE),
    "DDPMParallelScheduler": _DDPM,
    "DDIMInverseScheduler": Scheduler(_noise(*_THRESHOLD), removed={"set_alpha_to_zero": True}),
    "DPMSolverMultistepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, timestep_spacing="linspace"),
        {**_DPM, **_SHIFT, "final_sigmas_type": "zero", "euler_at_final": False, "use_lu_lambdas": False},
    ),
    "DPMSolverMultistepInverseScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, _ZERO_SNR, timestep_spacing="linspace"), {**_DPM, "euler_at_final": False}
    ),
    "DPMSolverSinglestepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, "timestep_spacing", "steps_offset", _ZERO_SNR),
        {**_DPM, **_SHIFT, "final_sigmas_type": "zero", "lower_order_final": False},
    ),
    "DPMSolverSDEScheduler": Scheduler(_KDPM2.noise, {**_SIGMAS, "noise_sampler_seed": None}),
    "DEISMultistepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, _ZERO_SNR, timestep_spacing="linspace"),
        {**_SOLVER, **_SHIFT, "algorithm_type": "deis", "solver_type": "logrho"},
    ),
    "UniPCMultistepScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, timestep_spacing="linspace"),
        {
            **_SOLVER,
            **_SHIFT,
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
    "SASolverScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, _ZERO_SNR, timestep_spacing="linspace"),
        {
            **_SIGMAS,
            "predictor_order": 2,
            "corrector_order": 2,
            "tau_func": None,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
            "flow_shift": 1.0,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
    ),
    "EulerDiscreteScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, *_THRESHOLD, timestep_spacing="linspace"),
        {
            **_SIGMAS,
            "interpolation_type": "linear",
            "sigma_min": None,
            "sigma_max": None,
            "final_sigmas_type": "zero",
        },
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(_noise(*_NEVER_CLIPS, *_THRESHOLD, timestep_spacing="linspace")),
    "HeunDiscreteScheduler": Scheduler(
        _noise("set_alpha_to_one", *_THRESHOLD, _ZERO_SNR, **_K_BETAS, clip_sample=False), _SIGMAS
    ),
    "KDPM2DiscreteScheduler": _KDPM2,
    "KDPM2AncestralDiscreteScheduler": _KDPM2,
    "LMSDiscreteScheduler": Scheduler(
        _noise(*_NEVER_CLIPS, *_THRESHOLD, _ZERO_SNR, timestep_spacing="linspace"), _SIGMAS
    ),
}

# Schedulers of other networks than those of DDPM -> why ddim_jax does not read them.
_EDM = "the network has the preconditioning of EDM"
_CONSISTENCY = "the network is a consistency model"
_FLOW = "the network is of flow matching"
_VE = "the noise is variance-exploding"
_SHIFTED = "its snr_shift_scale changes the noise"
_CONTINUOUS = "its timesteps are in (0, 1]"
_DISCRETE = "the data is discrete"
REFUSED = {
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": _EDM,
    "CosineDPMSolverMultistepScheduler": _EDM,
    "CMStochasticIterativeScheduler": _CONSISTENCY,
    "ConsistencyDecoderScheduler": _CONSISTENCY,
    "LCMScheduler": _CONSISTENCY,
    "SCMScheduler": _CONSISTENCY,
    "TCDScheduler": _CONSISTENCY,
    "FlowMapEulerDiscreteScheduler": _FLOW,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "HeliosDMDScheduler": _FLOW,
    "HeliosScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "MiniMaxH3Scheduler": _FLOW,
    "PiflowScheduler": _FLOW,
    "RFD4ProteinaScheduler": _FLOW,
    "ScoreSdeVeScheduler": _VE,
    "KarrasVeScheduler": _VE,
    "ScoreSdeVpScheduler": _CONTINUOUS,
    "DDPMWuerstchenScheduler": _CONTINUOUS,
    "CogVideoXDDIMScheduler": _SHIFTED,
    "CogVideoXDPMScheduler": _SHIFTED,
    "IPNDMScheduler": "its noise has alpha_bar = cos^2",
    "RePaintScheduler": "its steps are those of inpainting",
    "UnCLIPScheduler": "the network is that of unCLIP",
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "VQDiffusionScheduler": _DISCRETE,
}

# The values for a class that does not have the field. The spacing of DPMSolverSinglestepScheduler is linspace.
ABSENT = {**NOISE, "clip_sample": False, "timestep_spacing": "linspace"}

UPDATE_STEP = {name for scheduler in SCHEDULERS.values() for name in (*scheduler.update_step, *scheduler.removed)}

KNOWN = {*NOISE, *FIXED_NOISE, *UPDATE_STEP, *HARMLESS, PREDICT_EPSILON}
