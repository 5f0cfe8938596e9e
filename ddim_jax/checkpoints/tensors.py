"""Files of named tensors, opened without running what is in them, and the parameters that they hold."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ddim_jax.checkpoints import parameter_names
from ddim_jax.checkpoints.parameter_names import Layout
from ddim_jax.checkpoints.shapes import check_shapes, checksum
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError, DamagedError


class Tensors(NamedTuple):
    """Named tensors of a file, none of them read yet."""

    source: str  # for people
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    layout: Layout | None = None  # None: our own names, "module/leaf"


# Of the metadata of a .safetensors file that we write: a checksum of each tensor's bytes, as JSON, and one of all else
# that the header says: names, dtypes, shapes and the other metadata, the checksums among them.
CHECKSUMS, DIGEST = "checksums", "digest"


def to_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a .safetensors file whose metadata also holds the checksums that `open_safetensors` compares."""
    metadata = {**metadata, CHECKSUMS: json.dumps({name: checksum(array) for name, array in arrays.items()})}
    content = safetensors.numpy.save(dict(arrays), metadata)
    header, begin = _header(content[:8], content[8:])
    header["__metadata__"][DIGEST] = _header_digest(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[begin:]


def open_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors file, and its metadata. CheckpointError if it is not one; DamagedError if it is not
    complete, or, where its metadata holds checksums, not what was written: at once for what the header says, for a
    tensor as it is read.
    """
    whole = f"{path} is no complete .safetensors file"
    try:
        files.check_regular(path)
        with open(path, "rb") as file:
            header, _ = _header(file.read(8), file)
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            metadata = file.metadata() or {}
        checksums = dict(files.parse_json(metadata[CHECKSUMS], "its metadata")) if DIGEST in metadata else {}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{whole}: {error}") from error
    if DIGEST in metadata and metadata[DIGEST] != _header_digest(header):
        raise DamagedError(f"{path} is damaged: its header is not what was written")

    def read(name: str) -> np.ndarray:  # opened for each: what was read of a mapped file counts until it is closed
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                array = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:  # dtypes that NumPy has not
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if name in checksums and checksums[name] != checksum(array):
            raise DamagedError(f"{path} is damaged: {name} is not what was written")
        return array

    return Tensors(str(path), shapes, read), metadata


def _header(length: bytes, rest: Any) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and where the tensors begin. length: the first 8 bytes. rest: the others, or
    the file that they are read from. ValueError if there is none.
    """
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > files.JSON_BYTES:
        raise ValueError(f"it begins with {length!r}, not with the length of a header of at most {files.JSON_BYTES}")
    header = files.parse_json(rest[:size] if isinstance(rest, bytes) else rest.read(size), "its header")
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("its header holds no tensors")
    return header, 8 + size


def _header_digest(header: Mapping[str, Any]) -> str:
    """Of all that a header says but where tensors lie, and this."""
    metadata = {name: value for name, value in header.get("__metadata__", {}).items() if name != DIGEST}
    described = {name: [entry.get("dtype"), entry.get("shape")] for name, entry in header.items() if "dtype" in entry}
    return files.json_digest([metadata, described])


def load_torch(path: pathlib.Path) -> Any:
    """The content of a file that PyTorch wrote, by weights-only loading: tensors and plain containers, no code.
    CheckpointError otherwise, or without PyTorch; DamagedError where the file's own CRCs show that it has changed.
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
        files.check_regular(path)
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DamagedError:
        raise
    except Exception as error:  # a pickle can fail in any way
        told = re.search(r"unsupported[^.\n]*.[^.\n]*", str(error), re.IGNORECASE)
        reason = told[0] if told else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as tensors alone (nothing in it was executed): {reason[:200]}"
        ) from error


def _check_zip(path: pathlib.Path) -> None:
    """DamagedError if a file of an archive has not its CRC; ValueError if the archive is none that PyTorch writes,
    which compresses nothing: such a one may be of any size when it is read.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries are larger than the file")
        has_crcs = any(entry.CRC for entry in entries)  # PyTorch can be told not to compute them
        damaged = archive.testzip() if has_crcs else None
    if damaged is not None:
        raise DamagedError(f"{path} is damaged: {damaged} in it has not the CRC that was written")


def from_torch(source: str, state: Any) -> Tensors:
    """The tensors of a state dict, as PyTorch holds them. CheckpointError if it holds anything else."""
    if not isinstance(state, Mapping) or not state or not all(map(_is_tensor, state.items())):
        raise CheckpointError(f"{source} holds no state dict (a dict of tensors), but {_kind(state)}")
    state = {name.removeprefix("module."): tensor.detach() for name, tensor in state.items()}

    def read(name: str) -> np.ndarray:
        try:
            return (state[name].float() if state[name].is_floating_point() else state[name]).numpy()
        except (RuntimeError, TypeError) as error:  # sparse, quantised, without storage
            raise CheckpointError(f"{source}: {name} cannot be read: {error}") from error

    return Tensors(source, {name: tuple(tensor.shape) for name, tensor in state.items()}, read)


def _is_tensor(item: tuple[Any, Any]) -> bool:
    """Whether it is a name and a dense tensor all of whose values are stored: a view may claim any size."""
    import torch

    name, tensor = item
    dense = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    return dense and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with {', '.join(files.shown(key) for key in list(content)[:5]) or 'nothing'}"
    if isinstance(content, (list, tuple)):
        return f"a list of {len(content)}"
    return f"a {type(content).__name__}"


def read(tensors: Tensors, like: Any, said: str) -> Any:
    """The parameters that tensors hold, placed one by one: memory holds the parameters and two tensors.

    like: the network's parameters, nested dicts of ShapeDtypeStructs with shardings. said: what the shapes that are
    expected follow from, for people. Raises CheckpointError, naming the tensor, if one is missing, has another
    shape, is not the network's, or holds what is no finite float; DamagedError if it is not what was written.
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
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(f"{tensors.source}: {called[path]} is of type {array.dtype}, not of floats")
        array = array if layout is None else parameter_names.to_ours(path, array, len(leaf.shape))
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, leaf.dtype)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{tensors.source}: {called[path]} holds values that are not finite")
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
    return parameter_names.to_theirs(path, np.broadcast_to(np.float32(0), shape), layout).shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) of a 1x1 convolution, which may stand for a matrix; any other shape as it is."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
