"""Extraction of image features, the input of the metrics, in one pass through a feature network."""

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

FEATURES = {  # (path of the weights, "" for the default) -> FeatureNetwork
    "inception": inception.open_network,
    "digits": digits_classifier.open_network,
}


def open_features(name: str, weights: str = "") -> FeatureNetwork:
    """Opens a feature network.

    name: a name in FEATURES, or "package.module:function" for a function (path of the weights) -> FeatureNetwork.
    weights: the path of its weights, "" for the default. ValueError if there is no such function, CheckpointError if
    the weights cannot be read.
    """
    network = resolve(FEATURES, name)(weights)
    if not isinstance(network, FeatureNetwork):
        raise ValueError(f"{files.shown(name)} must return a FeatureNetwork, got {type(network).__name__}")
    return network


def num_features(network: FeatureNetwork, image_shape: tuple[int, int, int]) -> int:
    """The number of features D of a network. ValueError if it does not take images of this shape (H, W, C)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), np.uint8)
    return jax.eval_shape(network.feature_fn, images).features.shape[-1]


class ImageFeatures(NamedTuple):
    """The features of a set of images. The arrays are None unless a metric needs them."""

    count: int
    moments: Moments  # of the features
    features: np.ndarray | None = None  # (N, D) float32
    logits: np.ndarray | None = None  # (N, K) float32
    labels: np.ndarray | None = None  # (N,) ints, the class labels of the images


def extract(
    network: FeatureNetwork,
    source: Source,
    mesh: Mesh,
    batch_size: int,
    keep: Iterable[str] = (),
    count: int | None = None,
    doing: str = "features",
) -> ImageFeatures:
    """Extracts the features of the first `count` images of a source (default: all), in batches over the mesh.

    The moments are accumulated in float64. keep: the arrays to return with them: "features", "logits", "labels". doing:
    the text of the progress bar. ValueError, naming the image, if a feature is not finite, and if "labels" are kept of
    images without labels.
    """
    count = len(source) if count is None else count
    kept, total, done = {name: [] for name in keep}, None, 0
    with tqdm(total=count, desc=doing, unit="image") as bar:
        for output, labels in outputs(network, source, mesh, batch_size, count):
            if "labels" in kept:
                if labels is None:
                    raise ValueError("the images have no classes (arr_1 of the .npz): agreement needs class labels")
                kept["labels"].append(labels)
            for name, array in output._asdict().items():
                bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
                if len(bad):
                    raise ValueError(f"the {name} of image {done + bad[0]} are not finite ({network.name})")
                if name in kept:
                    kept[name].append(array)
            if not done:
                per_image = sum(array.nbytes // len(array) for name, array in output._asdict().items() if name in kept)
                files.check_memory(count * per_image, f"{' and '.join(kept)} of {count} images")
            scatter = frechet.scatter(output.features)
            total = scatter if total is None else frechet.merged(total, scatter)
            done += len(output.features)
            bar.update(len(output.features))
    arrays = {name: np.concatenate(batches) for name, batches in kept.items()}
    return ImageFeatures(count, frechet.moments(total), **arrays)


def outputs(
    network: FeatureNetwork, source: Source, mesh: Mesh, batch_size: int, count: int
) -> Iterator[tuple[Output, np.ndarray | None]]:
    """Yields (Output on the host, labels or None) of each batch of the first `count` images of a source. The next batch
    is read while a batch is computed.
    """
    size = -(-min(batch_size, count) // mesh.size) * mesh.size
    feature_fn = sharding.put_replicated(mesh, network.feature_fn)
    pending = None
    for begin in range(0, count, size):
        index = np.arange(begin, begin + size)
        images, labels = source[np.minimum(index, count - 1)]
        images = sharding.split_batch(mesh, images)
        if pending is not None:
            yield _to_host(*pending)
        pending = _compute(feature_fn, images), labels, min(size, count - begin)
    yield _to_host(*pending)


@jax.jit
def _compute(feature_fn: Partial, images: jax.Array) -> Output:
    return feature_fn(images)


def _to_host(output: Output, labels: np.ndarray | None, size: int) -> tuple[Output, np.ndarray | None]:
    on_host = Output(*(np.asarray(sharding.to_host(leaf)[:size], np.float32) for leaf in output))
    return on_host, None if labels is None else labels[:size]
