"""The feature network for the digits: a small convolutional classifier. Inception features are not meaningful for
images of 8x8 pixels.

Its parameters ship with the package, so that distances are comparable between machines. They were fitted by `python -m
experiments.fit_classifier --data digits`.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax

from ddim_jax.data.scaling import to_unit
from ddim_jax.evaluation import classifier
from ddim_jax.evaluation.feature_network import FeatureNetwork, Output, feature_network

SHIPPED = pathlib.Path(__file__).with_name("digits_classifier.safetensors")
SHAPE = (8, 8, 1)
STEPS = 1500  # about 10 s on two CPU cores


class Classifier(nn.Module):
    """(B, 8, 8, 1) in [-1, 1] -> Output: the 64 activations of the last hidden layer, and 10 logits."""

    @nn.compact
    def __call__(self, x, train=False) -> Output:
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        features = nn.relu(nn.Dense(64)(x))
        return Output(features, nn.Dense(10)(features))


def open_network(path: str = "") -> FeatureNetwork:
    """The digits classifier. path: the file of its parameters, "" for those that ship with the package. CheckpointError
    if the file is missing or damaged.
    """
    params = classifier.read(pathlib.Path(path or SHIPPED), Classifier(), SHAPE, "the digits classifier")
    return feature_network("digits-classifier", apply, params)


def apply(params: Any, images: jax.Array) -> Output:
    """Features and logits of uint8 images (B, 8, 8, 1)."""
    if images.shape[1:] != SHAPE:
        raise ValueError(f"the digits classifier takes images of 8x8x1, got {'x'.join(map(str, images.shape[1:]))}")
    return Classifier().apply({"params": params}, to_unit(images))
