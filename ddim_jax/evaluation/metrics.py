"""Metrics of image features: KID, Inception Score, precision and recall, and the table of all metrics. They are
computed on the host in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ddim_jax.data import check_labels
from ddim_jax.evaluation import frechet
from ddim_jax.evaluation.features import ImageFeatures
from ddim_jax.evaluation.frechet import Moments, checked
from ddim_jax.registry import is_code, resolve
from ddim_jax.utils import files

BLOCK = 2048  # rows of a distance matrix that are in memory at a time


class Estimate(NamedTuple):
    mean: float
    std: float  # the standard deviation over the subsets or splits, not of the mean


def kid(a: np.ndarray, b: np.ndarray, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0) -> Estimate:
    """Kernel Inception Distance (Binkowski et al. 2018): the unbiased MMD^2 with the kernel `(x . y / D + 1)^3`.

    a, b: features (N, D), N at least subset_size. Returns the mean and the standard deviation over random subsets of
    both, drawn with `seed`. The estimate is unbiased, so it can be slightly negative where the KID is 0. ValueError if
    there are fewer images than subset_size, or if subset_size is below 2.
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
    """Inception Score (Salimans et al. 2016): `exp(E KL(p(y|x) || p(y)))`, between 1 and the number of classes.

    logits: (N, K), of images in random order. Returns the mean and the standard deviation over `splits` contiguous
    splits. ValueError if there are fewer images than splits.
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
        log_marginal = np.log(np.where(marginal > 0, marginal, 1))  # where the marginal is 0, p is 0 as well
        scores.append(np.exp((p * (log - log_marginal)).sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


class PrecisionRecall(NamedTuple):
    precision: float  # the fraction of samples in the manifold of the real images
    recall: float  # the fraction of real images in the manifold of the samples


def precision_recall(samples: np.ndarray, real: np.ndarray, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019). The manifold of a set is the union of balls around its
    members; the radius of a ball is the distance of the member to its k-th nearest neighbour in the set.

    samples, real: features (N, D) and (M, D). neighbours: k. ValueError unless N and M are above k. The results depend
    on N and M: compare only results with the same N and M.
    """
    samples, real = checked(samples, real)
    if not 1 <= neighbours < min(len(samples), len(real)):
        raise ValueError(
            f"neighbours must be in 1..{min(len(samples), len(real)) - 1}, below the number of images, got {neighbours}"
        )
    return PrecisionRecall(
        _fraction_in_manifold(samples, real, neighbours), _fraction_in_manifold(real, samples, neighbours)
    )


def _fraction_in_manifold(points: np.ndarray, members: np.ndarray, neighbours: int) -> float:
    # The nearest neighbour at index 0 is the member itself, at distance 0.
    radii = np.concatenate([np.partition(d, neighbours, axis=1)[:, neighbours] for d in _distances(members, members)])
    return float(np.concatenate([(d <= radii).any(axis=1) for d in _distances(points, members)]).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the squared distances (block, M) between blocks of a (N, D) and b (M, D)."""
    norms = (b**2).sum(axis=1)
    for begin in range(0, len(a), BLOCK):
        rows = a[begin : begin + BLOCK]
        squared = (rows**2).sum(axis=1)[:, None] + norms[None] - 2 * rows @ b.T
        if a is b:
            np.fill_diagonal(squared[:, begin:], 0)
        yield np.maximum(squared, 0)


def nearest(samples: np.ndarray, real: np.ndarray) -> float:
    """The mean distance of a sample to the nearest real image, in features (N, D) and (M, D). If it is much smaller
    than the distance for held-out real images, the samples are copies.
    """
    samples, real = checked(samples, real)
    return float(np.concatenate([np.sqrt(d.min(axis=1)) for d in _distances(samples, real)]).mean())


class Confidence(NamedTuple):
    confidence: float  # the mean probability of the predicted class
    smallest_share: float  # the fraction of the images that are predicted as the rarest class
    largest_share: float  # the fraction of the images that are predicted as the most frequent class


def confidence(logits: np.ndarray) -> Confidence:
    """The confidence of a classifier, and how evenly its predictions cover the classes. logits: (N, K)."""
    (logits,) = checked(logits)
    inverse_confidence = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    fractions = np.bincount(logits.argmax(axis=1), minlength=logits.shape[1]) / len(logits)
    return Confidence(float((1 / inverse_confidence).mean()), float(fractions.min()), float(fractions.max()))


# --- the table of metrics ---


class Metric(NamedTuple):
    """A metric. It may read count and moments of ImageFeatures, and the fields that it names."""

    samples: tuple[str, ...]  # the fields that it reads of the samples
    reference: tuple[str, ...]  # the fields that it reads of the real images
    compute: Callable[[ImageFeatures, ImageFeatures], dict[str, float]]  # (samples, real) -> {name: value}, main first


def compute(names: Iterable[str], samples: ImageFeatures, real: ImageFeatures) -> dict[str, Any]:
    """{name: value} of the metrics with these names. ValueError if the reference lacks a field that a metric needs, and
    if there are too few images.
    """
    check(names, real)
    return {key: value for name in names for key, value in metric(name).compute(samples, real).items()}


def metric(name: str) -> Metric:
    """The metric with this name in METRICS, or the result of the user's function "package.module:function". ValueError
    if it is not a Metric, or names fields that ImageFeatures does not have.
    """
    result = resolve(METRICS, name)
    result = result() if is_code(name) else result
    fields = ImageFeatures._fields[2:]
    if not isinstance(result, Metric) or not {*result.samples, *result.reference} <= {*fields}:
        raise ValueError(f"{name} must return a Metric that reads {', '.join(fields)}, got {files.shown(result)}")
    return result


def check(names: Iterable[str], real: ImageFeatures) -> None:
    """ValueError if a metric needs a field of the real images that is None."""
    for name in names:
        if any(getattr(real, field) is None for field in metric(name).reference):
            raise ValueError(f"{name} needs the features of the real images, the reference has only mu and sigma")


def needed_of_samples(names: Iterable[str]) -> set[str]:
    """The fields of the samples that these metrics need: the argument `keep` of `features.extract`."""
    return {field for name in names for field in metric(name).samples}


def needed_of_reference(names: Iterable[str]) -> set[str]:
    """The fields of the real images that these metrics need: the argument `keep` of `features.extract`."""
    return {field for name in names for field in metric(name).reference}


def _fid(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    return {"fid": frechet.distance(*(_with_factor(images) for images in (samples, real)))}


def _with_factor(images: ImageFeatures) -> Moments:
    """The moments of images, with the factor if it can be computed from the features."""
    moments, features = images.moments, images.features
    if moments.factor is None and features is not None and len(features) <= features.shape[1]:
        moments = moments._replace(factor=frechet.moments(features).factor)
    return moments


def _kid(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    size = min(1000, samples.count, real.count)
    estimate = kid(samples.features, real.features, subset_size=size)
    return {"kid": estimate.mean, "kid_std": estimate.std, "kid_subset_size": size}


def _inception_score(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    splits = min(10, samples.count)
    estimate = inception_score(samples.logits, splits)
    return {"inception_score": estimate.mean, "inception_score_std": estimate.std, "inception_score_splits": splits}


def _precision_recall(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    return precision_recall(samples.features, real.features)._asdict()


def _confidence(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    return confidence(samples.logits)._asdict()


def _agreement(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    check_labels(samples.labels, samples.logits.shape[1])
    return {"agreement": float((samples.logits.argmax(axis=1) == samples.labels).mean())}


def _nearest(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    return {"nearest": nearest(samples.features, real.features)}


METRICS = {
    "fid": Metric((), (), _fid),
    "kid": Metric(("features",), ("features",), _kid),
    "inception_score": Metric(("logits",), (), _inception_score),
    "precision_recall": Metric(("features",), ("features",), _precision_recall),
    "confidence": Metric(("logits",), (), _confidence),
    "agreement": Metric(("logits", "labels"), (), _agreement),
    "nearest": Metric(("features",), ("features",), _nearest),
}
