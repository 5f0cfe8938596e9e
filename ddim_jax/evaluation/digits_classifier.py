"""A judge for the digits: a small convolutional classifier, fitted on real images only, whose features
measure distance.

Inception features mean nothing for 8x8 strokes. This classifier is fitted in seconds wherever it is needed,
from a fixed seed, and never sees a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddim_jax.data import Source, batches
from ddim_jax.data.scaling import to_unit


class Judgement(NamedTuple):
    features: np.ndarray  # (N, 64) float32, the layer before the classes
    probabilities: np.ndarray  # (N, 10) float32


class _Classifier(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(x.shape[0], -1))
        features = nn.relu(nn.Dense(64)(x))
        return features, nn.Dense(self.num_classes)(features)


def fit(source: Source, steps: int = 1500, batch_size: int = 128, seed: int = 0) -> Callable[[np.ndarray], Judgement]:
    """A function from uint8 images (N, 8, 8, 1) to their Judgement, fitted on a labelled source. About 10 s on
    two CPU cores.
    """
    model = _Classifier(source.num_classes)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-4)
    variables = model.init(jax.random.key(seed), jnp.zeros((1, *source.image_shape)))

    @jax.jit
    def update(variables: Any, state: Any, images, labels, key):
        def loss(variables):
            _, logits = model.apply(variables, to_unit(images), train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        steps_, state = optimizer.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, steps_), state

    state = optimizer.init(variables)
    for step, batch in zip(range(steps), batches(source, batch_size, seed), strict=False):
        variables, state = update(
            variables, state, batch.images, batch.labels, jax.random.fold_in(jax.random.key(seed), step)
        )
        if step % 8 == 0:
            jax.block_until_ready(state)

    @jax.jit
    def judge(variables, images):
        features, logits = model.apply(variables, to_unit(images))
        return features, jax.nn.softmax(logits)

    def judge_all(images: np.ndarray) -> Judgement:
        parts = [judge(variables, jnp.asarray(images[i : i + 500])) for i in range(0, len(images), 500)]
        return Judgement(*(np.concatenate(leaf) for leaf in zip(*parts, strict=True)))

    return judge_all
