"""Evaluation from Python, without a config."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ddim_jax import sharding
from ddim_jax.data import ArraySource, Source
from ddim_jax.evaluation import judge, reference
from ddim_jax.evaluation.feature_network import FeatureNetwork


def evaluate(
    samples: Source | np.ndarray,
    real: Source | np.ndarray | str | pathlib.Path,
    *,
    features: FeatureNetwork | str = "inception",
    weights: str = "",
    metrics: Sequence[str] = ("fid",),
    batch_size: int = 50,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """The numbers of the metrics, by name.

    samples: images, uint8 (N, H, W, C), or a `data.Source`. real: the same of real images, or a file of statistics of
    them. features: a name in `judge.FEATURES`, "module:function", or a `FeatureNetwork`; weights: the file of its
    parameters, "" for the usual ones. metrics: names in `judge.METRICS`, or "module:function". mesh: of devices;
    default: all. ValueError where samples and real images do not belong together, and for what these cannot be.
    """
    network = judge.open_features(features, weights) if isinstance(features, str) else features
    mesh = sharding.data_mesh() if mesh is None else mesh
    of = lambda images, kept, doing: judge.judge(network, _source(images), mesh, batch_size, kept, doing=doing)
    found = of(samples, judge.kept_of_samples(metrics), "samples")
    if isinstance(real, (str, pathlib.Path)):
        known = reference.load(pathlib.Path(real)).judged
    else:
        known = of(real, judge.kept_of_reference(metrics), "real images")
    if len(found.moments.mean) != len(known.moments.mean):
        sizes = f"{len(found.moments.mean)} and {len(known.moments.mean)}"
        raise ValueError(f"samples and real must have features of one network, got {sizes} features")
    return judge.measure(metrics, found, known)


def _source(images: Source | np.ndarray) -> Source:
    return ArraySource(images) if isinstance(images, np.ndarray) else images
