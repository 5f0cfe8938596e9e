"""Classifiers that are fitted on real images only: feature networks for data sets that are unlike ImageNet."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ddim_jax.checkpoints import tensors
from ddim_jax.data import Plan, Source, batches
from ddim_jax.data.scaling import to_unit
from ddim_jax.evaluation.feature_network import on_one_device
from ddim_jax.utils import files
from ddim_jax.utils.errors import CheckpointError

Shape = tuple[int, int, int]


def fit(model: nn.Module, source: Source, steps: int, batch_size: int = 128, seed: int = 0, flip: bool = False) -> Any:
    """Fits a module (x in [-1, 1], train) -> Output to a labelled source and returns its parameters. flip: whether to
    flip images horizontally with probability 1/2.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-4)

    @jax.jit
    def update(params: Any, state: Any, images, labels, key):
        def loss(params):
            logits = model.apply({"params": params}, to_unit(images), train=True, rngs={"dropout": key}).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    key = jax.random.key(seed)
    params = jax.jit(lambda key: _init(model, source.image_shape, key))(key)
    state = optimizer.init(params)
    stream = batches(Plan(source, batch_size, seed, flip))
    for step, batch in zip(tqdm(range(steps), "classifier", unit="step"), stream, strict=False):
        params, state = update(params, state, batch.images, batch.labels, jax.random.fold_in(key, step))
        if step % 8 == 0:
            jax.block_until_ready(state)
    return params


def accuracy(model: nn.Module, params: Any, source: Source, batch_size: int = 500) -> float:
    """The fraction of the images of a labelled source that are classified correctly."""
    predict = jax.jit(lambda params, images: model.apply({"params": params}, to_unit(images)).logits.argmax(-1))
    correct = 0
    for begin in range(0, len(source), batch_size):
        batch = source[np.arange(begin, min(begin + batch_size, len(source)))]
        correct += int((np.asarray(predict(params, batch.images)) == batch.labels).sum())
    return correct / len(source)


def write(file: pathlib.Path, params: Any) -> None:
    """Writes the parameters as .safetensors, with checksums."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    with files.replacing(file) as content:
        content.write(tensors.to_safetensors({name: np.asarray(leaf) for name, leaf in flat.items()}, {}))


def read(file: pathlib.Path, model: nn.Module, shape: Shape, name: str) -> Any:
    """Reads the parameters that `write` wrote. CheckpointError if the file is missing, damaged, or of another network.

    shape: (H, W, C) of the images. name: the name of the network, for messages.
    """
    if not file.is_file():
        raise CheckpointError(f"file {file} does not exist: expected {name} as .safetensors")
    like = on_one_device(jax.eval_shape(lambda key: _init(model, shape, key), jax.random.key(0)))
    return tensors.read(tensors.open_safetensors(file)[0], like, name)


def _init(model: nn.Module, shape: Shape, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, *shape)))["params"]
