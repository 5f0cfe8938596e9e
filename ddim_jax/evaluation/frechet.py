"""The Fréchet distance between Gaussians fitted to image features, as in FID (Heusel et al. 2017). It is computed on
the host in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """The mean and covariance of image features."""

    mean: np.ndarray  # (D,) float64
    cov: np.ndarray  # (D, D) float64, unbiased
    factor: np.ndarray | None = None  # (R, D) float64, R <= D, with factor^T factor = cov; None for more images than D


class Scatter(NamedTuple):
    """The sums from which moments are computed. Those of several batches can be merged."""

    count: int
    mean: np.ndarray  # (D,) float64
    squares: np.ndarray  # (D, D) float64: sum of (x - mean)(x - mean)^T
    rows: np.ndarray | None  # (R, D) float64 with rows^T rows = squares; None if R > D, where it has no advantage


def checked(*sets: np.ndarray) -> list[np.ndarray]:
    """Sets of features as float64. ValueError unless all are (N, D) with the same D, and finite."""
    sets = [np.asarray(features, np.float64) for features in sets]
    for features in sets:
        if features.ndim != 2 or features.shape[1] != sets[0].shape[1]:
            raise ValueError(f"features must be (N, D) of one D, got {' and '.join(str(f.shape) for f in sets)}")
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"features must be finite, those of image {row} are not")
    return sets


def scatter(features: np.ndarray) -> Scatter:
    """The Scatter of features (N, D). ValueError unless N >= 1 and all are finite."""
    (features,) = checked(features)
    if not len(features):
        raise ValueError(f"features must be (N, D) with N at least 1, got shape {features.shape}")
    mean = features.mean(axis=0)
    rows = features - mean
    return Scatter(len(features), mean, rows.T @ rows, _few(rows))


def merged(a: Scatter, b: Scatter) -> Scatter:
    """The Scatter of the union of two sets (Chan, Golub, LeVeque 1979). It has no cancellation, unlike
    E[x^2] - E[x]^2.
    """
    count, difference = a.count + b.count, b.mean - a.mean
    weight = a.count * b.count / count
    squares = a.squares + b.squares + np.outer(difference, difference) * weight
    have_rows = a.rows is not None and b.rows is not None
    rows = _few(np.concatenate([a.rows, b.rows, np.sqrt(weight) * difference[None]])) if have_rows else None
    return Scatter(count, a.mean + difference * (b.count / count), squares, rows)


def _few(rows: np.ndarray) -> np.ndarray | None:
    """The rows (R, D), None if R > D."""
    return rows if len(rows) <= rows.shape[1] else None


def moments(features: np.ndarray | Scatter) -> Moments:
    """The mean and covariance of features (N, D), or of their Scatter. ValueError unless N >= 2 and all are finite."""
    total = features if isinstance(features, Scatter) else scatter(features)
    if total.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {total.count}")
    factor = None if total.rows is None else total.rows / np.sqrt(total.count - 1)
    return Moments(total.mean, total.squares / (total.count - 1), factor)


def distance(a: Moments, b: Moments) -> float:
    """The Fréchet distance `|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`, at least 0.

    With `cov = F^T F` for both, the trace of the square root is the nuclear norm of `F_a F_b^T`, the sum of its
    singular values. This is also accurate for fewer images than features. The covariances are then singular, and the
    square root of a zero eigenvalue, after rounding, would be 1e-8 of the largest. If neither has a factor, the trace
    is the sum of the square roots of the eigenvalues of the symmetric `cov_a^(1/2) cov_b cov_a^(1/2)`: this costs less.
    """
    if a.factor is None and b.factor is None:
        root = _root(a.cov)
        roots = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.cov @ root), 0, None))
    else:
        left, right = (_root(each.cov) if each.factor is None else each.factor for each in (a, b))
        roots = np.linalg.svd(left @ right.T, compute_uv=False)
    trace = np.trace(a.cov) + np.trace(b.cov) - 2 * roots.sum()
    return float(max(np.sum((a.mean - b.mean) ** 2) + trace, 0.0))


def _root(cov: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
