"""Files of named tensors, and the network parameters in them. Opening a file never executes code in it."""

from __future__ import annotations

import hashlib
import json
import pathlib
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
from ddim_jax.checkpoints.torch_file import Tensor
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError, DamagedError


class Tensors(NamedTuple):
    """Named tensors of a file. No tensor is read yet."""

    source: str  # the file, for messages
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    layout: Layout | None = None  # None: the names of ddim_jax, "module/leaf"


# Keys in the metadata of a .safetensors file that ddim_jax writes. CHECKSUMS: the checksum of each tensor, as JSON.
# DIGEST: a checksum of the rest of the header: names, dtypes, shapes and the other metadata with CHECKSUMS.
CHECKSUMS, DIGEST = "checksums", "digest"


def to_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The content of a .safetensors file. Its metadata also holds the checksums that `open_safetensors` verifies."""
    metadata = {**metadata, CHECKSUMS: json.dumps({name: checksum(array) for name, array in arrays.items()})}
    content = safetensors.numpy.save(dict(arrays), metadata)
    header, begin = _header(content[:8], content[8:])
    header["__metadata__"][DIGEST] = _header_digest(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[begin:]


def open_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors file, and its metadata.

    DamagedError if it is not a complete .safetensors file. If the metadata holds checksums, also if the header does not
    match its checksum; `read` of the result then raises it for a tensor that does not match its checksum.
    """
    try:
        files.check_regular(path)
        with open(path, "rb") as file:
            header, _ = _header(file.read(8), file)
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            metadata = file.metadata() or {}
        checksums = dict(files.parse_json(metadata[CHECKSUMS], "its metadata")) if DIGEST in metadata else {}
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is not a complete .safetensors file: {error}") from error
    if DIGEST in metadata and metadata[DIGEST] != _header_digest(header):
        raise DamagedError(f"{path} is damaged: its header does not match its checksum")

    # The file is opened for each tensor: the pages read from a mapped file count as memory until it is closed.
    def read(name: str) -> np.ndarray:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                array = file.get_tensor(name)
        except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:  # a dtype that NumPy lacks
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        if name in checksums and checksums[name] != checksum(array):
            raise DamagedError(f"{path} is damaged: {name} does not match its checksum")
        return array

    return Tensors(str(path), shapes, read), metadata


def _header(length: bytes, rest: Any) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and the offset of the tensors. ValueError if there is no header.

    length: the first 8 bytes. rest: the bytes after these, or the open file to read them from.
    """
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > files.JSON_BYTES:
        raise ValueError(f"expected a header length of at most {files.JSON_BYTES} in the first 8 bytes, got {length!r}")
    header = files.parse_json(rest[:size] if isinstance(rest, bytes) else rest.read(size), "its header")
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ValueError("its header holds no tensors")
    return header, 8 + size


def _header_digest(header: Mapping[str, Any]) -> str:
    """The digest of a header, without the offsets of the tensors and the digest itself."""
    metadata = {name: value for name, value in header.get("__metadata__", {}).items() if name != DIGEST}
    tensors = {name: [entry.get("dtype"), entry.get("shape")] for name, entry in header.items() if "dtype" in entry}
    return files.json_digest([metadata, tensors])


def from_torch(source: str, state: Any) -> Tensors:
    """The tensors of a state dict that `torch_file.load` read. CheckpointError if it contains anything else."""
    is_state_dict = isinstance(state, Mapping) and bool(state)
    if not is_state_dict or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()):
        raise CheckpointError(f"{source} contains no state dict (a dict of tensors), but {_kind(state)}")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}

    def read(name: str) -> np.ndarray:
        array = state[name].read()
        return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return Tensors(source, {name: tensor.shape for name, tensor in state.items()}, read)


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with {', '.join(files.shown(key) for key in list(content)[:5]) or 'nothing'}"
    if isinstance(content, (list, tuple)):
        return f"a list of {len(content)}"
    return f"a {type(content).__name__}"


def read(tensors: Tensors, like: Any, expected_by: str) -> Any:
    """The parameters of a network, read from named tensors one by one: memory holds the parameters and two tensors.

    like: the network's parameters, nested dicts of ShapeDtypeStructs with shardings. expected_by: what defines the
    expected shapes, for messages. CheckpointError, naming the tensor, if one is missing, unexpected, of another shape,
    not of floats, or not finite. DamagedError if one does not match its checksum.
    """
    layout = tensors.layout
    flat = flax.traverse_util.flatten_dict(like)
    num_levels = len({path[0] for path in flat if path[0].endswith("_halve")}) + 1
    names = {path: name_of(path, layout, num_levels) for path in flat}
    expected = {names[path]: expected_shape(path, leaf.shape, layout) for path, leaf in flat.items()}
    same = lambda name: name in expected and _matrix(tensors.shapes[name]) == _matrix(expected[name])
    saved = {name: expected[name] if same(name) else shape for name, shape in tensors.shapes.items()}
    check_shapes(saved, expected, tensors.source, expected_by)
    params = {}
    for path, leaf in flat.items():
        array = tensors.read(names[path])
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(f"{tensors.source}: {names[path]} must be of floats, got dtype {array.dtype}")
        array = array if layout is None else parameter_names.from_torch_layout(path, array, len(leaf.shape))
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, leaf.dtype)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{tensors.source}: {names[path]} holds values that are not finite")
        params[path] = jax.make_array_from_callback(array.shape, leaf.sharding, lambda index, array=array: array[index])
    return flax.traverse_util.unflatten_dict(params)


def digest(params: Any) -> str:
    """SHA-256 of all leaves and their paths in the tree."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).data)
    return total.hexdigest()


def name_of(path: tuple[str, ...], layout: Layout | None, num_levels: int) -> str:
    """The name of a parameter's tensor in a file. num_levels: the number of resolutions of the network."""
    return "/".join(path) if layout is None else layout.name(path, num_levels)


def expected_shape(path: tuple[str, ...], shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """The shape in a file of the parameter that has `shape` in ddim_jax."""
    if layout is None:
        return tuple(shape)
    return parameter_names.to_torch_layout(path, np.broadcast_to(np.float32(0), shape), layout).shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(out, in) for a 1x1 convolution, which is equivalent to a matrix; any other shape unchanged."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
