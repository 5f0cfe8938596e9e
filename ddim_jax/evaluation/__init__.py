"""Evaluation of samples: feature networks, metrics, reference statistics, and `evaluate`, which needs no config."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return importlib.import_module("ddim_jax.evaluation.evaluator").evaluate
    raise AttributeError(f"module 'ddim_jax.evaluation' has no attribute {name!r}")
