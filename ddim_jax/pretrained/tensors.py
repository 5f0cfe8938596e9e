"""Files of named tensors, opened without running what is in them, and the parameters that they hold."""

from __future__ import annotations

import hashlib
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import safetensors

from ddim_jax.checkpoint import check_shapes
from ddim_jax.errors import CheckpointError
from ddim_jax.pretrained import names
from ddim_jax.pretrained.names import Layout


class Tensors(NamedTuple):
    """Named tensors of a file, none of them read yet."""

    source: str  # for people
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    layout: Layout | None = None  # None: our own names, "module/leaf"


def open_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors file, and its metadata. CheckpointError if it is damaged or not one."""

    def read(name: str) -> np.ndarray:  # opened for each: what was read of a mapped file counts until it is closed
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_tensor(name)

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return Tensors(str(path), shapes, read), file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no complete .safetensors file: {error}") from error


def load_torch(path: pathlib.Path) -> Any:
    """The content of a file that PyTorch wrote, by weights-only loading: tensors and plain containers, no code.
    CheckpointError otherwise, or without PyTorch.
    """
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path} is in PyTorch's own format: to read it, pip install 'ddim-jax[torch]' "
            f"(a .safetensors file needs no PyTorch)"
        ) from None
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle can fail in any way
        told = re.search(r"unsupported[^.\n]*.[^.\n]*", str(error), re.IGNORECASE)
        reason = told[0] if told else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as tensors alone (nothing in it was executed): {reason[:200]}"
        ) from error


def from_torch(source: str, state: Any) -> Tensors:
    """The tensors of a state dict, as PyTorch holds them. CheckpointError if it holds anything else."""
    if not isinstance(state, Mapping) or not state or not all(hasattr(value, "numpy") for value in state.values()):
        raise CheckpointError(f"{source} holds no state dict (a dict of tensors), but {_kind(state)}")
    state = {name.removeprefix("module."): tensor.detach() for name, tensor in state.items()}
    return Tensors(
        source,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: (state[name].float() if state[name].is_floating_point() else state[name]).numpy(),
    )


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with {', '.join(repr(key) for key in list(content)[:5]) or 'nothing'}"
    if isinstance(content, (list, tuple)):
        return f"a list of {len(content)}"
    return f"a {type(content).__name__}"


def read(tensors: Tensors, like: Any, said: str) -> Any:
    """The parameters that tensors hold, placed one by one: memory holds the parameters and two tensors.

    like: the network's parameters, nested dicts of ShapeDtypeStructs with shardings. said: what the shapes that are
    expected follow from, for people. Raises CheckpointError, naming the tensor, if one is missing, has another
    shape, or is not the network's.
    """
    layout = tensors.layout
    flat = flax.traverse_util.flatten_dict(like)
    num_levels = sum(path[0].endswith("_halve") and path[-1] == "bias" for path in flat) + 1
    called = {path: name_of(path, layout, num_levels) for path in flat}
    expected = {called[path]: expected_shape(path, leaf.shape, layout) for path, leaf in flat.items()}
    same = lambda name: name in expected and _matrix(tensors.shapes[name]) == _matrix(expected[name])
    there = {name: expected[name] if same(name) else shape for name, shape in tensors.shapes.items()}
    check_shapes(there, expected, tensors.source, said)
    params = {}
    for path, leaf in flat.items():
        array = tensors.read(called[path])
        array = array if layout is None else names.to_ours(path, array, len(leaf.shape))
        array = np.ascontiguousarray(array, leaf.dtype)
        params[path] = jax.make_array_from_callback(array.shape, leaf.sharding, lambda part, array=array: array[part])
    return flax.traverse_util.unflatten_dict(params)


def digest(params: Any) -> str:
    """SHA-256 of all leaves and their places."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).data)
    return total.hexdigest()


def name_of(path: tuple[str, ...], layout: Layout | None, num_levels: int) -> str:
    return "/".join(path) if layout is None else layout.name(path, num_levels)


def expected_shape(path: tuple[str, ...], shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    if layout is None:
        return tuple(shape)
    return names.to_theirs(path, np.broadcast_to(np.float32(0), shape), layout).shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) of a 1x1 convolution, which may stand for a matrix; any other shape as it is."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
