"""Samples evaluated against real images."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ddim_jax.data import ArraySource, Source
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics as metrics_lib
from ddim_jax.evaluation import reference
from ddim_jax.evaluation.feature_network import FeatureNetwork
from ddim_jax.evaluation.reference import Reference
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import error_context


class Evaluator(NamedTuple):
    """A feature network, the metrics to compute, and the real images that samples are compared with."""

    network: FeatureNetwork
    metrics: Sequence[str]  # names in `metrics.METRICS`, or "package.module:function"
    reference: Reference
    mesh: jax.sharding.Mesh
    batch_size: int


def evaluate_samples(evaluator: Evaluator, samples: Source, count: int, where: str) -> dict[str, Any]:
    """The numbers of the first `count` samples. ConfigError, beginning with `where`, where they cannot be evaluated."""
    with error_context(where):
        found = features_lib.extract(
            evaluator.network,
            samples,
            evaluator.mesh,
            evaluator.batch_size,
            metrics_lib.needed_of_samples(evaluator.metrics),
            count,
            "samples",
        )
        return metrics_lib.compute(evaluator.metrics, found, evaluator.reference.features)


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
    them. features: a name in `features.FEATURES`, "module:function", or a `FeatureNetwork`; weights: the file of its
    parameters, "" for the usual ones. metrics: names in `metrics.METRICS`, or "module:function". mesh: of devices;
    default: all. ValueError where samples and real images do not belong together, and for what these cannot be.
    """
    network = features_lib.open_features(features, weights) if isinstance(features, str) else features
    mesh = sharding.data_mesh() if mesh is None else mesh
    of = lambda images, kept, doing: features_lib.extract(network, _source(images), mesh, batch_size, kept, doing=doing)
    found = of(samples, metrics_lib.needed_of_samples(metrics), "samples")
    if isinstance(real, (str, pathlib.Path)):
        known = reference.load(pathlib.Path(real)).features
    else:
        known = of(real, metrics_lib.needed_of_reference(metrics), "real images")
    if len(found.moments.mean) != len(known.moments.mean):
        sizes = f"{len(found.moments.mean)} and {len(known.moments.mean)}"
        raise ValueError(f"samples and real must have features of one network, got {sizes} features")
    return metrics_lib.compute(metrics, found, known)


def _source(images: Source | np.ndarray) -> Source:
    return ArraySource(images) if isinstance(images, np.ndarray) else images
