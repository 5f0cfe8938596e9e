"""The Fréchet distance between Gaussians fitted to features, the mathematics of FID (Heusel et al. 2017).
Host, float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    mean: np.ndarray  # (D,) float64
    cov: np.ndarray  # (D, D) float64, unbiased
    factor: np.ndarray | None = None  # (R, D) float64, R <= D, with factor^T factor = cov; None for more images than D


class Scatter(NamedTuple):
    """What moments are computed from, of features that come batch by batch."""

    count: int
    mean: np.ndarray  # (D,) float64
    squares: np.ndarray  # (D, D) float64: sum of (x - mean)(x - mean)^T
    rows: np.ndarray | None  # (R, D) float64 with rows^T rows = squares; None for R > D, where squares says as much


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
    rows = features - mean
    return Scatter(len(features), mean, rows.T @ rows, _few(rows))


def merged(a: Scatter, b: Scatter) -> Scatter:
    """That of both sets together (Chan, Golub, LeVeque 1979): nothing cancels, as it would in E[x^2] - E[x]^2."""
    count, apart = a.count + b.count, b.mean - a.mean
    weight = a.count * b.count / count
    squares = a.squares + b.squares + np.outer(apart, apart) * weight
    both = a.rows is not None and b.rows is not None
    rows = _few(np.concatenate([a.rows, b.rows, np.sqrt(weight) * apart[None]])) if both else None
    return Scatter(count, a.mean + apart * (b.count / count), squares, rows)


def _few(rows: np.ndarray) -> np.ndarray | None:
    return rows if len(rows) <= rows.shape[1] else None


def moments(features: np.ndarray | Scatter) -> Moments:
    """Mean and covariance of features (N, D), N >= 2, finite, or of what `scatter` made of them; ValueError
    otherwise.
    """
    total = features if isinstance(features, Scatter) else scatter(features)
    if total.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {total.count}")
    factor = None if total.rows is None else total.rows / np.sqrt(total.count - 1)
    return Moments(total.mean, total.squares / (total.count - 1), factor)


def distance(a: Moments, b: Moments) -> float:
    """`|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`, at least 0.

    With `cov = F^T F` for both, the trace of the root is the nuclear norm of `F_a F_b^T`, the sum of its singular
    values. That keeps all digits for fewer images than features, where the covariances are singular and the root of
    what rounding left of an eigenvalue 0 is 1e-8 of the largest. Where neither has a factor it is the sum of the roots
    of the eigenvalues of the symmetric `cov_a^(1/2) cov_b cov_a^(1/2)`, which is less work.
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
    """The symmetric square root."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
