"""A judge for the digits: a small convolutional classifier, fitted on real images only, whose features measure
distance.

Inception features mean nothing for 8x8 strokes. The classifier ships with the package, so that distances compare from
one machine to the next; `python -m experiments.fit_digits_classifier` makes it again.
"""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddim_jax.checkpoint import CheckpointError
from ddim_jax.data import Plan, Source, batches
from ddim_jax.data.scaling import to_unit
from ddim_jax.evaluation.feature_network import FeatureNetwork, Output, feature_network, on_one_device
from ddim_jax.pretrained import tensors

SHIPPED = pathlib.Path(__file__).with_name("digits_classifier.safetensors")
CLASSES = 10


class Classifier(nn.Module):
    """(B, 8, 8, 1) in [-1, 1] -> Output: 64 features, of the layer before the classes, and 10 logits."""

    @nn.compact
    def __call__(self, x, train=False) -> Output:
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        features = nn.relu(nn.Dense(64)(x))
        return Output(features, nn.Dense(CLASSES)(features))


def open_network(path: str = "") -> FeatureNetwork:
    """The classifier that ships with the package, or the one in a file that `fit` gave. CheckpointError if it is
    missing or damaged.
    """
    file = pathlib.Path(path or SHIPPED)
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}: the digits classifier as .safetensors is wanted")
    like = on_one_device(jax.eval_shape(_init, jax.random.key(0)))
    params = tensors.read(tensors.open_safetensors(file)[0], like, "the digits classifier")
    return feature_network("digits-classifier", apply, params)


def apply(params: Any, images: jax.Array) -> Output:
    """Features and logits of uint8 images (B, 8, 8, 1)."""
    if images.shape[1:] != (8, 8, 1):
        raise ValueError(f"the digits classifier takes images of 8x8x1, got {'x'.join(map(str, images.shape[1:]))}")
    return Classifier().apply({"params": params}, to_unit(images))


def fit(source: Source, steps: int = 1500, batch_size: int = 128, seed: int = 0) -> Any:
    """The parameters, fitted on a labelled source of digits. About 10 s on two CPU cores."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-4)

    @jax.jit
    def update(params: Any, state: Any, images, labels, key):
        def loss(params):
            logits = Classifier().apply({"params": params}, to_unit(images), train=True, rngs={"dropout": key}).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        steps_, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, steps_), state

    params = _init(jax.random.key(seed))
    state = optimizer.init(params)
    for step, batch in zip(range(steps), batches(Plan(source, batch_size, seed)), strict=False):
        params, state = update(
            params, state, batch.images, batch.labels, jax.random.fold_in(jax.random.key(seed), step)
        )
        if step % 8 == 0:
            jax.block_until_ready(state)
    return params


def _init(key: jax.Array) -> Any:
    return Classifier().init(key, jnp.zeros((1, 8, 8, 1)))["params"]
