"""Checkpoints of Hugging Face diffusers: unconditional and class-conditional pipelines of a `UNet2DModel`. The package
diffusers is not needed.

Settings have the meaning that they have in diffusers' `UNet2DModel` and `DDIMScheduler`. A setting that is missing in a
file has the default of diffusers. Unsupported settings that change the numbers raise an error that names them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from ddim_jax.checkpoints import parameter_names, tensors, torch_file
from ddim_jax.checkpoints.diffusers_scheduler import noise_fields, own_steps
from ddim_jax.checkpoints.diffusers_settings import settings, unsupported
from ddim_jax.checkpoints.hub import Folder, Repository, load_json
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.models.unet import MOST_LEVELS
from ddim_jax.utils.errors import CheckpointError

PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")

# Fields of UNet2DModel that must have one of these values. The first one is the default of a missing field.
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
# The other supported fields, with the defaults of diffusers.
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
    "num_train_timesteps": None,  # for learned time embeddings, which are not supported
}


DOWNSAMPLE_PADDING = {0: "end", 1: "both"}
LABEL_DROPOUT = "_label_dropout"  # a field of ddim_jax that diffusers ignores: if above 0, the last class is "no label"

WEIGHTS = "diffusion_pytorch_model"


def is_there(files: Folder | Repository) -> bool:
    """Whether the files are those of a pipeline."""
    return files.find("model_index.json") is not None


def open_folder(files: Folder | Repository) -> CheckpointInfo:
    """Reads the description of a pipeline from its folder or its hub repository, without the tensors. CheckpointError
    if the pipeline is not supported.
    """
    index = load_json(_required(files, "model_index.json"))
    _check_pipeline(index, files.source)
    unet = _required(files, "unet/config.json", "config.json")
    noise = _required(files, "scheduler/scheduler_config.json", "scheduler_config.json")
    # The tensors are in the folder of their config.json: unet/, or the root in the oldest repositories.
    folder = "unet/" if unet.parent.name == "unet" else ""

    def read(like: Any, ema: bool) -> Any:
        no_raw_parameters(files.source, ema)
        path = _required(files, f"{folder}{WEIGHTS}.safetensors", f"{folder}{WEIGHTS}.bin")
        if path.suffix == ".bin":
            state = tensors.from_torch(str(path), torch_file.load(path))
        else:
            state, _ = tensors.open_safetensors(path)
        is_old = any(".attentions." in name and name.endswith(".query.weight") for name in state.shapes)
        layout = parameter_names.DIFFUSERS_OLD if is_old else parameter_names.DIFFUSERS
        return tensors.read(state._replace(layout=layout), like, "its unet/config.json")

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
    path = files.find(*candidates)
    if path is None:
        raise CheckpointError(f"{files.source} has no {' or '.join(candidates)}{files.why_missing()}")
    return path


def _class_in(index: Mapping[str, Any], name: str) -> Any:
    """The class of a component of a pipeline, None if the pipeline has no such component."""
    value = index.get(name)
    return value[-1] if isinstance(value, list) and value else None


def _check_pipeline(index: Mapping[str, Any], source: str) -> None:
    supported = f"supported: {', '.join(PIPELINES)} of a UNet2DModel and a scheduler"
    class_of = partial(_class_in, index)
    components = [name for name in index if not name.startswith("_") and class_of(name)]
    other = [name for name in components if name not in ("unet", "scheduler")]
    pipeline = f"{source} is a {index.get('_class_name')}"
    if class_of("unet") != "UNet2DModel":
        raise CheckpointError(f"{pipeline} whose unet is {class_of('unet') or 'missing'}; {supported}")
    if other:
        raise CheckpointError(f"{pipeline} with the further components {', '.join(other)}; {supported}")
    if str(index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(f"{pipeline}; {supported}")


def network_fields(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of config.model, without the prediction, for the config.json of a `UNet2DModel`. CheckpointError,
    naming the setting, if the network of ddim_jax does not support it. where: the file, for messages.
    """
    refuse = partial(unsupported, where)
    if values.get("_class_name", "UNet2DModel") != "UNet2DModel":
        refuse("_class_name", values["_class_name"], "UNet2DModel")
    for name, supported in FIXED.items():
        if values.get(name, supported[0]) not in supported:
            refuse(name, values[name], " or ".join(map(repr, supported)))
    for name in values:
        if not name.startswith("_") and name not in FIXED and name not in NETWORK and values[name] is not None:
            refuse(name, values[name], ", ".join([*NETWORK, *FIXED]))
    unet = settings(values, NETWORK, where)

    widths = unet["block_out_channels"]
    positive = all(isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths)
    if not widths or not positive or any(width % widths[0] for width in widths):
        refuse("block_out_channels", widths, "positive integers, multiples of the first")
    if len(widths) > MOST_LEVELS:
        refuse("block_out_channels", widths, f"at most {MOST_LEVELS} entries")
    channels = widths[0]
    size = unet["sample_size"]
    if isinstance(size, (list, tuple)) and size and all(length == size[0] for length in size):
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool):
        refuse("sample_size", size, "the height of square images")
    if unet["in_channels"] != unet["out_channels"]:
        refuse("out_channels", unet["out_channels"], f"the value of in_channels, {unet['in_channels']}")
    if unet["time_embedding_dim"] not in (None, 4 * channels):
        refuse("time_embedding_dim", unet["time_embedding_dim"], f"4 times the first of block_out_channels, {channels}")
    if unet["attn_norm_num_groups"] not in (None, unet["norm_num_groups"]):
        supported_groups = f"the value of norm_num_groups, {unet['norm_num_groups']}"
        refuse("attn_norm_num_groups", unet["attn_norm_num_groups"], supported_groups)
    if unet["downsample_padding"] not in DOWNSAMPLE_PADDING:
        refuse("downsample_padding", unet["downsample_padding"], " or ".join(map(str, DOWNSAMPLE_PADDING)))

    label_dropout = values.get(LABEL_DROPOUT, 0.0)
    if not isinstance(label_dropout, float) or label_dropout and (unet["num_class_embeds"] or 0) < 2:
        refuse(LABEL_DROPOUT, label_dropout, "a float, which is 0.0 for a network without classes")

    has_attention = {}
    for direction in ("down", "up"):
        types = [str(name).removeprefix("UNetRes") for name in unet[f"{direction}_block_types"]]
        plain, attention = f"{direction.capitalize()}Block2D", f"Attn{direction.capitalize()}Block2D"
        for name in types:
            if name not in (plain, attention):
                refuse(f"{direction}_block_types", name, f"{plain} or {attention}")
        if len(types) != len(widths):
            refuse(f"{direction}_block_types", types, f"one for each of block_out_channels {list(widths)}")
        has_attention[direction] = [name == attention for name in types]
    if has_attention["up"] != has_attention["down"][::-1]:
        refuse("up_block_types", unet["up_block_types"], "attention at the same resolutions as in down_block_types")

    return {
        "name": "unet",
        "image_size": size,
        "image_channels": unet["in_channels"],
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": tuple(size >> level for level, attends in enumerate(has_attention["down"]) if attends),
        "middle_attention": unet["add_attention"],
        "head_channels": unet["attention_head_dim"] or 0,
        "groups": unet["norm_num_groups"],
        "norm_epsilon": unet["norm_eps"],
        "downsample_padding": DOWNSAMPLE_PADDING[unet["downsample_padding"]],
        "frequency_shift": unet["freq_shift"],
        "cos_first": unet["flip_sin_to_cos"],
        "dropout": unet["dropout"],
        "num_classes": (unet["num_class_embeds"] or 0) - (label_dropout > 0),
        "label_dropout": label_dropout,
    }
