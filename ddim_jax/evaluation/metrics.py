"""Metrics of image features: KID, Inception Score, precision and recall, and the table of all metrics by name. On the
host, in float64.
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


# --- by name ---


class Metric(NamedTuple):
    samples: tuple[str, ...]  # the fields of ImageFeatures that it reads, beside count and moments, of the samples
    reference: tuple[str, ...]  # and of the real images
    compute: Callable[[ImageFeatures, ImageFeatures], dict[str, float]]  # (samples, real) -> numbers, main first


def compute(names: Iterable[str], samples: ImageFeatures, real: ImageFeatures) -> dict[str, Any]:
    """The numbers of the metrics that names lists. ValueError where the reference does not have what one needs, or for
    fewer images than it takes.
    """
    check(names, real)
    return {name: value for one in names for name, value in metric(one).compute(samples, real).items()}


def metric(name: str) -> Metric:
    """The metric called name in METRICS, or what the function of the user's that "package.module:function" names
    returns. ValueError if it is no Metric of known fields.
    """
    found = resolve(METRICS, name)
    found = found() if is_code(name) else found
    fields = ImageFeatures._fields[2:]
    if not isinstance(found, Metric) or not {*found.samples, *found.reference} <= {*fields}:
        raise ValueError(f"{name} must return a Metric that reads {', '.join(fields)}, got {files.shown(found)}")
    return found


def check(names: Iterable[str], real: ImageFeatures) -> None:
    """ValueError where a metric needs more of the real images than what is there."""
    for name in names:
        if any(getattr(real, field) is None for field in metric(name).reference):
            raise ValueError(f"{name} needs the features of the real images, and the reference is mu and sigma alone")


def needed_of_samples(names: Iterable[str]) -> set[str]:
    """What `features.extract` must keep of the samples for these metrics."""
    return {field for name in names for field in metric(name).samples}


def needed_of_reference(names: Iterable[str]) -> set[str]:
    """What `features.extract` must keep of the real images for these metrics."""
    return {field for name in names for field in metric(name).reference}


def _fid(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    return {"fid": frechet.distance(*(_with_factor(images) for images in (samples, real)))}


def _with_factor(images: ImageFeatures) -> Moments:
    """Its moments, with their factor where the features are there to take it from."""
    moments, features = images.moments, images.features
    if moments.factor is None and features is not None and len(features) <= features.shape[1]:
        moments = moments._replace(factor=frechet.moments(features).factor)
    return moments


def _kid(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    size = min(1000, samples.count, real.count)
    found = kid(samples.features, real.features, subset_size=size)
    return {"kid": found.mean, "kid_std": found.std, "kid_subset_size": size}


def _inception_score(samples: ImageFeatures, real: ImageFeatures) -> dict[str, float]:
    splits = min(10, samples.count)
    found = inception_score(samples.logits, splits)
    return {"inception_score": found.mean, "inception_score_std": found.std, "inception_score_splits": splits}


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
