"""Training: objectives, timestep distributions, optimizers, EMA, the update, and `fit`, which needs no config."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":  # imported at its first use: importing Orbax takes a second
        return importlib.import_module("ddim_jax.training.fitting").fit
    raise AttributeError(f"module 'ddim_jax.training' has no attribute {name!r}")
