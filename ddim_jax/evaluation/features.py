"""Image features: what the metrics read, extracted in one pass through a feature network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from tqdm import tqdm

from ddim_jax.data import Source
from ddim_jax.evaluation import digits_classifier, frechet, inception
from ddim_jax.evaluation.feature_network import FeatureNetwork, Output
from ddim_jax.evaluation.frechet import Moments
from ddim_jax.registry import resolve
from ddim_jax.utils import files, sharding

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


class ImageFeatures(NamedTuple):
    """Of a set of images: all that the metrics read."""

    count: int
    moments: Moments  # of the features
    features: np.ndarray | None = None  # (N, D) float32, where a metric needs them
    logits: np.ndarray | None = None  # (N, K) float32, likewise
    labels: np.ndarray | None = None  # (N,) ints, the classes that the images were drawn as, likewise


def extract(
    network: FeatureNetwork,
    source: Source,
    mesh: Mesh,
    batch_size: int,
    keep: Iterable[str] = (),
    count: int | None = None,
    doing: str = "features",
) -> ImageFeatures:
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
    return ImageFeatures(count, frechet.moments(total), **arrays)


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
