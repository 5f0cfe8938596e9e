"""The modules and the tensors of EDM checkpoints."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ddim_jax.checkpoints.edm_fields import GROUP_CHANNELS, GROUPS, HEAD_CHANNELS, NETWORKS
from ddim_jax.checkpoints.parameter_names import LEAVES, Layout, Path
from ddim_jax.checkpoints.pickles import Object
from ddim_jax.checkpoints.tensors import Tensors, from_torch
from ddim_jax.checkpoints.torch_file import Tensor
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

MAX_MODULES, MAX_PREFIX = 10_000, 200
CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")  # of PyTorch


def state_of(module: Any, where: str) -> Mapping[str, Any]:
    """The attributes of a module. CheckpointError for anything else."""
    if not isinstance(module, Object) or not isinstance(module.state, dict):
        raise CheckpointError(f"{where}: expected a module, got a {type(module).__name__}")
    return module.state


def entries(state: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The entries of a dict in the state of a module, without those that are None. CheckpointError without one."""
    found = state.get(name)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{where}: {name} must be a dict with names as keys, got a {type(found).__name__}")
    return {key: value for key, value in found.items() if value is not None}


def tensors_of(path: pathlib.Path, network: Object, args: Mapping[str, Any]) -> Tensors:
    """The parameters of a network. CheckpointError if an attribute is not that of the published source code.

    args: the arguments of the network. The filters of the resampling are compared with them and left out. The layer of
    the augmentation labels is left out too: it has no effect in sampling.
    """
    state: dict[str, Tensor] = {}
    weights = np.asarray(args.get("resample_filter", (1, 1)), np.float64)
    filter_ = np.outer(weights, weights) / np.square(weights.sum()) if weights.any() else np.zeros((0, 0))
    for prefix, module, attributes in _walk(network, f"{path}: ema.model"):
        where = f"{path}: ema.model.{prefix}"
        for name, value in _expected(prefix, module, network.kind, where).items():
            got = attributes.get(name)
            if not isinstance(got, (int, float)) or abs(got - value) > 1e-12:
                raise CheckpointError(f"{where}{name}: must be {value}, got {files.shown(got)}")
        for name, tensor in (
            entries(attributes, "_parameters", where) | entries(attributes, "_buffers", where)
        ).items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{where}{name}: expected a tensor, got a {type(tensor).__name__}")
            if name == "resample_filter":
                if tensor.shape != (1, 1, *filter_.shape) or not np.allclose(tensor.read()[0, 0], filter_, atol=1e-6):
                    raise CheckpointError(f"{where}{name}: must be the outer product of the argument resample_filter")
            elif not prefix.startswith("map_augment."):
                state[f"{prefix}{name}"] = tensor
    return _in_our_shapes(from_torch(str(path), state), network.kind, args)


def _walk(network: Object, where: str) -> Iterator[tuple[str, Object, Mapping[str, Any]]]:
    """(prefix of its names, module, its attributes) of a network and of all modules in it. CheckpointError beyond
    MAX_MODULES or MAX_PREFIX; a module that contains itself exceeds them.
    """
    waiting, count = [("", network)], 0
    while waiting:
        prefix, module = waiting.pop()
        count += 1
        if count > MAX_MODULES or len(prefix) > MAX_PREFIX:
            raise CheckpointError(f"{where}: it has more than {MAX_MODULES} modules, or they are too deeply nested")
        attributes = state_of(module, f"{where}.{prefix}")
        yield prefix, module, attributes
        inner = entries(attributes, "_modules", f"{where}.{prefix}")
        waiting += [(f"{prefix}{name}.", module) for name, module in inner.items()]


def _expected(prefix: str, module: Object, network: str, where: str) -> Mapping[str, float]:
    """The attributes of a module that change numbers, with the values of the published source code. CheckpointError for
    a class that these networks do not have.
    """
    song, attributes = network == "SongUNet", module.state
    if module.kind == "GroupNorm":
        weight = entries(attributes, "_parameters", where).get("weight")
        channels = weight.shape[0] if isinstance(weight, Tensor) and weight.shape else 0
        epsilon = 1e-6 if song else 1e-5
        return {"eps": epsilon, "num_groups": min(GROUPS, channels // GROUP_CHANNELS)}
    if module.kind == "UNetBlock":
        channels = attributes.get("out_channels")
        heads = channels // HEAD_CHANNELS if isinstance(channels, int) and not song else 1
        return {
            "skip_scale": 0.5**0.5 if song else 1.0,
            "adaptive_scale": not song,
            "num_heads": heads if attributes.get("num_heads") else 0,
        }
    if module.kind == "PositionalEmbedding":
        return {"max_positions": 10_000, "endpoint": song}
    if module.kind == "Conv2d":
        _, block, layer = (*prefix.split("."), "", "", "")[:3]
        resamples = layer in ("", "conv0", "skip")
        return {
            "down": resamples and block.endswith(("_down", "_aux_residual")),
            "up": resamples and block.endswith("_up"),
            "fused_resample": block.endswith("_aux_residual"),
        }
    if module.kind not in (*NETWORKS, *CONTAINERS, "Linear", "FourierEmbedding"):
        raise CheckpointError(f"{where} is of the class {files.shown(module.kind)}, which is not supported")
    return {}


PARTS = ("query", "key", "value")


def _in_our_shapes(found: Tensors, network: str, args: Mapping[str, Any]) -> Tensors:
    """The tensors, with `qkv` of each attention as `qkv.query`, `qkv.key` and `qkv.value`, whose rows alternate.

    The weight of `map_label` of a DhariwalUNet is transposed. It gets a row of zeros for "no class" if there is one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in found.shapes.items():
        if ".qkv." in name and shape and shape[0] % 3 == 0:
            shapes |= {name.replace(".qkv.", f".qkv.{part}."): (shape[0] // 3, *shape[1:]) for part in PARTS}
        else:
            shapes[name] = shape
    labels = "map_label.weight" if network == "DhariwalUNet" else None
    if labels in shapes and len(shapes[labels]) == 2:
        features, classes = shapes[labels]
        shapes[labels] = (classes + (args["label_dropout"] > 0), features)

    def read_one(name: str) -> np.ndarray:
        if name == labels:
            rows = found.read(name).T
            return np.concatenate([rows, np.zeros((shapes[name][0] - len(rows), rows.shape[1]), rows.dtype)])
        for i, part in enumerate(PARTS):
            if f".qkv.{part}." in name:
                fused = found.read(name.replace(f".qkv.{part}.", ".qkv."))
                return fused.reshape(-1, 3, *fused.shape[1:])[:, i]
        return found.read(name)

    return Tensors(found.source, shapes, read_one)


# --- names ---

BLOCK = {
    "norm_0": "norm0",
    "conv_0": "conv0",
    "embedding": "affine",
    "norm_1": "norm1",
    "conv_1": "conv1",
    "shortcut": "skip",
}
ATTENTION = {"norm": "norm2", "query": "qkv.query", "key": "qkv.key", "value": "qkv.value", "out": "proj"}
TOP = {"time_0": "map_layer0", "time_1": "map_layer1", "class": "map_label", "fourier": "map_noise"}


def layout_of(model: Mapping[str, Any]) -> Layout:
    """The names of the tensors of a network, which contain the resolutions. model: its fields of config.model."""
    levels = len(model["channel_mult"])
    at = [f"{model['image_size'] >> level}x{model['image_size'] >> level}" for level in range(levels)]
    table = {**TOP, "conv_in": f"enc.{at[0]}_conv"}
    if model["name"] == "unet":
        table |= {"norm_out": "out_norm", "conv_out": "out_conv"}
    for level in range(levels):
        last = level == levels - 1
        for side, direction, count in (("enc", "down", 0), ("dec", "up", 1)):
            for i in range(model["num_res_blocks"] + count):
                table[f"{direction}_{level}_block_{i}"] = f"{side}.{at[level]}_block{i}"
                table[f"{direction}_{level}_attention_{i}"] = f"{side}.{at[level]}_block{i}"
        if not last:
            table[f"down_{level}_halve"] = f"enc.{at[level + 1]}_down"
            table[f"down_{level}_aux"] = f"enc.{at[level + 1]}_aux_{model.get('encoder')}"
            table[f"up_{level + 1}_double"] = f"dec.{at[level]}_up"
        if model["name"] == "song_unet":
            suffix = f"_{level}" if level else ""
            table[f"norm_out{suffix}"] = f"dec.{at[level]}_aux_norm"
            table[f"conv_out{suffix}"] = f"dec.{at[level]}_aux_conv"
    table |= {"middle_block_0": f"dec.{at[-1]}_in0", "middle_attention": f"dec.{at[-1]}_in0"}
    table["middle_block_1"] = f"dec.{at[-1]}_in1"

    def name(path: Path, num_levels: int) -> str:
        top, *modules, leaf = path
        inner = ATTENTION if "attention" in (*modules, *top.split("_")) else BLOCK
        names = [inner[module] for module in modules if module != "attention"]
        return ".".join([table[top], *names, "freqs" if leaf == "frequencies" else LEAVES[leaf]])

    return Layout(name, frozenset({"shortcut", "query", "key", "value", "out"}))
