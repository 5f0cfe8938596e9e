"""The config.json of diffusers' `UNet2DModel`: conversion to the fields of config.model.

Settings have the meaning that they have in `UNet2DModel`. A setting that is missing in a file has the default of
diffusers. Unsupported settings that change the numbers raise an error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ddim_jax.checkpoints.diffusers_settings import settings, unsupported
from ddim_jax.models.sizes import MOST_LEVELS
from ddim_jax.models.unet import NO_NORM, multipliers

# Fields of UNet2DModel that must have one of these values. The first one is the default of a missing field.
FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
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
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # for learned time embeddings, which are not supported
}

DOWNSAMPLE_PADDING = {0: "end", 1: "both"}
SCALE_SHIFT = {"default": False, "scale_shift": True}
RESAMPLE = {"conv": "conv", "resnet": "block"}
LABEL_DROPOUT = "_label_dropout"  # a field of ddim_jax that diffusers ignores: if above 0, the last class is "no label"

# Block types without attention -> how they resample. A block type with attention, Attn{Down,Up}Block2D, resamples as
# downsample_type and upsample_type tell.
PLAIN_BLOCKS = {
    "down": {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "block"},
    "up": {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "block"},
}


def network_fields(values: Mapping[str, Any], where: str, image_size: int | None = None) -> dict[str, Any]:
    """The fields of config.model, without the prediction, for the config.json of a `UNet2DModel`. CheckpointError,
    naming the setting, if the network of ddim_jax does not support it.

    where: the file, for messages. image_size: the size of the images if sample_size is None.
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
    if not widths or any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in widths):
        refuse("block_out_channels", widths, "positive integers")
    if len(widths) > MOST_LEVELS:
        refuse("block_out_channels", widths, f"at most {MOST_LEVELS} entries")
    channels = widths[0]
    size = unet["sample_size"]
    if size is None:
        size = image_size
    elif isinstance(size, (list, tuple)) and size and all(length == size[0] for length in size):
        size = size[0]
    if not isinstance(size, int) or isinstance(size, bool):
        refuse("sample_size", unet["sample_size"], "the height of square images, or None with an image_size")
    if unet["out_channels"] not in (unet["in_channels"], 2 * unet["in_channels"]):
        both = f"the value of in_channels, {unet['in_channels']}, or twice it for a learned variance"
        refuse("out_channels", unet["out_channels"], both)
    if unet["time_embedding_dim"] not in (None, 4 * channels):
        refuse("time_embedding_dim", unet["time_embedding_dim"], f"4 times the first of block_out_channels, {channels}")
    for name, table in (("resnet_time_scale_shift", SCALE_SHIFT), ("downsample_padding", DOWNSAMPLE_PADDING)):
        if unet[name] not in table:
            refuse(name, unet[name], " or ".join(map(repr, table)))
    groups = unet["attn_norm_num_groups"]
    if groups is not None and groups < 1:
        refuse("attn_norm_num_groups", groups, "None, or at least 1")
    scale_shift = SCALE_SHIFT[unet["resnet_time_scale_shift"]]

    label_dropout = values.get(LABEL_DROPOUT, 0.0)
    if not isinstance(label_dropout, float) or label_dropout and (unet["num_class_embeds"] or 0) < 2:
        refuse(LABEL_DROPOUT, label_dropout, "a float, which is 0.0 for a network without classes")

    resample, down, up = _blocks(unet, where)
    at = lambda attends: tuple(size >> level for level, wanted in enumerate(attends) if wanted)
    only_down, only_up = ([a and not b for a, b in zip(*pair, strict=True)] for pair in ((down, up), (up, down)))
    return {
        "name": "unet",
        "image_size": size,
        "image_channels": unet["in_channels"],
        "channels": channels,
        "channel_mult": multipliers(widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": at(a and b for a, b in zip(down, up, strict=True)),
        "attention_resolutions_down": at(only_down),
        "attention_resolutions_up": at(only_up),
        "middle_attention": unet["add_attention"],
        "middle_groups": _middle_groups(unet, scale_shift),
        "head_channels": unet["attention_head_dim"] or 0,
        "groups": unet["norm_num_groups"],
        "norm_epsilon": unet["norm_eps"],
        "scale_shift": scale_shift,
        "resample": resample,
        "downsample_padding": DOWNSAMPLE_PADDING[unet["downsample_padding"]],
        "frequency_shift": unet["freq_shift"],
        "cos_first": unet["flip_sin_to_cos"],
        "learn_sigma": unet["out_channels"] != unet["in_channels"],
        "dropout": unet["dropout"],
        "num_classes": (unet["num_class_embeds"] or 0) - (label_dropout > 0),
        "label_dropout": label_dropout,
    }


def _middle_groups(unet: Mapping[str, Any], scale_shift: bool) -> int:
    """config.model.middle_groups. Without attn_norm_num_groups and with scale_shift the attention of the middle block
    has no GroupNorm, unlike that of the other blocks.
    """
    groups = unet["attn_norm_num_groups"]
    if not unet["add_attention"] or groups == unet["norm_num_groups"]:
        return 0
    return groups or (NO_NORM if scale_shift else 0)


def _blocks(unet: Mapping[str, Any], where: str) -> tuple[str, list[bool], list[bool]]:
    """(config.model.resample, whether each resolution has attention in the encoder, and in the decoder)."""
    refuse, levels = partial(unsupported, where), len(unet["block_out_channels"])
    attends: dict[str, list[bool]] = {}
    kinds: dict[str, str] = {}  # "conv" and "block" -> a block type that resamples so
    for direction, plain in PLAIN_BLOCKS.items():
        attention, resample = f"Attn{direction.capitalize()}Block2D", f"{direction}sample_type"
        types = [str(name).removeprefix("UNetRes") for name in unet[f"{direction}_block_types"]]
        if len(types) != levels:
            refuse(
                f"{direction}_block_types", types, f"one for each of block_out_channels {unet['block_out_channels']}"
            )
        for i, name in enumerate(types):
            if name not in (*plain, attention):
                refuse(f"{direction}_block_types", name, ", ".join((*plain, attention)))
            if i == levels - 1:  # the last block does not resample
                continue
            if name == attention and unet[resample] not in RESAMPLE:
                refuse(resample, unet[resample], " or ".join(map(repr, RESAMPLE)))
            if name in plain:
                kinds[plain[name]] = name
            else:
                kinds[RESAMPLE[unet[resample]]] = f"{name} with {resample} {unet[resample]!r}"
        attends[direction] = [name == attention for name in types]
    if len(kinds) > 1:
        both = "blocks that all resample by a convolution or all by a residual block"
        refuse("down_block_types and up_block_types", f"{kinds['conv']} and {kinds['block']}", both)
    return next(iter(kinds), "conv"), attends["down"], attends["up"][::-1]
