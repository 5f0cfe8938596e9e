"""Checkpoints of the official DDIM code, and the bare state dicts of the PyTorch port of Ho's models: the same
network, `Model`, under the same names.

`ckpt.pth` is a list: state dict, optimizer, epoch, step, and, last, the moving average's state dict. The code
writes its `config.yml` beside it. Without one, the network is read off the tensors, and what they cannot tell is
what holds for all published ones: attention at 16x16, linear noise over 1000 steps.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from ddim_jax.errors import CheckpointError
from ddim_jax.pretrained import names, tensors
from ddim_jax.pretrained.published import Published, describe, no_raw_parameters
from ddim_jax.pretrained.tensors import Tensors

CHECKPOINT, CONFIG = "ckpt.pth", "config.yml"

SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "sigmoid": "sigmoid", "const": "linear"}


def open_file(path: pathlib.Path) -> Published:
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
        model, noise, said = (
            _network_of(sets[True].shapes, path),
            _noise_fields({}, path),
            "the network that its tensors tell",
        )

    def read(like: Any, ema: bool) -> Any:
        if len(sets) == 1:
            no_raw_parameters(str(path), ema)
        return tensors.read(sets[ema]._replace(layout=names.OFFICIAL), like, said)

    name = path.parent.resolve().name if path.name == CHECKPOINT else path.stem
    return describe(name, str(path), model | FIXED, noise, SAMPLE, read)


# What no config of the official code can change.
FIXED = {
    "middle_attention": True,
    "head_channels": 0,
    "groups": 32,
    "norm_epsilon": 1e-6,
    "halve_padding": "end",
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
    """Safe YAML in which a Python object is the mapping of its attributes, and any other one is None."""


_Plain.add_multi_constructor(
    "tag:yaml.org,2002:python/",
    lambda loader, suffix, node: loader.construct_mapping(node, deep=True) if node.id == "mapping" else None,
)


def _load_config(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        config = yaml.load(path.read_text(), Loader=_Plain)
        sections = {name: config[name] for name in ("data", "model", "diffusion")}
        if all(isinstance(section, Mapping) for section in sections.values()):
            return sections
        reason = "the sections data, model and diffusion must hold fields"
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = repr(error)
    raise CheckpointError(f"{path} is no config of the official code: {reason}")


def _network_fields(config: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    model, data = config["model"], config["data"]

    def require(section: Mapping[str, Any], name: str, supported: Any, assumed: Any) -> None:
        if section.get(name, assumed) != supported:
            raise CheckpointError(f"{path}: {name} = {section[name]!r} is not supported; supported: {supported!r}")

    require(model, "resamp_with_conv", True, True)
    require(model, "out_ch", model.get("in_channels"), None)
    require(data, "rescaled", True, True)
    require(data, "logit_transform", False, False)
    wanted = {"ch": int, "ch_mult": list, "num_res_blocks": int, "attn_resolutions": list, "in_channels": int}
    for name, kind in wanted.items():
        if not isinstance(model.get(name), kind):
            raise CheckpointError(f"{path}: model.{name} must be of type {kind.__name__}, got {model.get(name)!r}")
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
    noise = {
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
        **config.get("diffusion", {}),
    }
    name = noise["beta_schedule"]
    if name not in SCHEDULES:
        raise CheckpointError(f"{path}: beta_schedule = {name!r} is not supported; supported: {', '.join(SCHEDULES)}")
    return {
        "name": SCHEDULES[name],
        "num_steps": noise["num_diffusion_timesteps"],
        "beta_start": noise["beta_end" if name == "const" else "beta_start"],
        "beta_end": noise["beta_end"],
        "betas": (),
    }


def _network_of(shapes: Mapping[str, tuple[int, ...]], path: pathlib.Path) -> dict[str, Any]:
    """The fields of config.model that names and shapes tell. The size of images is told by the level of attention."""
    found = lambda pattern: [match for name in shapes if (match := re.fullmatch(pattern, name))]
    blocks = found(r"down\.(\d+)\.block\.(\d+)\.conv1\.weight")
    channels, image_channels = shapes["conv_in.weight"][:2]
    widths = {int(block[1]): shapes[block[0]][0] for block in blocks}
    attended = {int(match[1]) for match in found(r"down\.(\d+)\.attn\.\d+\.q\.weight")}
    if len(attended) != 1 or sorted(widths) != list(range(len(widths))):
        raise CheckpointError(
            f"{path} does not tell the size of its images (attention at levels {sorted(attended)}, which is 16x16 "
            f"where it is one level); put the {CONFIG} of the official code beside it"
        )
    return {
        "image_size": 16 << min(attended),
        "image_channels": image_channels,
        "channels": channels,
        "channel_mult": tuple(widths[level] // channels for level in sorted(widths)),
        "num_res_blocks": 1 + max(int(block[2]) for block in blocks),
        "attention_resolutions": (16,),
    }
