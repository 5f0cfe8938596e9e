"""Checkpoints of guided-diffusion (ADM; Dhariwal and Nichol 2021), improved-diffusion (Nichol and Dhariwal 2021), and
the EDM networks of consistency_models (Song et al. 2023).

A checkpoint is a bare state dict. Its tensors do not determine the size of the images, the number of attention heads
and the noise schedule. The published files are recognized by their names. For any other file, `model_flags.txt` in the
same folder must hold the flags of the training script, as in the READMEs of these projects, for example

    --image_size 64 --num_channels 192 --num_res_blocks 3 --num_head_channels 64 --learn_sigma True

An unsupported flag that changes the network or the noise schedule raises an error that names it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddim_jax.checkpoints import edm
from ddim_jax.checkpoints.guided_diffusion_flags import EDM, SCHEDULES, flags_of, network_fields
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.checkpoints.parameter_names import LEAVES, Layout, Path
from ddim_jax.checkpoints.tensors import Tensors, read
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError


def is_guided_diffusion(state: Tensors) -> bool:
    """Whether the tensors of a state dict have the names of guided-diffusion and improved-diffusion."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= state.shapes.keys()


def open_file(path: pathlib.Path, state: Tensors) -> CheckpointInfo:
    """Reads the description of a network from its flags, see `flags_of`. CheckpointError if a flag is not supported.

    path: of the file. state: the tensors in it, not read yet.
    """
    flags, where = flags_of(path)
    model, is_edm = network_fields(flags, where), flags["training_mode"] == EDM

    def read_params(like: Any, ema: bool) -> Any:
        no_raw_parameters(str(path), ema)
        heads = (flags["num_heads"], flags["num_head_channels"])
        split = split_attention(state, *heads, new_order=flags["use_new_attention_order"] or is_edm)
        return read(split._replace(layout=layout_of(model)), like, where)

    name = SCHEDULES[flags["noise_schedule"]]
    return CheckpointInfo(
        str(path),
        read_params,
        name=files.name_from(path.stem),
        model=model,
        schedule=edm.SCHEDULE if is_edm else {"name": name, "num_steps": flags["diffusion_steps"], **_betas(flags)},
        sample=edm.SAMPLE if is_edm else SAMPLE,
    )


# DDIM in guided-diffusion clips the predicted x_0 and recomputes eps from it.
SAMPLE = {"tau": "uniform", "tau_offset": 0, "tau_end": 0, "clip_x0": True, "clip_range": 1.0, "clip_quantile": 0.0}


def _betas(flags: Mapping[str, Any]) -> dict[str, Any]:
    scale = 1000 / flags["diffusion_steps"]
    return {"beta_start": scale * 1e-4, "beta_end": scale * 0.02, "betas": ()}


# --- tensors ---

BLOCK = {
    "norm_0": "in_layers.0",
    "conv_0": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_1": "out_layers.0",
    "conv_1": "out_layers.3",
    "shortcut": "skip_connection",
}
ATTENTION = {"norm": "norm", "query": "qkv.query", "key": "qkv.key", "value": "qkv.value", "out": "proj_out"}


def layout_of(model: Mapping[str, Any]) -> Layout:
    """The names of a network's tensors. model: fields of config.model.

    `input_blocks` and `output_blocks` are numbered over all resolutions. A number stands for a residual block, and the
    attention and the upsampling after it; or for a downsampling.
    """
    table = {"time_0": "time_embed.0", "time_1": "time_embed.2", "class": "label_emb", "conv_in": "input_blocks.0.0"}
    table |= {"middle_block_0": "middle_block.0", "middle_attention": "middle_block.1"}
    table |= {"middle_block_1": "middle_block.2", "norm_out": "out.0", "conv_out": "out.2"}
    levels, blocks, number = len(model["channel_mult"]), model["num_res_blocks"], 0
    attends = [model["image_size"] >> level in model["attention_resolutions"] for level in range(levels)]
    resampled = "{}.{}.{}" if model["resample"] == "block" else "{}.{}.{}.{}"
    for level in range(levels):
        for i in range(blocks):
            number += 1
            table[f"down_{level}_block_{i}"] = f"input_blocks.{number}.0"
            table[f"down_{level}_attention_{i}"] = f"input_blocks.{number}.1"
        if level < levels - 1:
            number += 1
            table[f"down_{level}_halve"] = resampled.format("input_blocks", number, 0, "op")
    number = -1
    for level in reversed(range(levels)):
        for i in range(blocks + 1):
            number += 1
            table[f"up_{level}_block_{i}"] = f"output_blocks.{number}.0"
            table[f"up_{level}_attention_{i}"] = f"output_blocks.{number}.1"
        table[f"up_{level}_double"] = resampled.format("output_blocks", number, 1 + attends[level], "conv")

    def name(path: Path, num_levels: int) -> str:
        top, *modules, leaf = path
        inner = ATTENTION if "attention" in top else BLOCK
        return ".".join([table[top], *(inner[module] for module in modules), LEAVES[leaf]])

    return Layout(name, frozenset({"shortcut"}))


def split_attention(state: Tensors, num_heads: int, head_channels: int, new_order: bool) -> Tensors:
    """Splits the tensor `qkv` (3 C, C, 1) of each attention into `qkv.query`, `qkv.key` and `qkv.value` (C, C). The
    kernel of `proj_out`, (C, C, 1), also becomes a matrix (C, C). In consistency_models both end with (1, 1).

    num_heads: used if head_channels is -1. new_order: whether the rows of `qkv` are ordered by query, key and value,
    and then by head; False: by head, and then by query, key and value.
    """
    parts = ("query", "key", "value")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in state.shapes.items():
        if ".qkv." in name or ".proj_out." in name:
            shape = shape[:2] if set(shape[2:]) <= {1} else shape
        if ".qkv." in name and shape and shape[0] % 3 == 0:
            shapes |= {name.replace(".qkv.", f".qkv.{part}."): (shape[0] // 3, *shape[1:]) for part in parts}
        else:
            shapes[name] = shape

    def read_one(name: str) -> np.ndarray:
        part = next((part for part in parts if f".qkv.{part}." in name), None)
        if part is None:
            return state.read(name).reshape(shapes[name])
        fused = state.read(name.replace(f".{part}.", "."))
        channels = shapes[name][0]
        heads = num_heads if head_channels == -1 else channels // head_channels
        if not heads or channels % heads:
            raise CheckpointError(f"{state.source}: {name} has {channels} channels, not a multiple of {heads} heads")
        order = (3, heads) if new_order else (heads, 3)
        fused = fused.reshape(*order, channels // heads, *shapes[name][1:])
        chosen = fused[parts.index(part)] if new_order else fused[:, parts.index(part)]
        return chosen.reshape(shapes[name])

    return Tensors(state.source, shapes, read_one)
