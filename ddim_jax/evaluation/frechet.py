"""The Fréchet distance between Gaussians fitted to features, the mathematics of FID (Heusel et al. 2017).
Host, float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray  # (D,) float64
    cov: np.ndarray  # (D, D) float64, unbiased


def moments(features: np.ndarray) -> Moments:
    """Mean and covariance of features (N, D), N >= 2."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
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
