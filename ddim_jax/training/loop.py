"""Training from Python, without a config."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from tqdm import tqdm

from ddim_jax import checks, data, sharding, train_state
from ddim_jax.checkpoint import Checkpoints
from ddim_jax.errors import CheckpointError
from ddim_jax.models.network import Network, as_network
from ddim_jax.training import train_step
from ddim_jax.training.objectives import Objective

KEEP = 3  # latest checkpoints


class Fitted(NamedTuple):
    params: Any
    ema_params: Any  # their moving average: what is sampled
    losses: np.ndarray  # (num_steps - the step that it began at,)


class Points:
    """Training data of any shape: x (N, ...), floating point or uint8, with labels (N,) or None. A `data.Source`."""

    crop, jpegs, instant = "none", 0, True

    def __init__(self, x: np.ndarray, labels: np.ndarray | None = None):
        self.images, self.labels = np.asarray(x), None if labels is None else np.asarray(labels, np.int32)
        if not self.images.ndim or not len(self.images):
            raise ValueError(f"x must be (N, ...), N at least 1, got shape {self.images.shape}")
        if labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must have the shape {self.images.shape[:1]}, got {self.labels.shape}")
        self.image_shape = self.images.shape[1:]
        self.num_classes = 0 if labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> data.Batch:
        return data.Batch(self.images[indices], None if self.labels is None else self.labels[indices])


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
    """Trains a network until num_steps updates are done, over all devices.

    network: a `Network`, or a Linen module. objective: see `objectives.noise_prediction` and `objectives.make`.
    optimizer: any of optax. source: a `data.Source`, or an array (N, ...) of any shape, whose uint8 values are taken as
    pixels and whose floats as x_0. workdir: checkpoints are written there every checkpoint_every updates and at the
    end, and the same call continues from the last one, to the same parameters as without a break. ema_decay: a number,
    or a function of the step. mesh: of devices; default: all. The batch of step k depends on (seed, k) alone.

    ValueError where the shapes do not fit; CheckpointError for a workdir of another network, data or seed.
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
        raise ValueError(f"batch_size must divide over {mesh.size} devices and {accumulate} parts, got {batch_size}")
    init_key, step_key = jax.random.split(jax.random.key(seed))
    init = lambda key: train_state.init(network, optimizer, key, objective.init())
    placement = sharding.fully_sharded(mesh, jax.eval_shape(init, init_key))
    state = jax.jit(init, out_shardings=placement)(init_key)
    update = jax.jit(
        train_step.build(objective, optimizer, ema_decay=ema_decay, accumulate=accumulate),
        donate_argnums=0,
        out_shardings=(placement, sharding.replicated(mesh)),
    )
    record = {"fit": {"seed": seed, "batch_size": batch_size}}
    plan = data.Plan(source, batch_size, seed, shard=jax.process_index(), num_shards=jax.process_count())
    if workdir is None:
        return _loop(state, update, plan, step_key, 0, num_steps, mesh, lambda step, state: None, network, progress)
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    with Checkpoints(pathlib.Path(workdir), KEEP, 0) as checkpoints:
        fingerprint, begin = data.fingerprint(source), checkpoints.latest() or 0
        if begin:
            checkpoints.check_network(begin, state.params)
            if checkpoints.config(begin) != record or checkpoints.data(begin) != fingerprint:
                raise CheckpointError(f"{workdir} was trained with another seed, batch_size or source")
            state = checkpoints.restore(begin, jax.tree.map(_placed, state))

        def save(step, state):
            if step % checkpoint_every == 0 or step == num_steps:
                checkpoints.save(state, record, fingerprint)

        fitted = _loop(state, update, plan, step_key, begin, num_steps, mesh, save, network, progress)
        checkpoints.wait()
    return fitted


def _loop(state, update, plan, key, begin, num_steps, mesh, save, network, progress) -> Fitted:
    losses, in_flight = [], collections.deque()
    stream = data.batches(plan, begin)
    for step in tqdm(range(begin + 1, num_steps + 1), "training", disable=not progress):
        batch = next(stream)
        batch = sharding.put_batch(mesh, batch if network.num_classes else batch._replace(labels=None))
        state, metrics = update(state, batch.images, batch.labels, key)
        in_flight.append(metrics)
        while len(in_flight) > (0 if step == num_steps else sharding.steps_in_flight()):
            losses.append(float(in_flight.popleft().loss))
        save(step, state)
    return Fitted(state.params, state.ema_params, np.array(losses))


def _placed(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
