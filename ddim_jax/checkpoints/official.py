"""Checkpoints of the official DDIM code, and the state dicts of the PyTorch port of Ho's models. Both hold the same
network, `Model`, with the same parameter names.

`ckpt.pth` is a list: state dict, optimizer, epoch, step, and, last, the state dict of the moving average. The official
code writes `config.yml` into the same folder. The tensors do not determine the size of the images, the attention
resolutions and the noise schedule. A file without a config.yml is read only if it has the name of one of Ho's networks,
for which these are known.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ddim_jax.checkpoints import guided_diffusion, parameter_names, tensors, torch_file
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.checkpoints.tensors import Tensors
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

CHECKPOINT, CONFIG = "ckpt.pth", "config.yml"

CONFIG_BYTES = 1 << 16  # the limit for config.yml; those of the official code have about 2000 bytes

SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "sigmoid": "sigmoid", "const": "linear"}


def open_file(path: pathlib.Path) -> CheckpointInfo:
    """Reads the description of a file of tensors. For tensors with the names of the official code it is read from the
    config.yml in the same folder; for those of guided-diffusion see `guided_diffusion.open_file`. CheckpointError for
    any other file.
    """
    if path.suffix == ".safetensors":
        state, _ = tensors.open_safetensors(path)
        sets = {True: state}
    else:
        sets = _parameter_sets(path)
    if guided_diffusion.is_guided_diffusion(sets[True]):
        return guided_diffusion.open_file(path, sets[True])
    for state in sets.values():
        if "conv_in.weight" not in state.shapes or "temb.dense.0.weight" not in state.shapes:
            raise CheckpointError(
                f"{path} holds tensors named {', '.join(list(state.shapes)[:3])} ...; supported, except in a diffusers "
                f"folder: those of the official DDIM code (temb.dense.0.weight, conv_in.weight, ...)"
            )

    config_file = path.with_name(CONFIG)
    if config_file.is_file():
        config = _load_config(config_file)
        model, noise = _network_fields(config, config_file), _noise_fields(config, config_file)
        expected_by = f"the {CONFIG} in its folder"
    else:
        model, noise, expected_by = _of_ho(path), _noise_fields({}, path), "the network of that name"

    def read(like: Any, ema: bool) -> Any:
        if len(sets) == 1:
            no_raw_parameters(str(path), ema)
        return tensors.read(sets[ema]._replace(layout=parameter_names.OFFICIAL), like, expected_by)

    name = path.parent.resolve().name if path.name == CHECKPOINT else path.stem
    return CheckpointInfo(
        str(path), read, name=files.name_from(name), model=model | FIXED, schedule=noise, sample=SAMPLE
    )


# Ho's networks, by their file names: the size of the images, and config.model.channel_mult.
HO_FILE = re.compile(r"(?:ema_)?diffusion_(\w+)_model(?:-|/model-)\d+")
LSUN = (256, (1, 1, 2, 2, 4, 4))
HO = {"cifar10": (32, (1, 2, 2, 2)), "lsun_bedroom": LSUN, "lsun_cat": LSUN, "lsun_church": LSUN}

# Fields that are the same for every config of the official code.
FIXED = {
    "middle_attention": True,
    "head_channels": 0,
    "groups": 32,
    "norm_epsilon": 1e-6,
    "downsample_padding": "end",
    "frequency_shift": 1.0,
    "cos_first": False,
    "num_classes": 0,
    "label_dropout": 0.0,
    "prediction": "eps",
}
SAMPLE = {"tau": "uniform", "tau_offset": 0, "tau_end": 0, "clip_x0": False, "clip_range": 1.0, "clip_quantile": 0.0}


def _parameter_sets(path: pathlib.Path) -> dict[bool, Tensors]:
    """{whether it is the moving average: tensors}. The only set of a file is used for sampling: it counts as True."""
    content = torch_file.load(path)
    if not isinstance(content, (list, tuple)):
        return {True: tensors.from_torch(str(path), content)}
    raw = tensors.from_torch(str(path), content[0] if content else None)
    if len(content) < 5:  # written with model.ema = False
        return {True: raw}
    return {False: raw, True: tensors.from_torch(str(path), content[-1])}


class _Plain(yaml.SafeLoader):
    """A safe YAML loader. A Python object becomes the mapping of its attributes, any other Python value becomes None.
    Aliases raise an error: the official code does not write them, and a few lines of them expand to any number of
    values.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not supported")
        return super().compose_node(parent, index)


_Plain.add_multi_constructor(
    "tag:yaml.org,2002:python/",
    lambda loader, suffix, node: loader.construct_mapping(node, deep=True) if node.id == "mapping" else None,
)


def _load_config(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        if (size := path.stat().st_size) > CONFIG_BYTES:
            raise ValueError(f"it must have at most {CONFIG_BYTES} bytes, got {size}")
        config = yaml.load(path.read_text(), Loader=_Plain)
        sections = {name: config[name] for name in ("data", "model", "diffusion")}
        if all(isinstance(section, Mapping) for section in sections.values()):
            return sections
        reason = "the sections data, model and diffusion must be mappings"
    except RecursionError:
        reason = "it is too deeply nested"
    except Exception as error:  # a YAML text can raise any exception
        reason = repr(error)
    raise CheckpointError(f"{path} is not a config of the official code: {reason}")


def _network_fields(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    model, data = config["model"], config["data"]

    def require(section: Mapping[str, Any], name: str, supported: Any, assumed: Any) -> None:
        if section.get(name, assumed) != supported:
            raise CheckpointError(
                f"{path}: {name} = {files.shown(section.get(name))} is not supported; supported: "
                f"{files.shown(supported)}"
            )

    require(model, "resamp_with_conv", True, True)
    require(model, "out_ch", model.get("in_channels"), None)
    require(data, "rescaled", True, True)
    require(data, "logit_transform", False, False)
    required = {"ch": int, "ch_mult": list, "num_res_blocks": int, "attn_resolutions": list, "in_channels": int}
    for name, kind in required.items():
        if not isinstance(model.get(name), kind):
            raise CheckpointError(
                f"{path}: model.{name} must be of type {kind.__name__}, got {files.shown(model.get(name))}"
            )
    return {
        "image_size": data.get("image_size"),
        "image_channels": model["in_channels"],
        "channels": model["ch"],
        "channel_mult": tuple(model["ch_mult"]),
        "num_res_blocks": model["num_res_blocks"],
        "attention_resolutions": tuple(model["attn_resolutions"]),
        "dropout": model.get("dropout", 0.0),
    }


def _noise_fields(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    defaults = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000}
    noise = {**defaults, **config.get("diffusion", {})}
    for name in noise:
        if name not in defaults:
            raise CheckpointError(
                f"{path}: diffusion: expected the fields {', '.join(defaults)}, got {files.shown(name)}"
            )
    name = noise["beta_schedule"]
    if not isinstance(name, str) or name not in SCHEDULES:
        raise CheckpointError(
            f"{path}: beta_schedule = {files.shown(name)} is not supported; supported: {', '.join(SCHEDULES)}"
        )
    return {
        "name": SCHEDULES[name],
        "num_steps": noise["num_diffusion_timesteps"],
        "beta_start": noise["beta_end" if name == "const" else "beta_start"],
        "beta_end": noise["beta_end"],
        "betas": (),
    }


def _of_ho(path: pathlib.Path) -> dict[str, Any]:
    """The fields of config.model of Ho's network with this file name. CheckpointError if there is none."""
    stem = path.absolute().with_suffix("")
    match = HO_FILE.fullmatch(stem.name) or HO_FILE.fullmatch(f"{stem.parent.name}/{stem.name}")
    if match is None or match[1] not in HO:
        raise CheckpointError(
            f"{path} does not determine the size of its images; put the {CONFIG} of the official code into its folder "
            f"(only Ho's networks, with names such as ema_diffusion_cifar10_model-790000.ckpt, do not need it)"
        )
    size, mult = HO[match[1]]
    return {
        "image_size": size,
        "image_channels": 3,
        "channels": 128,
        "channel_mult": mult,
        "num_res_blocks": 2,
        "attention_resolutions": (16,),
    }
