"""Evaluation of samples against real images."""

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
    """The settings of an evaluation: a feature network, the metrics to compute, and the statistics of real images."""

    network: FeatureNetwork
    metrics: Sequence[str]  # names in `metrics.METRICS`, or "package.module:function"
    reference: Reference
    mesh: jax.sharding.Mesh
    batch_size: int


def evaluate_samples(evaluator: Evaluator, samples: Source, count: int, where: str) -> dict[str, Any]:
    """{metric: value} of the first `count` samples. ConfigError, which begins with `where`, if they cannot be
    evaluated.
    """
    with error_context(where):
        sample_features = features_lib.extract(
            evaluator.network,
            samples,
            evaluator.mesh,
            evaluator.batch_size,
            metrics_lib.needed_of_samples(evaluator.metrics),
            count,
            "samples",
        )
        return metrics_lib.compute(evaluator.metrics, sample_features, evaluator.reference.features)


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
    """Computes metrics of samples against real images and returns {metric: value}.

    samples: images, uint8 (N, H, W, C), or a `data.Source`. real: real images of the same kind, or a file of reference
    statistics. features: a name in `features.FEATURES`, "module:function", or a `FeatureNetwork`. weights: the file of
    its parameters, "" for the default. metrics: names in `metrics.METRICS`, or "module:function". mesh: the devices;
    default: all. ValueError if samples and real images have features of different sizes, and for a wrong argument.
    """
    network = features_lib.open_features(features, weights) if isinstance(features, str) else features
    mesh = sharding.data_mesh() if mesh is None else mesh
    extract = lambda images, keep, doing: features_lib.extract(
        network, _source(images), mesh, batch_size, keep, doing=doing
    )
    sample_features = extract(samples, metrics_lib.needed_of_samples(metrics), "samples")
    if isinstance(real, (str, pathlib.Path)):
        real_features = reference.load(pathlib.Path(real)).features
    else:
        real_features = extract(real, metrics_lib.needed_of_reference(metrics), "real images")
    if len(sample_features.moments.mean) != len(real_features.moments.mean):
        sizes = f"{len(sample_features.moments.mean)} and {len(real_features.moments.mean)}"
        raise ValueError(f"samples and real must have features of one network, got {sizes} features")
    return metrics_lib.compute(metrics, sample_features, real_features)


def _source(images: Source | np.ndarray) -> Source:
    return ArraySource(images) if isinstance(images, np.ndarray) else images
