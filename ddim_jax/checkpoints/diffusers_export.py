"""Export of a trained network as a diffusers folder, which `DDIMPipeline.from_pretrained` reads."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import flax.traverse_util
import numpy as np

from ddim_jax.checkpoints import parameter_names, tensors
from ddim_jax.checkpoints.diffusers_network import (
    DOWNSAMPLE_PADDING,
    FIXED,
    LABEL_DROPOUT,
    PLAIN_BLOCKS,
    RESAMPLE,
    SCALE_SHIFT,
)
from ddim_jax.checkpoints.diffusers_scheduler import PREDICTIONS, scheduler_config
from ddim_jax.checkpoints.diffusers_weights import WEIGHTS
from ddim_jax.models.unet import NO_NORM
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

CARD = "README.md"

# Fields of config.model that configs of earlier versions do not have, and their defaults.
DEFAULTS = {
    "name": "unet",
    "attention_resolutions_down": (),
    "attention_resolutions_up": (),
    "middle_groups": 0,
    "num_heads": 0,
    "scale_shift": False,
    "resample": "conv",
    "time_channels": 0,
    "time_scale": 1.0,
    "learn_sigma": False,
}

WRITTEN = (
    f"unet/{WEIGHTS}.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    CARD,
    "model_index.json",  # `files.filling` moves it last: a folder with this file is a pipeline
)


def unet_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` for the fields of config.model. The inverse of `network_fields`.
    CheckpointError, naming the field, for a network that `UNet2DModel` cannot represent.
    """
    model = {**DEFAULTS, **model}
    _only(model, "name", "unet")
    if model["prediction"] not in PREDICTIONS.values():
        _refuse(model, "prediction", ", ".join(PREDICTIONS.values()))
    mult, channels, levels = model["channel_mult"], model["channels"], len(model["channel_mult"])
    _only(model, "patch_size", 1)
    _only(model, "time_scale", 1)
    if mult[0] != 1:
        _refuse(model, "channel_mult", "a tuple that begins with 1")
    if model["time_channels"] not in (0, channels):
        _refuse(model, "time_channels", f"0 or the value of channels, {channels}")
    resolutions = [model["image_size"] >> level for level in range(levels)]
    widths = [round(channels * factor) for factor in mult]
    attends = {
        direction: [
            resolution in (*model["attention_resolutions"], *model[f"attention_resolutions_{direction}"])
            for resolution in resolutions
        ]
        for direction in PLAIN_BLOCKS
    }
    plain = {
        direction: next(name for name, resample in kinds.items() if resample == model["resample"])
        for direction, kinds in PLAIN_BLOCKS.items()
    }
    blocks = {
        direction: [f"Attn{direction.capitalize()}Block2D" if attended else plain[direction] for attended in levels_of]
        for direction, levels_of in attends.items()
    }
    attended = [width for width, *either in zip(widths, *attends.values(), strict=True) if any(either)]
    resample = _name_of(RESAMPLE, model["resample"])
    return {
        "_class_name": "UNet2DModel",
        **{name: supported[0] for name, supported in FIXED.items()},
        "sample_size": model["image_size"],
        "in_channels": model["image_channels"],
        "out_channels": model["image_channels"] * (2 if model["learn_sigma"] else 1),
        "time_embedding_dim": None,
        "freq_shift": _int_if_integral(model["frequency_shift"]),
        "flip_sin_to_cos": model["cos_first"],
        "down_block_types": blocks["down"],
        "up_block_types": blocks["up"][::-1],
        "block_out_channels": widths,
        "layers_per_block": model["num_res_blocks"],
        "downsample_padding": _name_of(DOWNSAMPLE_PADDING, model["downsample_padding"]),
        "downsample_type": resample,
        "upsample_type": resample,
        "dropout": model["dropout"],
        "attention_head_dim": _head_dim(model, attended + widths[-1:] * model["middle_attention"]),
        "norm_num_groups": model["groups"],
        "attn_norm_num_groups": _middle_groups(model),
        "norm_eps": model["norm_epsilon"],
        "resnet_time_scale_shift": _name_of(SCALE_SHIFT, model["scale_shift"]),
        "add_attention": model["middle_attention"],
        "num_class_embeds": model["num_classes"] + (model["label_dropout"] > 0) or None,
        **({LABEL_DROPOUT: model["label_dropout"]} if model["label_dropout"] else {}),
    }


def _head_dim(model: Mapping[str, Any], attended: Sequence[int]) -> int | None:
    """attention_head_dim, None for one head. attended: the numbers of channels of the layers with attention."""
    if model["head_channels"] or model["num_heads"] in (0, 1):
        return model["head_channels"] or None
    sizes = {width // model["num_heads"] for width in attended}
    if len(sizes) > 1:
        _refuse(model, "num_heads", "0 or 1, or a value that gives all heads the same number of channels")
    return next(iter(sizes), None)


def _middle_groups(model: Mapping[str, Any]) -> int | None:
    """attn_norm_num_groups. With None the attention of the middle block has the GroupNorm of the other blocks, or none
    with scale_shift.
    """
    groups = model["middle_groups"]
    if not model["middle_attention"] or groups == (NO_NORM if model["scale_shift"] else 0):
        return None
    if groups == NO_NORM:
        _refuse(model, "middle_groups", "at least 0 without scale_shift")
    return groups or model["groups"]


def _only(model: Mapping[str, Any], name: str, value: Any) -> None:
    if model[name] != value:
        _refuse(model, name, str(value))


def _refuse(model: Mapping[str, Any], name: str, supported: str) -> NoReturn:
    raise CheckpointError(f"model.{name}: must be {supported} in a diffusers folder, got {files.shown(model[name])}")


def _name_of(table: Mapping[Any, Any], value: Any) -> Any:
    return next(name for name, entry in table.items() if entry == value)


def _int_if_integral(value: float) -> float:
    return int(value) if value == int(value) else value


def save(folder: pathlib.Path, params: Any, config: Mapping[str, Any], card: str) -> None:
    """Writes a folder that `DDIMPipeline.from_pretrained` reads, or `DDPMPipeline.from_pretrained` for a network that
    predicts a variance.

    params: nested dicts of arrays. config: the sections model, schedule and sample, with tau and clip_x0 set. card: the
    model card, which is the content of README.md.
    """
    network, scheduler = unet_config(config["model"]), scheduler_config(config)
    levels = len(config["model"]["channel_mult"])
    state = {
        parameter_names.DIFFUSERS.name(path, levels): np.ascontiguousarray(
            parameter_names.to_torch_layout(path, np.asarray(leaf), parameter_names.DIFFUSERS)
        )
        for path, leaf in flax.traverse_util.flatten_dict(params).items()
    }
    index = {
        "_class_name": scheduler["_class_name"].replace("Scheduler", "Pipeline"),
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    as_json = lambda values: (json.dumps(values, indent=2) + "\n").encode()
    contents = (
        tensors.to_safetensors(state, {"format": "pt"}),
        as_json(network),
        as_json(scheduler),
        card.encode(),
        as_json(index),
    )
    with files.filling(folder) as temporary:
        for name, content in zip(WRITTEN, contents, strict=True):
            (temporary / name).parent.mkdir(exist_ok=True)
            with files.replacing(temporary / name) as file:
                file.write(content)


def not_written(folder: pathlib.Path, inside: str = "") -> Iterator[str]:
    """The names in a folder that are not of files that `save` writes, without temporary files. inside: the prefix of
    the names, "" or the path of a subfolder with "/".
    """
    for path in folder.iterdir():
        name = f"{inside}{path.name}"
        if path.is_dir() and not path.is_symlink() and any(file.startswith(f"{name}/") for file in WRITTEN):
            yield from not_written(path, f"{name}/")
        elif not files.is_temporary(path) and (name not in WRITTEN or not path.is_file()):
            yield name
