"""The interface of a feature network: a function from pixels to image features, and the metadata of its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from ddim_jax.checkpoints.tensors import digest
from ddim_jax.schedule import Array


class Output(NamedTuple):
    features: Array  # (B, D): image features, the input of distances
    logits: Array  # (B, K): class logits


class FeatureNetwork(NamedTuple):
    """An image classifier with its parameters, which extracts features.

    name, weights and resize are saved with all reference statistics. Features are compared only if these are equal.
    """

    name: str
    weights: str  # SHA-256 of the parameters
    resize: str  # how it resizes its input images, as text
    feature_fn: Partial  # pure: images (B, H, W, C), uint8, -> Output; a Partial that holds the parameters


def feature_network(name: str, feature_fn: Any, params: Any, resize: str = "none") -> FeatureNetwork:
    """Makes a FeatureNetwork from a pure function (params, images) -> Output."""
    return FeatureNetwork(name, digest(params), resize, Partial(feature_fn, params))


def on_one_device(shapes: Any) -> Any:
    """The same ShapeDtypeStructs, with the sharding of a single device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
