"""Sampling and loading from Python, without a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax import checks, pretrained, registry, samplers, schedule, sharding, train_state, trajectory, weights
from ddim_jax import config as config_lib
from ddim_jax.errors import CheckpointError
from ddim_jax.gaussian import Model
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.samplers import Sampler
from ddim_jax.schedule import Schedule


class Loaded(NamedTuple):
    """A trained network, ready to sample. Nothing of it is clipped: see `gaussian.clip_x0`."""

    denoiser: Denoiser
    schedule: Schedule
    shape: tuple[int, ...]  # of one image, (H, W, C)
    num_classes: int  # 0 for a network without labels; see `Denoiser.with_labels`
    clips: bool  # whether its authors clip the predicted x_0
    source: str  # where it is from, for people


def load(where: str, *, ema: bool = True, code: Sequence[str] = ()) -> Loaded:
    """The network of a workdir, a .safetensors file, a diffusers folder or hub id, a checkpoint of the official code,
    or the name of weights that ship ("digits").

    ema: the moving average of the parameters, or the raw ones. code: names "package.module:attribute" of the
    checkpoint's author that may be imported, a network or a schedule: a file alone imports nothing. CheckpointError
    where it cannot be used.
    """
    shipped = pretrained.shipped(where) if where in pretrained.shipped_names() else None
    published = weights.describe(str(shipped or where))
    needed = {field: name for field, name in config_lib.code_of(published).items() if field != "sample.tau"}
    if missing := [name for name in needed.values() if name not in code]:
        raise CheckpointError(f"{where} needs {missing[0]}, which is code of its author; code={missing} runs it")
    made = config_lib.network(published.model)
    noise_schedule = config_lib.noise_schedule(published.schedule)
    placed = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), train_state.param_shapes(made)
    )
    params, prediction = published.read(like, ema), published.model.prediction
    denoiser = Denoiser(made, params, prediction, lowest=jax.tree.map(jnp.asarray, noise_schedule.level(1)))
    clips = bool(published.sample.get("clip_x0"))
    return Loaded(denoiser, noise_schedule, made.shape, made.num_classes, clips, published.source)


def sample(
    model: Model,
    noise_schedule: Schedule,
    shape: tuple[int, ...],
    count: int,
    *,
    sampler: Sampler | None = None,
    tau: str | np.ndarray = "uniform",
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    labels: np.ndarray | None = None,
) -> np.ndarray:
    """Draws x_0 (count, *shape), float32 on the host; image i depends on (seed, i) alone.

    model: a denoiser or an eps_fn. sampler: default `samplers.ddim()`. tau: a name in registry.NAMED_TAUS, of `steps`
    steps, or the levels themselves, see `trajectory.explicit`. labels: (count,) ints, for a `Denoiser` of a network
    with classes; they are padded to whole batches. ValueError for what these cannot be.
    """
    checks.integer("count", count, 1)
    checks.integer("batch_size", batch_size, 1)
    sampler = samplers.ddim() if sampler is None else sampler
    transitions = trajectory.descend(noise_schedule, tau_of(noise_schedule, tau, steps))
    size, drawn = min(batch_size, count), []
    for begin in range(0, count, size):
        index = np.minimum(np.arange(begin, begin + size), count - 1)
        keys = samplers.image_keys(jax.random.key(seed), jnp.asarray(index))
        x_T = samplers.initial_noise(keys, tuple(shape))
        conditioned = model if labels is None else model.with_labels(np.asarray(labels)[index])
        x_0 = samplers.integrate(sampler, conditioned, transitions, x_T, keys if sampler.stochastic else None)
        drawn.append(sharding.to_host(x_0)[: count - begin])
    return np.concatenate(drawn)


def tau_of(noise_schedule: Schedule, tau: str | np.ndarray, steps: int) -> np.ndarray:
    """The levels that a name and a number of steps, or a list of levels, mean."""
    T = schedule.check(noise_schedule).num_steps
    if not isinstance(tau, str):
        return trajectory.explicit(T, tau)
    make = registry.resolve(registry.NAMED_TAUS, tau)
    return make(T if tau in registry.TAUS else noise_schedule, steps)
