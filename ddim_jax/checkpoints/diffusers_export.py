"""Export of a trained network as a diffusers folder, which `DDIMPipeline.from_pretrained` reads."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from ddim_jax.checkpoints import parameter_names, tensors
from ddim_jax.checkpoints.diffusers_folder import DOWNSAMPLE_PADDING, FIXED, LABEL_DROPOUT, WEIGHTS
from ddim_jax.checkpoints.diffusers_scheduler import scheduler_config
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

CARD = "README.md"

WRITTEN = (
    f"unet/{WEIGHTS}.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    CARD,
    "model_index.json",  # the last one that `files.filling` moves as well: with it the folder becomes a pipeline
)


# Fields of config.model that have no equivalent in the exported `UNet2DModel` -> the value that needs none.
ONLY_OURS = {
    "num_heads": 0,
    "scale_shift": False,
    "resample": "conv",
    "time_channels": 0,
    "time_scale": 1.0,
    "learn_sigma": False,
}


def unet_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` for the fields of config.model. The inverse of `network_fields`.
    CheckpointError for a network that `UNet2DModel` does not have.
    """
    if model["patch_size"] != 1:
        raise CheckpointError(f"model.patch_size: must be 1, got {model['patch_size']}: UNet2DModel has no patches")
    if model.get("prediction") == "edm":
        raise CheckpointError("model.prediction: must be eps, x0 or v in a diffusers folder, got edm")
    for name, default in ONLY_OURS.items():
        if model.get(name, default) != default:
            raise CheckpointError(f"model.{name}: must be {default} in a diffusers folder, got {model[name]}")
    levels = len(model["channel_mult"])
    has_attention = [model["image_size"] >> level in model["attention_resolutions"] for level in range(levels)]
    blocks = lambda direction: [("Attn" if attention else "") + f"{direction}Block2D" for attention in has_attention]
    return {
        "_class_name": "UNet2DModel",
        **{name: supported[0] for name, supported in FIXED.items()},
        "sample_size": model["image_size"],
        "in_channels": model["image_channels"],
        "out_channels": model["image_channels"],
        "freq_shift": _int_if_integral(model["frequency_shift"]),
        "flip_sin_to_cos": model["cos_first"],
        "down_block_types": blocks("Down"),
        "up_block_types": blocks("Up")[::-1],
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


def _int_if_integral(value: float) -> float:
    return int(value) if value == int(value) else value


def save(folder: pathlib.Path, params: Any, config: Mapping[str, Any], card: str) -> None:
    """Writes a folder that `DDIMPipeline.from_pretrained` reads.

    params: nested dicts of arrays. config: the sections model, schedule and sample, with tau and clip_x0 set. card: the
    model card, which is the content of README.md.
    """
    levels = len(config["model"]["channel_mult"])
    state = {
        parameter_names.DIFFUSERS.name(path, levels): np.ascontiguousarray(
            parameter_names.to_torch_layout(path, np.asarray(leaf), parameter_names.DIFFUSERS)
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
    """The names in a folder that are not of files that `save` writes, without temporary files. inside: the prefix of
    the names, "" or the path of a subfolder with "/".
    """
    for path in folder.iterdir():
        name = f"{inside}{path.name}"
        if path.is_dir() and not path.is_symlink() and any(file.startswith(f"{name}/") for file in WRITTEN):
            yield from not_written(path, f"{name}/")
        elif not files.is_temporary(path) and (name not in WRITTEN or not path.is_file()):
            yield name
