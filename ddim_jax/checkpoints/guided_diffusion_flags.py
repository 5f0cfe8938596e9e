"""The flags of the training scripts of guided-diffusion, improved-diffusion and consistency_models, and their
config.model.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from ddim_jax.models.unet import multipliers
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

FLAGS = "model_flags.txt"
FLAGS_BYTES = 1 << 16  # the limit for this file
CLASSES = 1000  # the number of classes of ImageNet

# The supported flags, with the defaults of guided-diffusion.
DEFAULTS: Mapping[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
    "training_mode": "",
}

# Flags that change neither the network's output nor the noise schedule. They are ignored.
IGNORED = (
    *("use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "sigma_small", "timestep_respacing"),
    *("lr", "batch_size", "microbatch", "ema_rate", "lr_anneal_steps", "weight_decay", "schedule_sampler", "data_dir"),
    *(
        "num_samples",
        "model_path",
        "log_interval",
        "save_interval",
        "resume_checkpoint",
        "fp16_scale_growth",
        "use_ddim",
    ),
    # of consistency_models
    *("weight_schedule", "global_batch_size", "sampler", "steps", "generator", "seed", "s_churn", "sigma_min"),
    "sigma_max",
)

# image_size -> channel_mult, if the flag channel_mult is empty
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}

SCHEDULES = {"linear": "linear", "cosine": "cosine"}

# The networks of EDM in consistency_models (Song et al. 2023), the teachers of its consistency models.
EDM = "edm"
EDM_TIME_SCALE = 1000.0  # the network's time is 1000 ln(sigma) / 4

_ADM = (
    "--attention_resolutions 32,16,8 --learn_sigma True --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True"
)

_IMPROVED = "--learn_sigma True --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True"

_EDM = "--training_mode edm --attention_resolutions 32,16,8 --num_head_channels 64 --resblock_updown True --dropout 0.1"

# Published files: a regular expression of the name without the suffix -> the flags in the READMEs.
PUBLISHED = {
    "64x64_diffusion": (
        f"{_ADM} --image_size 64 --class_cond True --dropout 0.1 --noise_schedule cosine --num_channels 192 "
        f"--num_res_blocks 3 --use_new_attention_order True"
    ),
    "128x128_diffusion": f"{_ADM} --image_size 128 --class_cond True --num_heads 4 --num_head_channels -1",
    "256x256_diffusion": f"{_ADM} --image_size 256 --class_cond True",
    "256x256_diffusion_uncond": f"{_ADM} --image_size 256",
    "512x512_diffusion": f"{_ADM} --image_size 512 --class_cond True",
    "lsun_(bedroom|cat|horse)(_nodropout)?": f"{_ADM} --image_size 256 --dropout 0.1",
    "cifar10_uncond_50M_500K": f"{_IMPROVED} --image_size 32 --num_res_blocks 3 --dropout 0.3",
    "imagenet64_uncond_100M_1500K": f"{_IMPROVED} --image_size 64 --num_res_blocks 3",
    "imagenet64_cond_270M_250K": (
        f"{_IMPROVED} --image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True"
    ),
    r"lsun_uncond_100M_\w+": (
        "--image_size 256 --num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16"
    ),
    "edm_imagenet64_ema": f"{_EDM} --image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True",
    "edm_(bedroom|cat)256_ema": f"{_EDM} --image_size 256 --num_channels 256 --use_scale_shift_norm False",
}


def flags_of(path: pathlib.Path) -> tuple[dict[str, Any], str]:
    """(the flags of a checkpoint, their source for messages). They are read from FLAGS in the folder of the file. If
    there is no FLAGS, they are those of the published file with this name. CheckpointError if there is neither.
    """
    file = path.with_name(FLAGS)
    if file.is_file():
        files.check_regular(file)
        if (size := file.stat().st_size) > FLAGS_BYTES:
            raise CheckpointError(f"{file} must have at most {FLAGS_BYTES} bytes, got {size}")
        return parse_flags(file.read_text(errors="replace"), str(file)), f"the {FLAGS} in its folder"
    for name, flags in PUBLISHED.items():
        if re.fullmatch(name, path.stem):
            return parse_flags(flags, path.stem), "the published network of that name"
    names = ", ".join(re.sub(r"\((\w+)[|\w]*\)(\(\w+\)\?)?", r"\1", name.replace(r"\w+", "*")) for name in PUBLISHED)
    raise CheckpointError(
        f"{path} does not determine its network and noise schedule; put {FLAGS} with the flags of its training into "
        f"its folder (only the published files do not need it: {names})"
    )


def parse_flags(text: str, where: str) -> dict[str, Any]:
    """The flags "--name value" in a text; a missing flag has its default. The text may be lines of a shell script
    (MODEL_FLAGS="..."). CheckpointError for an unsupported flag, and for a value of another type. where: the source of
    the text, for messages.
    """
    text = re.sub(r"#.*|\b[A-Z_]+=|[\"']", " ", text)
    flags, words = dict(DEFAULTS), iter(text.split())
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise CheckpointError(f"{where}: expected --name value, got {files.shown(word)}")
        value = value if equals else next(words, None)
        if name in IGNORED:
            continue
        if name not in DEFAULTS:
            raise CheckpointError(f"{where}: --{files.shown(name)} is not supported; supported: {', '.join(DEFAULTS)}")
        flags[name] = _typed(name, value, where)
    return flags


def _typed(name: str, value: str | None, where: str) -> Any:
    kind = type(DEFAULTS[name])
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        return kind(value)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: --{name} must be of type {kind.__name__}, got {files.shown(value)}") from None


def network_fields(flags: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of config.model for these flags. CheckpointError, naming the flag, for an unsupported value. where:
    the source of the flags, for messages.
    """

    def refuse(name: str, supported: str) -> None:
        raise CheckpointError(f"{where}: --{name} {files.shown(flags[name])} is not supported; supported: {supported}")

    size = flags["image_size"]
    if flags["channel_mult"]:
        mult = tuple(_numbers(flags, "channel_mult", float, where))
    elif size in CHANNEL_MULT:
        mult = CHANNEL_MULT[size]
    else:
        refuse("image_size", f"{', '.join(map(str, CHANNEL_MULT))}, or any with --channel_mult")
    widths = [int(factor * flags["num_channels"]) for factor in mult]
    if not widths or min(widths) < 1:
        refuse("channel_mult", "numbers above 0")
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        refuse("num_heads_upsample", "-1, or the value of --num_heads")
    if flags["noise_schedule"] not in SCHEDULES:
        refuse("noise_schedule", ", ".join(SCHEDULES))
    if not 1 <= flags["diffusion_steps"] <= 1_000_000:
        refuse("diffusion_steps", "1..1000000")
    if flags["training_mode"] not in ("", EDM):
        refuse("training_mode", f"{EDM}; a consistency model is not a network of the DDIM family, its teacher is")
    is_edm = flags["training_mode"] == EDM
    for name, value in {"learn_sigma": False, "predict_xstart": False, "rescale_timesteps": False}.items():
        if is_edm and flags[name] != value:
            refuse(name, f"{value} with --training_mode {EDM}")
    divided = flags["num_head_channels"] != -1
    name = "num_head_channels" if divided else "num_heads"
    if flags[name] < 1:
        refuse(name, "a number of at least 1")
    return {
        "image_size": size,
        "image_channels": 3,
        "channels": widths[0],
        "channel_mult": multipliers(widths),
        "time_channels": flags["num_channels"],
        "num_res_blocks": flags["num_res_blocks"],
        "attention_resolutions": tuple(_numbers(flags, "attention_resolutions", int, where)),
        "middle_attention": True,
        "head_channels": flags["num_head_channels"] if divided else 0,
        "num_heads": 0 if divided else flags["num_heads"],
        "groups": 32,
        "norm_epsilon": 1e-5,
        "scale_shift": flags["use_scale_shift_norm"],
        "resample": "block" if flags["resblock_updown"] else "conv",
        "downsample_padding": "both",
        "frequency_shift": 0.0,
        "cos_first": True,
        "time_scale": _time_scale(flags),
        "learn_sigma": flags["learn_sigma"],
        "num_classes": CLASSES if flags["class_cond"] else 0,
        "label_dropout": 0.0,
        "dropout": flags["dropout"],
        "prediction": "edm" if is_edm else "x0" if flags["predict_xstart"] else "eps",
    }


def _time_scale(flags: Mapping[str, Any]) -> float:
    if flags["training_mode"] == EDM:
        return EDM_TIME_SCALE
    return 1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0


def _numbers(flags: Mapping[str, Any], name: str, kind: type, where: str) -> list[Any]:
    try:
        return [kind(part) for part in flags[name].split(",") if part.strip()]
    except ValueError:
        raise CheckpointError(
            f"{where}: --{name} must be comma-separated numbers, got {files.shown(flags[name])}"
        ) from None
