"""Checkpoints of Hugging Face diffusers: unconditional and class-conditional pipelines of a `UNet2DModel`, in and
out. Its own code is not needed for either.

What a setting means is read off diffusers' `UNet2DModel` and `DDIMScheduler`; a setting that is not in a file has
the default that it has there. Whatever would change the numbers and is not supported is refused by name.
"""

from __future__ import annotations

import difflib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from ddim_jax import registry
from ddim_jax.checkpoints import parameter_names, tensors
from ddim_jax.checkpoints.hub import Folder, Repository, load_json
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.models.unet import MOST_LEVELS
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")

# Fields of UNet2DModel that must have one of these values; the first is what is assumed where the field is missing.
FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "class_embed_type": (None,),
}
# The other fields that are understood, with diffusers' defaults.
NETWORK = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "add_attention": True,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # of learned time embeddings, which are not supported
}
# Of what a field may be where its default is None.
OPTIONAL = {
    "sample_size": (int, list, tuple),
    "time_embedding_dim": int,
    "attn_norm_num_groups": int,
    "num_class_embeds": int,
    "num_train_timesteps": int,
    "trained_betas": (list, tuple),
}

# Fields of schedulers that are understood, with the defaults of DDIMScheduler.
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
# Those that change what the network's output or its time means, which must have the one value here.
FIXED_NOISE = {
    "use_flow_sigmas": (False, "False: the noise of flow matching is not that of DDPM"),
    "use_dynamic_shifting": (False, "False: the noise of flow matching is not that of DDPM"),
    "timestep_type": ("discrete", "'discrete': the network counts levels"),
    "timestep_values": (None, "None: the levels are 0..num_train_timesteps - 1"),
}
# Of other schedulers, and of the first versions: without any influence on these.
HARMLESS = ("tensor_format", "interpolation_type", "original_inference_steps", "timestep_scaling")
PREDICT_EPSILON = "predict_epsilon"  # what was there before prediction_type, version 0.9


class Scheduler(NamedTuple):
    """The fields of a class of schedulers, with their defaults."""

    noise: Mapping[str, Any]  # those of NOISE that it has: they mean the same in all
    own_steps: Mapping[str, Any] = {}  # how it steps, which is not taken over


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
_NEVER_CLIPS = ("clip_sample", "clip_sample_range", "set_alpha_to_one")  # what the solvers do not have
_DDPM = Scheduler(_noise("set_alpha_to_one"), {"variance_type": "fixed_small"})

# Schedulers whose noising is that of DDPM: their alpha_bar means the same. How they step is not taken from them.
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
# Where a class has no such field. DPMSolverSinglestepScheduler's spacing is linspace.
ABSENT = {**NOISE, "clip_sample": False, "timestep_spacing": "linspace"}
OWN_STEPS = {name for scheduler in SCHEDULERS.values() for name in scheduler.own_steps}
KNOWN = {*NOISE, *FIXED_NOISE, *OWN_STEPS, *HARMLESS, PREDICT_EPSILON}

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
TAUS = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
# Where a spacing is not known to diffusers, the nearest that it knows.
SPACINGS = {**TAUS, "uniform": "trailing", "quadratic": "trailing", "official_uniform": "leading"}
DOWNSAMPLE_PADDING = {0: "end", 1: "both"}
LABEL_DROPOUT = "_label_dropout"  # ours, which diffusers does not look at: the last of its classes is none

WEIGHTS = "diffusion_pytorch_model"
CARD = "README.md"
WRITTEN = (
    f"unet/{WEIGHTS}.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    CARD,
    "model_index.json",  # the last, in this order and in that of `files.filling`: it makes a pipeline of the folder
)


def is_there(files: Folder | Repository) -> bool:
    return files.find("model_index.json") is not None


def open_folder(files: Folder | Repository) -> CheckpointInfo:
    """What a pipeline's folder, or its repository on the hub, says. CheckpointError if it is not of this kind."""
    index = load_json(_required(files, "model_index.json"))
    _check_pipeline(index, files.source)
    unet = _required(files, "unet/config.json", "config.json")
    noise = _required(files, "scheduler/scheduler_config.json", "scheduler_config.json")
    # The tensors stand beside their config.json, in unet/ or, in the first repositories, in the root.
    folder = "unet/" if unet.parent.name == "unet" else ""

    def read(like: Any, ema: bool) -> Any:
        no_raw_parameters(files.source, ema)
        path = _required(files, f"{folder}{WEIGHTS}.safetensors", f"{folder}{WEIGHTS}.bin")
        if path.suffix == ".bin":
            found = tensors.from_torch(str(path), tensors.load_torch(path))
        else:
            found, _ = tensors.open_safetensors(path)
        old = any(".attentions." in name and name.endswith(".query.weight") for name in found.shapes)
        layout = parameter_names.DIFFUSERS_OLD if old else parameter_names.DIFFUSERS
        return tensors.read(found._replace(layout=layout), like, "its unet/config.json")

    model = network_fields(load_json(unet), f"{files.source}: unet/config.json")
    values, where = load_json(noise), f"{files.source}: scheduler_config.json"
    if "_class_name" not in values and _class_in(index, "scheduler"):
        values["_class_name"] = _class_in(index, "scheduler")
    schedule_fields, prediction, sample = noise_fields(values, where)
    return CheckpointInfo(
        files.source,
        read,
        name=files.name,
        model=model | {"prediction": prediction},
        schedule=schedule_fields,
        sample=sample,
        note=own_steps(values, where),
    )


def _required(files: Folder | Repository, *candidates: str) -> pathlib.Path:
    found = files.find(*candidates)
    if found is None:
        raise CheckpointError(f"{files.source} has no {' or '.join(candidates)}{files.why_missing()}")
    return found


def _class_in(index: Mapping[str, Any], name: str) -> Any:
    """The class of a component of a pipeline, None if it is not there."""
    value = index.get(name)
    return value[-1] if isinstance(value, list) and value else None


def _check_pipeline(index: Mapping[str, Any], source: str) -> None:
    supported = f"supported: {', '.join(PIPELINES)} of a UNet2DModel and a scheduler"
    kind = partial(_class_in, index)
    present = [name for name in index if not name.startswith("_") and kind(name)]
    other = [name for name in present if name not in ("unet", "scheduler")]
    found = f"{source} is a {index.get('_class_name')}"
    if kind("unet") != "UNet2DModel":
        raise CheckpointError(f"{found} whose unet is {kind('unet') or 'not there'}; {supported}")
    if other:
        raise CheckpointError(f"{found} with {', '.join(other)} beside its unet; {supported}")
    if str(index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{found}; {supported}")


def _refuse(where: str, name: str, found: Any, supported: str):
    raise CheckpointError(f"{where}: {name} = {files.shown(found)} is not supported; supported: {supported}")


def _settings(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of all fields of defaults. CheckpointError for one of another kind than its default."""
    settings = {**defaults, **{name: values[name] for name in defaults if name in values}}
    for name, default in defaults.items():
        value = settings[name]
        if value is None and (default is None or name == "attention_head_dim"):
            continue
        kinds = {bool: bool, str: str, tuple: (list, tuple), type(None): OPTIONAL.get(name)}
        kind = kinds.get(type(default), (int, float))
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            like = "a list" if kind == (list, tuple) and default is None else f"like {default!r}"
            raise CheckpointError(f"{where}: {name} must be {like}, got {files.shown(value)}")
    return settings


def network_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of config.model that a `UNet2DModel`'s config.json means, but for the prediction. CheckpointError,
    naming the setting, for what ddim_jax's network cannot be.
    """
    refuse = partial(_refuse, where)
    if values.get("_class_name", "UNet2DModel") != "UNet2DModel":
        refuse("_class_name", values["_class_name"], "UNet2DModel")
    for name, supported in FIXED.items():
        if values.get(name, supported[0]) not in supported:
            refuse(name, values[name], " or ".join(map(repr, supported)))
    for name in values:
        if not name.startswith("_") and name not in FIXED and name not in NETWORK and values[name] is not None:
            refuse(name, values[name], ", ".join([*NETWORK, *FIXED]))
    unet = _settings(values, NETWORK, where)

    widths = unet["block_out_channels"]
    positive = all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths)
    if not widths or not positive or any(width % widths[0] for width in widths):
        refuse("block_out_channels", widths, "multiples of the first")
    if len(widths) > MOST_LEVELS:
        refuse("block_out_channels", widths, f"at most {MOST_LEVELS}")
    channels = widths[0]
    size = unet["sample_size"]
    if isinstance(size, (list, tuple)) and size and all(length == size[0] for length in size):
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool):
        refuse("sample_size", size, "the height of square images")
    if unet["in_channels"] != unet["out_channels"]:
        refuse("out_channels", unet["out_channels"], f"in_channels, which is {unet['in_channels']}")
    if unet["time_embedding_dim"] not in (None, 4 * channels):
        refuse("time_embedding_dim", unet["time_embedding_dim"], f"4 times the first of block_out_channels, {channels}")
    if unet["attn_norm_num_groups"] not in (None, unet["norm_num_groups"]):
        refuse("attn_norm_num_groups", unet["attn_norm_num_groups"], f"norm_num_groups, {unet['norm_num_groups']}")
    if unet["downsample_padding"] not in DOWNSAMPLE_PADDING:
        refuse("downsample_padding", unet["downsample_padding"], " or ".join(map(str, DOWNSAMPLE_PADDING)))

    hidden = values.get(LABEL_DROPOUT, 0.0)
    if not isinstance(hidden, float) or hidden and (unet["num_class_embeds"] or 0) < 2:
        refuse(LABEL_DROPOUT, hidden, "a number, 0.0 for a network without classes")

    attended = {}
    for direction in ("down", "up"):
        types = [str(name).removeprefix("UNetRes") for name in unet[f"{direction}_block_types"]]
        plain, attention = f"{direction.capitalize()}Block2D", f"Attn{direction.capitalize()}Block2D"
        for name in types:
            if name not in (plain, attention):
                refuse(f"{direction}_block_types", name, f"{plain} or {attention}")
        if len(types) != len(widths):
            refuse(f"{direction}_block_types", types, f"one for each of block_out_channels {list(widths)}")
        attended[direction] = [name == attention for name in types]
    if attended["up"] != attended["down"][::-1]:
        refuse("up_block_types", unet["up_block_types"], "attention at the sizes where down_block_types has it")

    return {
        "name": "unet",
        "image_size": size,
        "image_channels": unet["in_channels"],
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": tuple(size >> level for level, attends in enumerate(attended["down"]) if attends),
        "middle_attention": unet["add_attention"],
        "head_channels": unet["attention_head_dim"] or 0,
        "groups": unet["norm_num_groups"],
        "norm_epsilon": unet["norm_eps"],
        "downsample_padding": DOWNSAMPLE_PADDING[unet["downsample_padding"]],
        "frequency_shift": unet["freq_shift"],
        "cos_first": unet["flip_sin_to_cos"],
        "dropout": unet["dropout"],
        "num_classes": (unet["num_class_embeds"] or 0) - (hidden > 0),
        "label_dropout": hidden,
    }


def noise_fields(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """(fields of config.schedule, the prediction, fields of config.sample) of a scheduler_config.json.
    CheckpointError, naming the setting, for noise that is not supported, and for a field that no scheduler has.
    """
    refuse = partial(_refuse, where)
    scheduler = _scheduler(values, where)
    for name in values:
        if not name.startswith("_") and name not in KNOWN:
            nearest = difflib.get_close_matches(name, sorted(KNOWN), 1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise CheckpointError(f"{where}: {files.shown(name)} is no known field of a scheduler{hint}")
    for name, (supported, why) in FIXED_NOISE.items():
        if values.get(name, supported) != supported:
            refuse(name, values[name], why)
    if str(values.get("variance_type")).startswith("learned"):  # of DDPMScheduler
        refuse("variance_type", values["variance_type"], "a fixed variance: the network then predicts nothing else")
    noise = ABSENT | _settings(values, scheduler.noise, where)
    for name, table in (("prediction_type", PREDICTIONS), ("timestep_spacing", TAUS)):
        if noise[name] not in table:
            refuse(name, noise[name], ", ".join(table))
    prediction = noise["prediction_type"]
    if PREDICT_EPSILON in values:
        meant = "epsilon" if values[PREDICT_EPSILON] else "sample"
        if not isinstance(values[PREDICT_EPSILON], bool) or values.get("prediction_type", meant) != meant:
            refuse(PREDICT_EPSILON, values[PREDICT_EPSILON], f"what prediction_type, {prediction!r}, means too")
        prediction = meant

    if noise["rescale_betas_zero_snr"] and prediction == "epsilon":
        refuse("rescale_betas_zero_snr", True, "False, or a prediction_type sample or v_prediction")
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
    """What a scheduler_config.json, which `noise_fields` accepts, says of how its class steps other than by default: a
    line for people, "" for nothing.
    """
    defaults = _scheduler(values, where).own_steps
    usual = lambda name: [other.own_steps[name] for other in SCHEDULERS.values() if name in other.own_steps]
    changed = ", ".join(
        f"{name} = {files.shown(values[name])}"
        for name in values
        if name in OWN_STEPS and values[name] not in ([defaults[name]] if name in defaults else usual(name))
    )
    return changed and f"{where}: not used, as config.sample says how to step: {changed}"


def _scheduler(values: Mapping[str, Any], where: str) -> Scheduler:
    name = values.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        _refuse(where, "_class_name", name, ", ".join(SCHEDULERS))
    return SCHEDULERS[name]


def unet_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` for the fields of config.model: the inverse of `network_fields`."""
    if model["patch_size"] != 1:
        raise CheckpointError(f"model.patch_size must be 1: UNet2DModel has no patches; got {model['patch_size']}")
    levels = len(model["channel_mult"])
    attends = [model["image_size"] >> level in model["attention_resolutions"] for level in range(levels)]
    kinds = lambda direction: [("Attn" if attends_here else "") + f"{direction}Block2D" for attends_here in attends]
    return {
        "_class_name": "UNet2DModel",
        **{name: supported[0] for name, supported in FIXED.items()},
        "sample_size": model["image_size"],
        "in_channels": model["image_channels"],
        "out_channels": model["image_channels"],
        "freq_shift": _int_if_whole(model["frequency_shift"]),
        "flip_sin_to_cos": model["cos_first"],
        "down_block_types": kinds("Down"),
        "up_block_types": kinds("Up")[::-1],
        "block_out_channels": [model["channels"] * mult for mult in model["channel_mult"]],
        "layers_per_block": model["num_res_blocks"],
        "downsample_padding": {name: padding for padding, name in DOWNSAMPLE_PADDING.items()}[
            model["downsample_padding"]
        ],
        "dropout": model["dropout"],
        "attention_head_dim": model["head_channels"] or None,
        "norm_num_groups": model["groups"],
        "norm_eps": model["norm_epsilon"],
        "add_attention": model["middle_attention"],
        "num_class_embeds": model["num_classes"] + (model["label_dropout"] > 0) or None,
        **({LABEL_DROPOUT: model["label_dropout"]} if model["label_dropout"] else {}),
    }


def _int_if_whole(value: float) -> float:
    return int(value) if value == int(value) else value


def scheduler_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler for a config with the sections model, schedule and sample: the
    inverse of `noise_fields`, where diffusers has the setting.
    """
    noise, sample = config["schedule"], config["sample"]
    theirs = {ours: name for name, ours in SCHEDULES.items() if ours != "sigmoid"}  # which DDIMScheduler has not
    betas = None
    if noise["name"] not in theirs:
        factory = registry.resolve(registry.SCHEDULES, noise["name"])
        fields = {name: noise[name] for name in noise if name not in ("name", "options", "zero_terminal_snr")}
        alpha_bar = registry.build(factory, fields, noise["options"]).alpha_bar
        betas = list(noise["betas"]) or (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
    thresholding = bool(sample["clip_x0"] and sample["clip_quantile"])
    clip_range = {"sample_max_value" if thresholding else "clip_sample_range": sample["clip_range"]}
    return {
        **NOISE,
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas) if betas else noise["num_steps"],
        "beta_start": noise["beta_start"],
        "beta_end": noise["beta_end"],
        "beta_schedule": theirs.get(noise["name"], "linear"),
        "trained_betas": betas,
        "rescale_betas_zero_snr": noise["zero_terminal_snr"],
        "prediction_type": {ours: name for name, ours in PREDICTIONS.items()}[config["model"]["prediction"]],
        "clip_sample": bool(sample["clip_x0"]) and not thresholding,
        "thresholding": thresholding,
        "dynamic_thresholding_ratio": sample["clip_quantile"] or NOISE["dynamic_thresholding_ratio"],
        **clip_range,
        "timestep_spacing": SPACINGS.get(sample["tau"], "trailing"),
        "steps_offset": sample["tau_offset"],
        "set_alpha_to_one": sample["tau_end"] == 0,
    }


def save(folder: pathlib.Path, params: Any, config: Mapping[str, Any], card: str) -> None:
    """Writes the folder that `DDIMPipeline.from_pretrained` reads. config: model, schedule and sample, with tau and
    clip_x0 decided. card: the README.md.
    """
    levels = len(config["model"]["channel_mult"])
    state = {
        parameter_names.DIFFUSERS.name(path, levels): np.ascontiguousarray(
            parameter_names.to_theirs(path, np.asarray(leaf), parameter_names.DIFFUSERS)
        )
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }
    index = {
        "_class_name": "DDIMPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    as_json = lambda values: (json.dumps(values, indent=2) + "\n").encode()
    contents = (
        tensors.to_safetensors(state, {"format": "pt"}),
        as_json(unet_config(config["model"])),
        as_json(scheduler_config(config)),
        card.encode(),
        as_json(index),
    )
    with files.filling(folder) as temporary:
        for name, content in zip(WRITTEN, contents, strict=True):
            (temporary / name).parent.mkdir(exist_ok=True)
            with files.replacing(temporary / name) as file:
                file.write(content)


def not_written(folder: pathlib.Path, inside: str = "") -> Iterator[str]:
    """What is in a folder but none of the files that `save` writes."""
    for path in folder.iterdir():
        name = f"{inside}{path.name}"
        if path.is_dir() and not path.is_symlink() and any(file.startswith(f"{name}/") for file in WRITTEN):
            yield from not_written(path, f"{name}/")
        elif not files.is_temporary(path) and (name not in WRITTEN or not path.is_file()):
            yield name
