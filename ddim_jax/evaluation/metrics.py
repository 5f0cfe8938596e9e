"""What is computed from features beside the Fréchet distance: KID, Inception Score, precision and recall. Host,
float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ddim_jax.evaluation.frechet import checked

BLOCK = 2048


class Estimate(NamedTuple):
    mean: float
    std: float  # over the subsets or splits, not of the mean


def kid(a: np.ndarray, b: np.ndarray, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> Estimate:
    """Kernel Inception Distance (Binkowski et al. 2018): the unbiased MMD^2 with the kernel `(x . y / D + 1)^3`.

    a, b: features (N, D), N at least subset_size. Mean and standard deviation over random subsets of both, drawn by
    `seed`; one that equals zero is estimated without bias, so the mean may be a little below 0. ValueError if there
    are fewer images than subset_size, or for a subset_size below 2.
    """
    a, b = checked(a, b)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"subset_size must be in 2..{min(len(a), len(b))}, the number of images, got {subset_size}")
    rng = np.random.Generator(np.random.Philox(seed))
    draw = lambda features: features[rng.choice(len(features), subset_size, replace=False)]
    values = [_mmd2(draw(a), draw(b)) for _ in range(num_subsets)]
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _mmd2(a: np.ndarray, b: np.ndarray) -> float:
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    within = lambda x: (np.sum(k := kernel(x, x)) - np.trace(k)) / (len(x) * (len(x) - 1))
    return within(a) + within(b) - 2 * kernel(a, b).mean()


def inception_score(logits: np.ndarray, splits: int = 10) -> Estimate:
    """Inception Score (Salimans et al. 2016): `exp(E KL(p(y|x) || p(y)))`, at least 1 and at most the number of
    classes.

    logits: (N, K), of images in no order. Mean and standard deviation over `splits` runs of neighbours. ValueError
    if there are fewer images than splits.
    """
    (logits,) = checked(logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be in 1..{len(logits)}, the number of images, got {splits}")
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        p, log = np.exp(log_p[begin:end]), log_p[begin:end]
        marginal = p.mean(axis=0)
        log_marginal = np.log(np.where(marginal > 0, marginal, 1))  # where nothing is, p is 0 too
        scores.append(np.exp((p * (log - log_marginal)).sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


class PrecisionRecall(NamedTuple):
    precision: float  # share of samples within reach of a real image
    recall: float  # share of real images within reach of a sample


def precision_recall(samples: np.ndarray, real: np.ndarray, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): an image is within reach of a set if it is at least
    as near to one of its members as that member's k-th neighbour in the set.

    samples, real: features (N, D) and (M, D), N, M above neighbours; ValueError otherwise. The two depend on N and M:
    compare equal numbers alone.
    """
    samples, real = checked(samples, real)
    if not 1 <= neighbours < min(len(samples), len(real)):
        raise ValueError(
            f"neighbours must be in 1..{min(len(samples), len(real)) - 1}, below the number of images, got {neighbours}"
        )
    return PrecisionRecall(_within_reach(samples, real, neighbours), _within_reach(real, samples, neighbours))


def _within_reach(points: np.ndarray, members: np.ndarray, neighbours: int) -> float:
    # A member's nearest is itself, at distance 0.
    reach = np.concatenate([np.partition(d, neighbours, axis=1)[:, neighbours] for d in _distances(members, members)])
    return float(np.concatenate([(d <= reach).any(axis=1) for d in _distances(points, members)]).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Squared distances (block, M), block by block of a."""
    norms = (b**2).sum(axis=1)
    for begin in range(0, len(a), BLOCK):
        rows = a[begin : begin + BLOCK]
        squared = (rows**2).sum(axis=1)[:, None] + norms[None] - 2 * rows @ b.T
        if a is b:
            np.fill_diagonal(squared[:, begin:], 0)
        yield np.maximum(squared, 0)


def nearest(samples: np.ndarray, real: np.ndarray) -> float:
    """Mean distance of a sample to the nearest real image, features (N, D) and (M, D). Where it is far below that of
    real images held out, samples are copies.
    """
    samples, real = checked(samples, real)
    return float(np.concatenate([np.sqrt(d.min(axis=1)) for d in _distances(samples, real)]).mean())


class Confidence(NamedTuple):
    confidence: float  # mean probability of the class that is seen
    smallest_share: float  # of the images, of the class that is seen least
    largest_share: float


def confidence(logits: np.ndarray) -> Confidence:
    """How sure a classifier is of what it sees, and whether it sees all classes. logits: (N, K)."""
    (logits,) = checked(logits)
    likeliest = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    shares = np.bincount(logits.argmax(axis=1), minlength=logits.shape[1]) / len(logits)
    return Confidence(float((1 / likeliest).mean()), float(shares.min()), float(shares.max()))
