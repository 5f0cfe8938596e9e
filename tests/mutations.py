"""Damaged files as hypothesis strategies, and checks of what reading them gives."""

import attacking
import hypothesis.strategies as st
import jax
import numpy as np
import safetensors.numpy
from tiny import smoke_values

from ddim_jax import checkpoints
from ddim_jax.config import weights
from ddim_jax.utils.errors import CheckpointError, DamagedError

DEEP = "[" * 100_000 + "]" * 100_000
# Values that no field of a config or a header can have: of another type, too large, or not finite.
WRONG = [
    None, True, -1, 0, 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), "", "x",
    "\x1b[2J", "a\nb", [], [[]], [10**9], [[1]] * 3, {}, {"a": 1},
]  # fmt: skip


@st.composite
def damaged(draw, content):
    """The content with a bit flipped, a piece removed or zeroed, or two pieces exchanged. Never the same content."""
    at = lambda: draw(st.integers(0, len(content) - 1))
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "zero", "lost", "swap"]))
    a, b = sorted((at(), at()))
    if kind == "flip":
        changed = content[:a] + bytes([content[a] ^ 1 << draw(st.integers(0, 7))]) + content[a + 1 :]
    elif kind == "cut":
        changed = content[:a]
    elif kind == "zero":
        changed = content[:a] + bytes(b - a) + content[b:]
    elif kind == "lost":
        changed = content[:a] + content[b:]
    else:
        half = (b - a) // 2
        changed = (
            content[:a] + content[b - half : b] + content[a + half : b - half] + content[a : a + half] + content[b:]
        )
    return changed if changed != content else content[:-1]


def refuses_or(call, right=lambda value: True, errors=(CheckpointError,)):
    """call() raises an error of one line, or its value is right. Returns the message, None without an error."""
    attacking.TRIES["tries"] += 1
    try:
        value = call()
    except errors as error:
        if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 2000:
            raise attacking.Loud(f"not one short line: {str(error)!r:.300}") from error
        return str(error)
    except Exception as error:
        raise attacking.Loud(f"{type(error).__name__}: {str(error)[:300]}") from error
    if not right(value):
        raise attacking.Silent("accepted, and the value is wrong")
    return None


def damage_is_seen(call):
    """The DamagedError that call() must raise."""
    return attacking.refuses(call, errors=(DamagedError,))


def equal(tree, other):
    """Whether two trees have equal structure, dtypes and bits."""
    same = lambda a, b: np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(np.asarray(a), np.asarray(b))
    return jax.tree.structure(tree) == jax.tree.structure(other) and jax.tree.all(jax.tree.map(same, tree, other))


def same_network(read, other):
    """Whether two results of `load` are the same network with equal parameters."""
    return read[0] == other[0] and equal(read[1], other[1])


_likes = {}


def load(where):
    """(the fields of a checkpoint, its parameters)"""
    info = weights.read_info(str(where))
    if info.model not in _likes:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        _likes[info.model] = weights.params_like(info.model, mesh)
    fields = (info.name, info.model, info.schedule, dict(info.sample), info.step)
    return fields, info.read(_likes[info.model], True)


def write_old_safetensors(path, arrays, metadata):
    """A file as versions without checksums wrote it."""
    path.write_bytes(safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}, metadata))


def write_smoke(path, params, **changes):
    """A .safetensors file of the smoke network. changes: other values of sections or fields of its config."""
    checkpoints.save(path, params, smoke_values() | changes, 5)


def flat(params):
    """{path: leaf} of nested dicts, the path a tuple of names."""
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


WAYS = ["flip", "cut", "insert", "lost", "double", "zero"]  # of a file without checksums


def altered(data, content, ways, most):
    """A bytearray with one to `most` changes. Hypothesis draws the kind and the place of each."""
    for _ in range(data.draw(st.integers(1, most))):
        if not content:
            break
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(ways)):
            case "cut":
                content = content[: at + 1]
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "swap":
                content = content[at:] + content[:at]
            case "zero":
                content[at : at + 20] = bytes(len(content[at : at + 20]))
            case "double":
                content = content + content[at:]
            case "lost":
                del content[at : at + data.draw(st.integers(1, 10))]
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
    return content
