"""The Fréchet distance between Gaussians fitted to features, the mathematics of FID (Heusel et al. 2017).
Host, float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray  # (D,) float64
    cov: np.ndarray  # (D, D) float64, unbiased


def checked(*sets: np.ndarray) -> list[np.ndarray]:
    """Float64 (N, D) each, of one D, finite; ValueError otherwise."""
    sets = [np.asarray(features, np.float64) for features in sets]
    for features in sets:
        if features.ndim != 2 or features.shape[1] != sets[0].shape[1]:
            raise ValueError(f"features must be (N, D) of one D, got {' and '.join(str(f.shape) for f in sets)}")
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"features must be finite, those of image {row} are not")
    return sets


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features (N, D), N >= 2, finite; ValueError otherwise."""
    (features,) = checked(features)
    if len(features) < 2:
        raise ValueError(f"features must be (N, D) with N at least 2, got shape {features.shape}")
    return Moments(features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1))


def distance(a: Moments, b: Moments) -> float:
    """`|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`, at least 0.

    The trace of the root is the sum of the roots of the eigenvalues of `cov_a^(1/2) cov_b cov_a^(1/2)`, a
    symmetric matrix, so no complex numbers and no tolerance are needed where a covariance is singular.
    """
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.cov @ root)
    trace = np.trace(a.cov) + np.trace(b.cov) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(max(np.sum((a.mean - b.mean) ** 2) + trace, 0.0))
