"""The arguments of the networks in EDM checkpoints, and what they mean for config.model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

# The defaults of the published classes. Arguments that are equal to the default are not in a checkpoint.
SIZES = {"img_resolution": 0, "in_channels": 0, "out_channels": 0, "label_dim": 0, "augment_dim": 0}
SONG: Mapping[str, Any] = SIZES | {
    "model_channels": 128,
    "channel_mult": (1, 2, 2, 2),
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": (16,),
    "dropout": 0.1,
    "label_dropout": 0.0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": (1, 1),
}
DHARIWAL: Mapping[str, Any] = SIZES | {
    "model_channels": 192,
    "channel_mult": (1, 2, 3, 4),
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": (32, 16, 8),
    "dropout": 0.1,
    "label_dropout": 0.0,
}
MAX_ITEMS, MAX_NUMBER = 16, 1 << 20  # of a tuple; of an argument

HEAD_CHANNELS = 64  # of an attention head in DhariwalUNet
GROUPS, GROUP_CHANNELS = 32, 4  # the groups of a GroupNorm, and the least channels of one


def arguments(given: Any, defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a network, over the defaults. CheckpointError for an unknown name or another type."""
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: its arguments must be a dict, got {files.shown(given)}")
    result = dict(defaults)
    for name, value in given.items():
        if name not in defaults:
            raise CheckpointError(
                f"{where}: the argument {files.shown(name)} is not supported; supported: {', '.join(defaults)}"
            )
        result[name] = _typed(f"{where}: {name}", value, defaults[name])
    return result


def _typed(name: str, value: Any, like: Any) -> Any:
    if isinstance(like, tuple):
        if not isinstance(value, (list, tuple)) or len(value) > MAX_ITEMS:
            raise CheckpointError(f"{name} must be at most {MAX_ITEMS} numbers, got {files.shown(value)}")
        return tuple(_typed(name, item, 1) for item in value)
    if isinstance(like, str):
        if not isinstance(value, str):
            raise CheckpointError(f"{name} must be a string, got {files.shown(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_NUMBER:
        raise CheckpointError(f"{name} must be a number in 0..{MAX_NUMBER}, got {files.shown(value)}")
    if isinstance(like, int) and value != int(value):
        raise CheckpointError(f"{name} must be an integer, got {value}")
    return type(like)(value)


def song_fields(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `SongUNet` for the arguments of NVIDIA's network of that name."""
    return {
        **_common(args, where),
        "name": "song_unet",
        "channels": args["model_channels"],
        "channel_mult": args["channel_mult"],
        "embedding": args["embedding_type"],
        "time_mult": args["channel_mult_noise"],
        "embedding_mult": args["channel_mult_emb"],
        "encoder": args["encoder_type"],
        "decoder": args["decoder_type"],
        "resample_filter": args["resample_filter"],
    }


def dhariwal_fields(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of `UNet` for the arguments of NVIDIA's DhariwalUNet, the network of ADM.

    CheckpointError for those that `UNet` does not have.
    """
    widths = [args["model_channels"] * mult for mult in args["channel_mult"]]
    if not widths or not widths[0] or any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"{where}: channel_mult must be multiples of its first number, got {files.shown(args['channel_mult'])}"
        )
    if min(widths) < GROUPS * GROUP_CHANNELS:
        raise CheckpointError(
            f"{where}: model_channels must give at least {GROUPS * GROUP_CHANNELS} channels at each resolution, got "
            f"{min(widths)}"
        )
    if args["channel_mult_emb"] != 4:
        raise CheckpointError(f"{where}: channel_mult_emb must be 4, got {args['channel_mult_emb']}")
    return {
        **_common(args, where),
        "name": "unet",
        "patch_size": 1,
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "time_channels": args["model_channels"],
        "middle_attention": True,
        "head_channels": HEAD_CHANNELS,
        "num_heads": 0,
        "groups": GROUPS,
        "norm_epsilon": 1e-5,
        "scale_shift": True,
        "resample": "block",
        "frequency_shift": 0.0,
        "cos_first": True,
        "time_scale": 1.0,
        "learn_sigma": False,
    }


def _common(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    if args["out_channels"] != args["in_channels"]:
        raise CheckpointError(
            f"{where}: out_channels must be equal to in_channels {args['in_channels']}, got {args['out_channels']}"
        )
    resolutions = [args["img_resolution"] >> level for level in range(len(args["channel_mult"]))]
    return {
        "image_size": args["img_resolution"],
        "image_channels": args["in_channels"],
        "num_res_blocks": args["num_blocks"],
        # A resolution that the network does not have is without effect.
        "attention_resolutions": tuple(size for size in args["attn_resolutions"] if size in resolutions),
        "num_classes": args["label_dim"],
        "label_dropout": args["label_dropout"],
        "dropout": args["dropout"],
        "prediction": "edm",
    }


# The classes of networks -> (defaults of the arguments, fields of config.model).
NETWORKS: Mapping[str, tuple[Mapping[str, Any], Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "SongUNet": (SONG, song_fields),
    "DhariwalUNet": (DHARIWAL, dhariwal_fields),
}
