"""`fit`: training from Python, without a config."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from tqdm import tqdm

from ddim_jax import checks, data
from ddim_jax.models.network import Network, as_network
from ddim_jax.training import loop, train_step
from ddim_jax.training.objectives import Objective
from ddim_jax.training.recipe import Recipe
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import CheckpointError


class Fitted(NamedTuple):
    """The result of `fit`."""

    params: Any
    ema_params: Any  # exponential moving average of params; samples are drawn with it
    losses: np.ndarray  # the loss of each update of this call: (num_steps - first step,)


class Points:
    """A `data.Source` of examples of any shape.

    x: (N, ...), floating point or uint8. labels: (N,) ints, or None. ValueError for an empty x, and for labels of
    another shape.
    """

    crop, jpegs, instant = "none", 0, True

    def __init__(self, x: np.ndarray, labels: np.ndarray | None = None):
        self.images, self.labels = np.asarray(x), None if labels is None else np.asarray(labels, np.int32)
        if not self.images.ndim or not len(self.images):
            raise ValueError(f"x must have the shape (N, ...), N at least 1, got {self.images.shape}")
        if labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must have the shape {self.images.shape[:1]}, got {self.labels.shape}")
        self.image_shape = self.images.shape[1:]
        self.num_classes = 0 if labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> data.Batch:
        return data.Batch(self.images[indices], None if self.labels is None else self.labels[indices])


class _Losses:
    """Writers that show a progress bar and collect the loss of every update."""

    flops = 0.0

    def __init__(self, begin: int, num_steps: int, progress: bool):
        self._metrics: list[jax.Array] = []
        self._bar = tqdm(total=num_steps, initial=begin, desc="training", disable=not progress)

    def add_update(self, step: int, metrics: train_step.Metrics) -> None:
        self._metrics.append(metrics.loss)
        self._bar.update()

    def pending(self) -> list[Any]:
        return []

    def __enter__(self) -> _Losses:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def all(self) -> np.ndarray:
        return np.array(jax.device_get(self._metrics))


def fit(
    network: Network | nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    source: data.Source | np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    workdir: str | pathlib.Path | None = None,
    seed: int = 0,
    ema_decay: float | Callable = 0.9999,
    accumulate: int = 1,
    checkpoint_every: int = 1000,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Fitted:
    """Trains a network for num_steps updates, data-parallel over all devices.

    network: a `Network`, or a Linen module.
    objective: see `objectives.noise_prediction` and `objectives.make`.
    optimizer: any optax optimizer.
    source: a `data.Source`, or an array (N, ...) of any shape; uint8 values are pixels, floats are x_0.
    num_steps: the number of updates in total.
    batch_size: the number of examples per update, over all devices.
    workdir: the folder to which a checkpoint is written every checkpoint_every updates and at the end. The same call
        resumes from the last checkpoint; the parameters are then equal to those of an uninterrupted run. None: no
        checkpoints.
    seed: of the parameters, the data order and the noise. The batch of step k depends only on (seed, k).
    ema_decay: a number in [0, 1), or a function of the step.
    accumulate: the number of gradient accumulation steps per update.
    mesh: the devices; None for all of them.
    progress: whether to show a progress bar.

    ValueError for inconsistent shapes; ConfigError if the loss is not finite in too many consecutive updates, or if the
    checkpoints do not fit on the disk; CheckpointError if the workdir belongs to another network, data set or seed.
    """
    checks.integer("num_steps", num_steps, 1)
    checks.integer("batch_size", batch_size, 1)
    checks.integer("checkpoint_every", checkpoint_every, 1)
    source = source if hasattr(source, "image_shape") else Points(source)
    network = as_network(network, tuple(source.image_shape))
    if tuple(network.shape) != tuple(source.image_shape):
        raise ValueError(f"source must hold examples of the shape {network.shape}, got {tuple(source.image_shape)}")
    mesh = sharding.data_mesh() if mesh is None else mesh
    if batch_size % (mesh.size * accumulate):
        raise ValueError(
            f"batch_size must be a multiple of {mesh.size} devices x {accumulate} accumulation steps, got {batch_size}"
        )
    recipe = Recipe(
        network,
        objective,
        optimizer,
        num_steps,
        batch_size,
        seed,
        ema_decay,
        accumulate,
        checkpoint_every=checkpoint_every,
    )
    record = {"fit": {"seed": seed, "batch_size": batch_size}}

    def check_saved(saved: Any) -> None:
        if saved != record:
            raise CheckpointError(f"{workdir} was trained with another seed or batch_size")

    opened = []

    def open_writers(begin: int, pending: list[Any]) -> _Losses:
        opened.append(_Losses(begin, num_steps, progress))
        return opened[0]

    if workdir is not None:
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
    state = loop.run(recipe, source, mesh, open_writers, workdir, record=record, check_saved=check_saved)
    return Fitted(state.params, state.ema_params, opened[0].all())
