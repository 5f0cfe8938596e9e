"""Training: objectives, times, optimizers and moving averages, the update, and `fit`, which trains without a config."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":  # loaded when it is first used: it needs Orbax, which takes a second
        return importlib.import_module("ddim_jax.training.fitting").fit
    raise AttributeError(f"module 'ddim_jax.training' has no attribute {name!r}")
