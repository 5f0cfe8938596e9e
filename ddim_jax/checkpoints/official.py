"""Checkpoints of the official DDIM code, and the bare state dicts of the PyTorch port of Ho's models: the same
network, `Model`, under the same names.

`ckpt.pth` is a list: state dict, optimizer, epoch, step, and, last, the moving average's state dict. The code
writes its `config.yml` beside it. Tensors alone do not tell the size of the images, where attention is, or the noise: a
file without a config is read if it has the name of one of Ho's networks, for which these are known.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ddim_jax.checkpoints import parameter_names, tensors
from ddim_jax.checkpoints.info import CheckpointInfo, no_raw_parameters
from ddim_jax.checkpoints.tensors import Tensors
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

CHECKPOINT, CONFIG = "ckpt.pth", "config.yml"

CONFIG_BYTES = 1 << 16  # its own have 2000

SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "sigmoid": "sigmoid", "const": "linear"}


def open_file(path: pathlib.Path) -> CheckpointInfo:
    """What a file of tensors in the official layout says, with the config.yml beside it. CheckpointError if it is
    none.
    """
    if path.suffix == ".safetensors":
        found, _ = tensors.open_safetensors(path)
        sets = {True: found}
    else:
        sets = _parameter_sets(path)
    for found in sets.values():
        if "conv_in.weight" not in found.shapes or "temb.dense.0.weight" not in found.shapes:
            raise CheckpointError(
                f"{path} holds tensors named {', '.join(list(found.shapes)[:3])} ...; supported beside a diffusers "
                f"folder: those of the official DDIM code (temb.dense.0.weight, conv_in.weight, ...)"
            )

    beside = path.with_name(CONFIG)
    if beside.is_file():
        config = _load_config(beside)
        model, noise, said = _network_fields(config, beside), _noise_fields(config, beside), f"the {CONFIG} beside it"
    else:
        model, noise, said = _of_ho(path), _noise_fields({}, path), "the network of that name"

    def read(like: Any, ema: bool) -> Any:
        if len(sets) == 1:
            no_raw_parameters(str(path), ema)
        return tensors.read(sets[ema]._replace(layout=parameter_names.OFFICIAL), like, said)

    name = path.parent.resolve().name if path.name == CHECKPOINT else path.stem
    return CheckpointInfo(
        str(path), read, name=files.name_from(name), model=model | FIXED, schedule=noise, sample=SAMPLE
    )


# Ho's networks, by what their files are called: the size of images, and config.model.channel_mult.
HO_FILE = re.compile(r"(?:ema_)?diffusion_(\w+)_model(?:-|/model-)\d+")
LSUN = (256, (1, 1, 2, 2, 4, 4))
HO = {"cifar10": (32, (1, 2, 2, 2)), "lsun_bedroom": LSUN, "lsun_cat": LSUN, "lsun_church": LSUN}

# What no config of the official code can change.
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
    """Whether it is a moving average -> tensors. A file with one set alone holds what is to be sampled, so True."""
    content = tensors.load_torch(path)
    if not isinstance(content, (list, tuple)):
        return {True: tensors.from_torch(str(path), content)}
    raw = tensors.from_torch(str(path), content[0] if content else None)
    if len(content) < 5:  # written with model.ema = False
        return {True: raw}
    return {False: raw, True: tensors.from_torch(str(path), content[-1])}


class _Plain(yaml.SafeLoader):
    """Safe YAML in which a Python object is the mapping of its attributes, and any other one is None. Without aliases,
    which the official code does not write, and with which a few lines stand for any number of values.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read")
        return super().compose_node(parent, index)


_Plain.add_multi_constructor(
    "tag:yaml.org,2002:python/",
    lambda loader, suffix, node: loader.construct_mapping(node, deep=True) if node.id == "mapping" else None,
)


def _load_config(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        if (size := path.stat().st_size) > CONFIG_BYTES:
            raise ValueError(f"it has {size} bytes, at most {CONFIG_BYTES} are read")
        config = yaml.load(path.read_text(), Loader=_Plain)
        sections = {name: config[name] for name in ("data", "model", "diffusion")}
        if all(isinstance(section, Mapping) for section in sections.values()):
            return sections
        reason = "the sections data, model and diffusion must hold fields"
    except RecursionError:
        reason = "it is too deeply nested"
    except Exception as error:  # a YAML text can fail in any way
        reason = repr(error)
    raise CheckpointError(f"{path} is no config of the official code: {reason}")


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
    wanted = {"ch": int, "ch_mult": list, "num_res_blocks": int, "attn_resolutions": list, "in_channels": int}
    for name, kind in wanted.items():
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
    usual = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000}
    noise = {**usual, **config.get("diffusion", {})}
    for name in noise:
        if name not in usual:
            raise CheckpointError(f"{path}: diffusion has no field {files.shown(name)}; it has {', '.join(usual)}")
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
    """The fields of config.model of that of Ho's networks that a file is named after. CheckpointError if it is none."""
    stem = path.absolute().with_suffix("")
    known = HO_FILE.fullmatch(stem.name) or HO_FILE.fullmatch(f"{stem.parent.name}/{stem.name}")
    if known is None or known[1] not in HO:
        raise CheckpointError(
            f"{path} does not tell the size of its images; put the {CONFIG} of the official code beside it (without "
            f"it, Ho's networks are known, by names like ema_diffusion_cifar10_model-790000.ckpt)"
        )
    size, mult = HO[known[1]]
    return {
        "image_size": size,
        "image_channels": 3,
        "channels": 128,
        "channel_mult": mult,
        "num_res_blocks": 2,
        "attention_resolutions": (16,),
    }
