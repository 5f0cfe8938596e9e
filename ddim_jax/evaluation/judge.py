"""Images through a feature network, once, and every number that is computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from tqdm import tqdm

from ddim_jax import files, sharding
from ddim_jax.data import Source, check_labels
from ddim_jax.evaluation import digits_classifier, frechet, inception, metrics
from ddim_jax.evaluation.feature_network import FeatureNetwork, Output
from ddim_jax.evaluation.frechet import Moments
from ddim_jax.registry import is_code, resolve

FEATURES = {  # (path of the weights, "" for the usual ones) -> FeatureNetwork
    "inception": inception.open_network,
    "digits": digits_classifier.open_network,
}


def open_features(name: str, weights: str = "") -> FeatureNetwork:
    """The network called name in FEATURES, or what the function of yours that "package.module:function" names makes of
    the path of the weights. ValueError, or CheckpointError, if there is none.
    """
    network = resolve(FEATURES, name)(weights)
    if not isinstance(network, FeatureNetwork):
        raise ValueError(f"{files.shown(name)} must return a FeatureNetwork, got {type(network).__name__}")
    return network


def num_features(network: FeatureNetwork, image_shape: tuple[int, int, int]) -> int:
    """How many features it has; ValueError if it does not take images (H, W, C) of this shape."""
    images = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
    return jax.eval_shape(network.feature_fn, images).features.shape[-1]


class Judged(NamedTuple):
    """What is left of images: all that the metrics read."""

    count: int
    moments: Moments  # of the features
    features: np.ndarray | None = None  # (N, D) float32, where a metric needs them
    logits: np.ndarray | None = None  # (N, K) float32, likewise
    labels: np.ndarray | None = None  # (N,) ints, the classes that the images were drawn as, likewise


class Metric(NamedTuple):
    samples: tuple[str, ...]  # the fields of Judged that it reads, beside count and moments, of the samples
    reference: tuple[str, ...]  # and of the real images
    compute: Callable[[Judged, Judged], dict[str, float]]  # (samples, reference) -> numbers, the main one first


def judge(
    network: FeatureNetwork,
    source: Source,
    mesh: Mesh,
    batch_size: int,
    keep: Iterable[str] = (),
    count: int | None = None,
    doing: str = "features",
) -> Judged:
    """The first `count` images of a source (default: all) as the network sees them, in batches over the mesh: the
    moments are summed in float64, and what `keep` names, "features", "logits" or "labels", is kept beside them.

    ValueError, naming the image, where features are not finite, and where labels are to be kept of images without.
    """
    count = len(source) if count is None else count
    kept, total, done = {name: [] for name in keep}, None, 0
    with tqdm(total=count, desc=doing, unit="image") as bar:
        for output, labels in outputs(network, source, mesh, batch_size, count):
            if "labels" in kept:
                if labels is None:
                    raise ValueError("the images have no classes (arr_1 of the .npz), which agreement is with")
                kept["labels"].append(labels)
            for name, array in output._asdict().items():
                bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
                if len(bad):
                    raise ValueError(f"the {name} of image {done + bad[0]} are not finite ({network.name})")
                if name in kept:
                    kept[name].append(array)
            if not done:
                row = sum(array.nbytes // len(array) for name, array in output._asdict().items() if name in kept)
                files.check_memory(count * row, f"what is kept of {count} images")
            part = frechet.scatter(output.features)
            total = part if total is None else frechet.merged(total, part)
            done += len(output.features)
            bar.update(len(output.features))
    arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
    return Judged(count, frechet.moments(total), **arrays)


def outputs(
    network: FeatureNetwork, source: Source, mesh: Mesh, batch_size: int, count: int
) -> Iterator[tuple[Output, np.ndarray | None]]:
    """Output on the host, batch by batch, of the first `count` images of a source, and their labels if they have any.
    While a batch is computed the next is read.
    """
    size = -(-min(batch_size, count) // mesh.size) * mesh.size
    feature_fn = sharding.put_replicated(mesh, network.feature_fn)
    waiting = None
    for begin in range(0, count, size):
        index = np.arange(begin, begin + size)
        images, labels = source[np.minimum(index, count - 1)]
        images = sharding.split_batch(mesh, images)
        if waiting is not None:
            yield _to_host(*waiting)
        waiting = _compute(feature_fn, images), labels, min(size, count - begin)
    yield _to_host(*waiting)


@jax.jit
def _compute(feature_fn: Partial, images: jax.Array) -> Output:
    return feature_fn(images)


def _to_host(output: Output, labels: np.ndarray | None, size: int) -> tuple[Output, np.ndarray | None]:
    on_host = Output(*(np.asarray(sharding.to_host(leaf)[:size], np.float32) for leaf in output))
    return on_host, None if labels is None else labels[:size]


def measure(names: Iterable[str], samples: Judged, reference: Judged) -> dict[str, Any]:
    """The numbers of the metrics that names lists. ValueError where the reference does not have what one needs, or for
    fewer images than it takes.
    """
    check(names, reference)
    return {name: value for one in names for name, value in metric(one).compute(samples, reference).items()}


def metric(name: str) -> Metric:
    """The metric called name in METRICS, or what the function of the user's that "package.module:function" names
    returns. ValueError if it is no Metric of known fields.
    """
    found = resolve(METRICS, name)
    found = found() if is_code(name) else found
    fields = Judged._fields[2:]
    if not isinstance(found, Metric) or not {*found.samples, *found.reference} <= {*fields}:
        raise ValueError(f"{name} must return a Metric that reads {', '.join(fields)}, got {files.shown(found)}")
    return found


def check(names: Iterable[str], reference: Judged) -> None:
    """ValueError where a metric needs more of the real images than what is there."""
    for name in names:
        if any(getattr(reference, field) is None for field in metric(name).reference):
            raise ValueError(f"{name} needs the features of the real images, and the reference is mu and sigma alone")


def kept_of_samples(names: Iterable[str]) -> set[str]:
    """What `judge` must keep of the samples for these metrics."""
    return {field for name in names for field in metric(name).samples}


def kept_of_reference(names: Iterable[str]) -> set[str]:
    """And of the real images."""
    return {field for name in names for field in metric(name).reference}


def _fid(samples: Judged, reference: Judged) -> dict[str, float]:
    return {"fid": frechet.distance(*(_with_factor(judged) for judged in (samples, reference)))}


def _with_factor(judged: Judged) -> Moments:
    """Its moments, with their factor where the features are there to take it from."""
    moments, features = judged.moments, judged.features
    if moments.factor is None and features is not None and len(features) <= features.shape[1]:
        moments = moments._replace(factor=frechet.moments(features).factor)
    return moments


def _kid(samples: Judged, reference: Judged) -> dict[str, float]:
    size = min(1000, samples.count, reference.count)
    found = metrics.kid(samples.features, reference.features, subset_size=size)
    return {"kid": found.mean, "kid_std": found.std, "kid_subset_size": size}


def _inception_score(samples: Judged, reference: Judged) -> dict[str, float]:
    splits = min(10, samples.count)
    found = metrics.inception_score(samples.logits, splits)
    return {"inception_score": found.mean, "inception_score_std": found.std, "inception_score_splits": splits}


def _precision_recall(samples: Judged, reference: Judged) -> dict[str, float]:
    return metrics.precision_recall(samples.features, reference.features)._asdict()


def _confidence(samples: Judged, reference: Judged) -> dict[str, float]:
    return metrics.confidence(samples.logits)._asdict()


def _agreement(samples: Judged, reference: Judged) -> dict[str, float]:
    check_labels(samples.labels, samples.logits.shape[1])
    return {"agreement": float((samples.logits.argmax(axis=1) == samples.labels).mean())}


def _nearest(samples: Judged, reference: Judged) -> dict[str, float]:
    return {"nearest": metrics.nearest(samples.features, reference.features)}


METRICS = {
    "fid": Metric((), (), _fid),
    "kid": Metric(("features",), ("features",), _kid),
    "inception_score": Metric(("logits",), (), _inception_score),
    "precision_recall": Metric(("features",), ("features",), _precision_recall),
    "confidence": Metric(("logits",), (), _confidence),
    "agreement": Metric(("logits", "labels"), (), _agreement),
    "nearest": Metric(("features",), ("features",), _nearest),
}
