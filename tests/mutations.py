"""Ways to change real files, as strategies of hypothesis, and what may come of it."""

import attacking
import hypothesis.strategies as st
import jax
import numpy as np
import safetensors.numpy

from configs import smoke
from ddim_jax import checkpoints
from ddim_jax import config as config_lib
from ddim_jax.config import weights
from ddim_jax.utils.errors import CheckpointError, DamagedError

DEEP = "[" * 100_000 + "]" * 100_000
# What no field of a config or a header may be: of another type, too large, or not finite.
WRONG = [
    None, True, -1, 0, 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), -float("inf"), "", "x",
    "\x1b[2J", "a\nb", [], [[]], [10**9], [[1]] * 3, {}, {"a": 1},
]  # fmt: skip


@st.composite
def damaged(draw, content):
    """Some bytes with a bit flipped, the end or a piece cut off, a piece zeroed, or two exchanged: never the same."""
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
    """call() refuses in one line, or gives what is right. Returns the message, None if there is none."""
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
        raise attacking.Silent("taken, and it is not what it was")
    return None


def damage_is_seen(call):
    """The DamagedError that call() must raise."""
    return attacking.refuses(call, errors=(DamagedError,))


def equal(tree, other):
    """Whether two trees hold the same bits."""
    same = lambda a, b: np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(np.asarray(a), np.asarray(b))
    return jax.tree.structure(tree) == jax.tree.structure(other) and jax.tree.all(jax.tree.map(same, tree, other))


def same_network(read, other):
    """Whether two results of `load` are the same network with the same bits."""
    return read[0] == other[0] and equal(read[1], other[1])


_likes = {}


def load(where):
    """(what a checkpoint says of its network, parameters)"""
    published = weights.read_info(str(where))
    if published.model not in _likes:
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        _likes[published.model] = weights.params_like(published.model, mesh)
    said = (published.name, published.model, published.schedule, dict(published.sample), published.step)
    return said, published.read(_likes[published.model], True)


def smoke_values():
    """The config of the smoke network, decided, as a run saves it."""
    values = smoke.get_config().to_dict()
    config = config_lib.parse(values)
    values["sample"] |= {"tau": config.sample.tau, "clip_x0": config.sample.clip_x0}
    return values


def write_old_safetensors(path, arrays, metadata):
    """As it was written before there were checksums."""
    path.write_bytes(safetensors.numpy.save({name: np.asarray(array) for name, array in arrays.items()}, metadata))


def write_smoke(path, params, **changes):
    """A .safetensors file of ours. changes: sections and fields of its config, and what they are instead."""
    checkpoints.save(path, params, smoke_values() | changes, 5)


def flat(params):
    """The leaves of nested dicts by their paths, tuples of names."""
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def altered(data, content, ways, most):
    """A bytearray with one to `most` changes, each one of the ways, at places that hypothesis draws."""
    for _ in range(data.draw(st.integers(1, most))):
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
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=8))
    return content
