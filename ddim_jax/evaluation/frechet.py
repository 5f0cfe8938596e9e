"""The Fréchet distance between Gaussians fitted to features, the mathematics of FID (Heusel et al. 2017).
Host, float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray  # (D,) float64
    cov: np.ndarray  # (D, D) float64, unbiased


class Scatter(NamedTuple):
    """What moments are computed from, of features that come batch by batch."""

    count: int
    mean: np.ndarray  # (D,) float64
    squares: np.ndarray  # (D, D) float64: sum of (x - mean)(x - mean)^T


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


def scatter(features: np.ndarray) -> Scatter:
    """Of features (N, D), N >= 1, finite; ValueError otherwise."""
    (features,) = checked(features)
    if not len(features):
        raise ValueError(f"features must be (N, D) with N at least 1, got shape {features.shape}")
    mean = features.mean(axis=0)
    return Scatter(len(features), mean, (features - mean).T @ (features - mean))


def merged(a: Scatter, b: Scatter) -> Scatter:
    """That of both sets together (Chan, Golub, LeVeque 1979): nothing cancels, as it would in E[x^2] - E[x]^2."""
    count, apart = a.count + b.count, b.mean - a.mean
    squares = a.squares + b.squares + np.outer(apart, apart) * (a.count * b.count / count)
    return Scatter(count, a.mean + apart * (b.count / count), squares)


def moments(features: np.ndarray | Scatter) -> Moments:
    """Mean and covariance of features (N, D), N >= 2, finite, or of what `scatter` made of them; ValueError
    otherwise.
    """
    total = features if isinstance(features, Scatter) else scatter(features)
    if total.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {total.count}")
    return Moments(total.mean, total.squares / (total.count - 1))


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
