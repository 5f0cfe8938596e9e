"""What a network must be to judge images: a function from pixels to features, and what is said of it beside every
number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.tree_util import Partial

from ddim_jax.checkpoints.tensors import digest
from ddim_jax.schedule import Array


class Output(NamedTuple):
    features: Array  # (B, D): what distances are measured between
    logits: Array  # (B, K): classes before the softmax


class FeatureNetwork(NamedTuple):
    """A classifier of images, ready to run.

    name, weights and resize are written into every file of statistics, and distances are computed between equal ones
    alone.
    """

    name: str
    weights: str  # SHA-256 of the parameters
    resize: str  # what it does to images first, in words
    feature_fn: Partial  # images (B, H, W, C), uint8, -> Output; pure. It holds the parameters


def feature_network(name: str, feature_fn: Any, params: Any, resize: str = "none") -> FeatureNetwork:
    """A FeatureNetwork of any pure function (params, images) -> Output."""
    return FeatureNetwork(name, digest(params), resize, Partial(feature_fn, params))


def on_one_device(shapes: Any) -> Any:
    """Shapes and dtypes with the placement of parameters that are about to be read."""
    placed = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), shapes)
