"""Images by index: drawn, encoded, decoded, and bounded in likelihood, in batches over the devices.

Image i depends on (seed, i) alone, not on the size of a batch, the number of devices or a restart.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddim_jax import checks, guidance, inversion, losses, registry, samplers, schedule, trajectory
from ddim_jax.data import Source, check_labels
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.gaussian import Denoise, Model
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.samplers import Sampler, SamplingProcess
from ddim_jax.schedule import Schedule
from ddim_jax.utils import sharding
from ddim_jax.utils.errors import ConfigError

_image_keys = jax.jit(samplers.image_keys)
_initial_noise = jax.jit(samplers.initial_noise, static_argnums=1)


class Pipeline(NamedTuple):
    """A trained network and the process that samples it: made once, used for every batch."""

    denoiser: Denoiser  # without labels; its parameters replicated over the mesh
    process: SamplingProcess
    mesh: Mesh
    batch_size: int = 64  # images at a time, on all devices together
    seed: int = 0
    label: int = -1  # the class of all images; -1: all classes in turn
    guidance: float = 1.0  # the scale of classifier-free guidance; 1: none
    bound_x0: Callable[[Denoise], Denoise] | None = None  # such as `gaussian.clip_x0`; None: x_0 is not bounded

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of one image."""
        return self.denoiser.network.shape

    @property
    def num_classes(self) -> int:
        """0 for a network without classes."""
        return self.denoiser.network.num_classes


def conditioned(pipeline: Pipeline, labels: jax.Array | None = None) -> Denoise:
    """The denoiser for these classes, (B,) ints, with guidance and bounds. None: for a network without classes."""
    model = pipeline.denoiser.with_labels(labels)
    if pipeline.guidance != 1:
        unconditional = pipeline.denoiser.with_labels(jnp.full_like(labels, pipeline.num_classes))
        model = guidance.guided(model, unconditional, pipeline.guidance)
    return model if pipeline.bound_x0 is None else pipeline.bound_x0(model)


def labels_of(pipeline: Pipeline, index: np.ndarray) -> np.ndarray | None:
    """The classes of images index (B,), int32; None for a network without classes."""
    classes, label = pipeline.num_classes, pipeline.label
    if not classes:
        return None
    return (index % classes if label < 0 else np.full_like(index, label)).astype(np.int32)


def start(pipeline: Pipeline, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys (B,) and x_T (B, H, W, C) of images index (B,); both depend on (seed, index) alone."""
    keys = _image_keys(jax.random.key(pipeline.seed), index)
    return keys, _initial_noise(keys, tuple(pipeline.shape))


def batch_indices(batch_size: int, mesh: Mesh, first: int, total: int) -> Iterator[np.ndarray]:
    """The indices first .. total - 1 in batches of one size, a multiple of the devices, so that one program serves
    all. The last may go beyond total - 1: what is made of that is to be dropped.
    """
    size = -(-min(batch_size, total) // mesh.size) * mesh.size
    for begin in range(first, total, size):
        yield np.arange(begin, begin + size)


def batches(pipeline: Pipeline, count: int, first: int = 0) -> Iterator[np.ndarray]:
    """Images first .. count - 1 in batches of uint8 (b, H, W, C) on the host. An accelerator is given the next batch
    before the host waits for this one. ConfigError, naming the first, for an image that is not finite, or so far from
    [-1, 1] that it shows nothing.
    """
    process = pipeline.process

    def dispatched() -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
        for index in batch_indices(pipeline.batch_size, pipeline.mesh, first, count):
            labels = _split(pipeline, labels_of(pipeline, index))
            keys, x = start(pipeline, sharding.split_batch(pipeline.mesh, index))
            x = samplers.integrate(
                process.sampler,
                conditioned(pipeline, labels),
                process.transitions,
                x,
                keys if process.sampler.stochastic else None,
            )
            yield index[0], _to_pixels(x, _largest(process))

    for begin, (drawn, right) in _delayed(dispatched(), sharding.batches_ahead()):
        _check_images("image", sharding.to_host(right)[: count - begin], begin, pipeline)
        yield sharding.to_host(drawn)[: count - begin]


def computed_with(pipeline: Pipeline, total: int) -> dict[str, Any]:
    """What decides how floats are rounded, and so the last bits of images: recorded, and not compared."""
    mesh = pipeline.mesh
    batch = next(batch_indices(pipeline.batch_size, mesh, 0, total))
    device = mesh.devices.flat[0]
    return {"batch_size": len(batch), "devices": mesh.size, "device": device.device_kind, "jax": jax.__version__}


def draw(pipeline: Pipeline, count: int) -> np.ndarray:
    """Images 0 .. count - 1, uint8 (count, H, W, C); see `batches`."""
    return np.concatenate(list(batches(pipeline, count)))


def _largest(process: SamplingProcess) -> np.float32:
    """What no value of an image or a latent exceeds: a million times what becomes of noise by a network that predicts
    nothing.
    """
    return np.float32(1e6 / np.sqrt(np.min(process.transitions.alpha_bar_t)))


@jax.jit
def _to_pixels(x: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 (B, H, W, C), and which of the images are finite and not absurd, (B,)."""
    return to_uint8(x), _within(x, largest)


def _within(x, largest):
    """(B,): whether all values of an image are finite and not absurd. NaN is not below anything."""
    return (abs(x) <= largest).reshape(len(x), -1).all(axis=1)


def _check_images(name: str, right: np.ndarray, first: int, pipeline: Pipeline) -> None:
    """ConfigError where one of the images first, first + 1, ... is not right."""
    if right.all():
        return
    broken = not _all_finite(pipeline.denoiser.params)
    look = "so are the parameters of the network" if broken else "look at config.sample: eta, guidance, tau, sampler"
    raise ConfigError(f"{name} {first + np.flatnonzero(~right)[0]} is not finite, or beyond any image: {look}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def encode(
    pipeline: Pipeline, x_0: np.ndarray, labels: np.ndarray | None, first: int = 0, refine: int = 0
) -> np.ndarray:
    """The latents x_T (B, H, W, C), float32 on the host, of images x_0 (B, H, W, C) in [-1, 1]: Eq. (13) up the levels
    of the process's tau. B: a multiple of the devices. labels: (B,) ints for a network with classes. refine: how often
    each step is iterated towards exact DDIM inversion, see `inversion.invert`; 0 for Eq. (13) as it is. ConfigError
    where a latent is not finite; first: the index of the first image.
    """
    process, model = pipeline.process, conditioned(pipeline, _split(pipeline, labels))
    x_0 = sharding.split_batch(pipeline.mesh, x_0)
    if refine:
        x_T = inversion.invert(model, process.schedule, process.tau, x_0, refine, process.end, process.stride).x_T
    else:
        x_T = samplers.invert(model, process.schedule, process.tau, x_0, end=process.end, stride=process.stride)
    return _checked_on_host("the latent of image", x_T, pipeline, first)


def decode(pipeline: Pipeline, x_T: np.ndarray, labels: np.ndarray | None, first: int = 0) -> np.ndarray:
    """What the process makes of latents x_T (B, H, W, C): images in [-1, 1] and a little beyond, float32 on the host.
    The process must be deterministic. labels, first: as of `encode`. ConfigError where an image is not finite.
    """
    process, model = pipeline.process, conditioned(pipeline, _split(pipeline, labels))
    x_0 = samplers.integrate(process.sampler, model, process.transitions, sharding.split_batch(pipeline.mesh, x_T))
    return _checked_on_host("image", x_0, pipeline, first)


def _checked_on_host(name: str, x: jax.Array, pipeline: Pipeline, first: int) -> np.ndarray:
    x = sharding.to_host(x)
    _check_images(name, _within(x, _largest(pipeline.process)), first, pipeline)
    return x


def likelihood_bound(
    pipeline: Pipeline, images: np.ndarray, index: np.ndarray, labels: np.ndarray | None, eta: float
) -> np.ndarray:
    """J_sigma, Eq. (11), of pixels (B, H, W, C) uint8 in nats, (B,): an upper bound of the negative log-likelihood of
    images index (B,) under the process's tau and eta. The draws of image i depend on (seed, i) alone. ValueError for an
    eta of 0; ConfigError where a bound is not finite.
    """
    model = conditioned(pipeline, _split(pipeline, labels))
    keys = _image_keys(jax.random.key(pipeline.seed), sharding.split_batch(pipeline.mesh, index))
    x_0 = sharding.split_batch(pipeline.mesh, to_unit(images))
    nats = losses.j_sigma(model, pipeline.process.transitions, x_0, keys, eta, "pixels")
    nats = np.asarray(sharding.to_host(nats), np.float64)
    _check_images("the bound of image", np.isfinite(nats), int(index[0]), pipeline)
    return nats


def real_batch(
    pipeline: Pipeline, source: Source, index: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Real images index (B,) of the first `total` of a source, uint8 (B, H, W, C), and their classes for a network with
    classes: those of the data, where it has them, else `labels_of`. Beyond the end the last image again. ValueError for
    a class that the network does not have.
    """
    batch = source[np.minimum(index, total - 1)]
    if batch.labels is None or not pipeline.num_classes:
        return batch.images, labels_of(pipeline, index)
    check_labels(batch.labels, pipeline.num_classes, np.minimum(index, total - 1))
    return batch.images, batch.labels


def _split(pipeline: Pipeline, labels: np.ndarray | None) -> jax.Array | None:
    return None if labels is None else sharding.split_batch(pipeline.mesh, labels)


def _delayed(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The same items, each when so many more have been made."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


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
