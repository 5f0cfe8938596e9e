"""A feature network for CIFAR-10 that needs no downloaded weights: a residual classifier of 2.8 M parameters.

It is trained by

    python -m experiments.fit_classifier --data cifar10 --out cifar10_classifier.safetensors

and selected in a config by

    --config.evaluate.features=experiments.cifar10_classifier:open_network
    --config.evaluate.weights=cifar10_classifier.safetensors

Distances in its features are comparable with each other, but not with the FID of Inception.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax

from ddim_jax.data.scaling import to_unit
from ddim_jax.evaluation import classifier
from ddim_jax.evaluation.feature_network import FeatureNetwork, Output, feature_network

SHAPE = (32, 32, 3)
STEPS = 12_000  # 30 epochs


class Classifier(nn.Module):
    """(B, 32, 32, 3) in [-1, 1] -> Output: 256 features (the spatial mean of the last block) and 10 logits."""

    @nn.compact
    def __call__(self, x, train=False) -> Output:
        conv = lambda x, channels: nn.Conv(channels, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(8)(x)))
        x = nn.Conv(64, (3, 3))(x)
        for channels in (64, 128, 256):
            for _ in range(2):
                shortcut = x if x.shape[-1] == channels else nn.Conv(channels, (1, 1))(x)
                x = shortcut + conv(conv(x, channels), channels)
            if channels < 256:
                x = nn.avg_pool(x, (2, 2), (2, 2))
        features = nn.relu(nn.GroupNorm(8)(x)).mean((1, 2))
        return Output(features, nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(features)))


def open_network(path: str) -> FeatureNetwork:
    """The classifier with the weights of a file. CheckpointError if the file is missing or damaged."""
    params = classifier.read(pathlib.Path(path), Classifier(), SHAPE, "the CIFAR-10 classifier")
    return feature_network("cifar10-classifier", apply, params)


def apply(params: Any, images: jax.Array) -> Output:
    """Features and logits of uint8 images (B, 32, 32, 3)."""
    if images.shape[1:] != SHAPE:
        raise ValueError(
            f"the CIFAR-10 classifier: expected 32x32x3 images, got {'x'.join(map(str, images.shape[1:]))}"
        )
    return Classifier().apply({"params": params}, to_unit(images))
