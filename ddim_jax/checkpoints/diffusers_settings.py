"""Checks of the settings in diffusers' JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

# The types of the fields whose default is None.
OPTIONAL = {
    "sample_size": (int, list, tuple),
    "time_embedding_dim": int,
    "attn_norm_num_groups": int,
    "num_class_embeds": int,
    "num_train_timesteps": int,
    "trained_betas": (list, tuple),
}


def unsupported(where: str, name: str, found: Any, supported: str) -> NoReturn:
    """Raises a CheckpointError for an unsupported setting. where: the file. found: the value. supported: what is
    allowed, as text.
    """
    raise CheckpointError(f"{where}: {name} = {files.shown(found)} is not supported; supported: {supported}")


def settings(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of all fields in `defaults`. A field that is missing in `values` has its default. CheckpointError for
    a value of another type than the default. where: the file, for messages.
    """
    settings = {**defaults, **{name: values[name] for name in defaults if name in values}}
    for name, default in defaults.items():
        value = settings[name]
        if value is None and (default is None or name == "attention_head_dim"):
            continue
        kinds = {bool: bool, str: str, tuple: (list, tuple), type(None): OPTIONAL.get(name)}
        kind = kinds.get(type(default), (int, float))
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            expected = "a list" if kind == (list, tuple) and default is None else f"of the same type as {default!r}"
            raise CheckpointError(f"{where}: {name} must be {expected}, got {files.shown(value)}")
    return settings
