"""Sampling, encoding, decoding and likelihood bounds of images, in batches over all devices.

Image i depends only on (seed, i): not on the batch size, the number of devices or a restart.
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
    """A trained network and its sampling process. It is built once and used for every batch."""

    denoiser: Denoiser  # without labels; its parameters are replicated over the mesh
    process: SamplingProcess
    mesh: Mesh
    batch_size: int = 64  # images per batch, over all devices
    seed: int = 0
    label: int = -1  # class of all images; -1: image i has class i mod num_classes
    guidance: float = 1.0  # scale of classifier-free guidance; 1: no guidance
    bound_x0: Callable[[Denoise], Denoise] | None = None  # for example `gaussian.clip_x0`; None: x_0 is not clipped

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of one image."""
        return self.denoiser.network.shape

    @property
    def num_classes(self) -> int:
        """0 for an unconditional network."""
        return self.denoiser.network.num_classes


def conditioned(pipeline: Pipeline, labels: jax.Array | None = None) -> Denoise:
    """The denoiser with labels, guidance and clipping. labels: (B,) ints; None for an unconditional network."""
    model = pipeline.denoiser.with_labels(labels)
    if pipeline.guidance != 1:
        unconditional = pipeline.denoiser.with_labels(jnp.full_like(labels, pipeline.num_classes))
        model = guidance.guided(model, unconditional, pipeline.guidance)
    return model if pipeline.bound_x0 is None else pipeline.bound_x0(model)


def labels_of(pipeline: Pipeline, index: np.ndarray) -> np.ndarray | None:
    """The classes of the images with indices (B,): (B,) int32; None for an unconditional network."""
    classes, label = pipeline.num_classes, pipeline.label
    if not classes:
        return None
    return (index % classes if label < 0 else np.full_like(index, label)).astype(np.int32)


def start(pipeline: Pipeline, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The PRNG keys (B,) and x_T (B, H, W, C) of the images with indices (B,). Both depend only on (seed, index)."""
    keys = _image_keys(jax.random.key(pipeline.seed), index)
    return keys, _initial_noise(keys, tuple(pipeline.shape))


def batch_indices(batch_size: int, mesh: Mesh, first: int, total: int) -> Iterator[np.ndarray]:
    """The indices first .. total - 1 in batches. All batches have the same size, a multiple of the number of devices,
    so that one compiled program is used for all of them. The last batch may continue beyond total - 1: the caller drops
    these images.
    """
    size = -(-min(batch_size, total) // mesh.size) * mesh.size
    for begin in range(first, total, size):
        yield np.arange(begin, begin + size)


def batches(pipeline: Pipeline, count: int, first: int = 0) -> Iterator[np.ndarray]:
    """The images with indices first .. count - 1, in batches of uint8 (b, H, W, C) on the host. On an accelerator the
    next batch is dispatched before the host waits for the current one. ConfigError with the index of the first image
    that is not finite, or whose values diverged, see `_largest`.
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

    for begin, (pixels, valid) in _delayed(dispatched(), sharding.batches_ahead()):
        _check_images("image", sharding.to_host(valid)[: count - begin], begin, pipeline)
        yield sharding.to_host(pixels)[: count - begin]


def computed_with(pipeline: Pipeline, total: int) -> dict[str, Any]:
    """The settings that change the rounding of floats, and thus the last bits of images: recorded, not compared."""
    mesh = pipeline.mesh
    batch = next(batch_indices(pipeline.batch_size, mesh, 0, total))
    device = mesh.devices.flat[0]
    return {"batch_size": len(batch), "devices": mesh.size, "device": device.device_kind, "jax": jax.__version__}


def draw(pipeline: Pipeline, count: int) -> np.ndarray:
    """The images with indices 0 .. count - 1, uint8 (count, H, W, C); see `batches`."""
    return np.concatenate(list(batches(pipeline, count)))


def trajectory_frames(pipeline: Pipeline, count: int) -> tuple[np.ndarray, np.ndarray]:
    """x_t and the predicted x_0 of the images with indices 0 .. count - 1 at every timestep of tau, from T to the last
    one: both uint8 (S + 1, count, H, W, C). The last predicted x_0 is the final image.
    """
    index, process = np.arange(count), pipeline.process
    keys, x = start(pipeline, sharding.put_replicated(pipeline.mesh, index))
    labels = sharding.put_replicated(pipeline.mesh, labels_of(pipeline, index))
    model = conditioned(pipeline, labels)
    _, path = samplers.trajectory(
        process.sampler, model, process.transitions, x, keys if process.sampler.stochastic else None
    )
    x_t, x_0 = (to_uint8(sharding.to_host(leaf)) for leaf in path)  # (S + 1, B, ...), (S, B, ...)
    return x_t, np.concatenate([x_0, x_t[-1:]])


def _largest(process: SamplingProcess) -> np.float32:
    """The bound on the absolute values of an image or a latent: 1e6 times the factor by which sampling scales x_T if
    the predicted eps is always 0.
    """
    return np.float32(1e6 / np.sqrt(np.min(process.transitions.alpha_bar_t)))


@jax.jit
def _to_pixels(x: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The images as uint8 (B, H, W, C), and which of them have only values within the bound, (B,) bool."""
    return to_uint8(x), _within(x, largest)


def _within(x, largest):
    """Which images have only values within the bound, (B,) bool. A comparison with NaN is False."""
    return (abs(x) <= largest).reshape(len(x), -1).all(axis=1)


def _check_images(name: str, valid: np.ndarray, first: int, pipeline: Pipeline) -> None:
    """ConfigError with the index of the first invalid image. valid: (B,) bool, for the images first, first + 1, ..."""
    if valid.all():
        return
    if _all_finite(pipeline.denoiser.params):
        cause = "check eta, guidance, tau and sampler of config.sample"
    else:
        cause = "the parameters of the network are not finite"
    raise ConfigError(f"{name} {first + np.flatnonzero(~valid)[0]} is not finite, or its values are too large: {cause}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def encode(
    pipeline: Pipeline, x_0: np.ndarray, labels: np.ndarray | None, first: int = 0, refine: int = 0
) -> np.ndarray:
    """Encodes images into latents x_T, Eq. (13), along the process's tau: (B, H, W, C), float32 on the host.

    x_0: images (B, H, W, C) in [-1, 1]; B is a multiple of the number of devices.
    labels: (B,) ints for a class-conditional network, else None.
    first: the index of the first image, for error messages.
    refine: fixed-point iterations per step for exact DDIM inversion, see `inversion.invert`; 0: the explicit Eq. (13).
    ConfigError if a latent is not finite.
    """
    process, model = pipeline.process, conditioned(pipeline, _split(pipeline, labels))
    x_0 = sharding.split_batch(pipeline.mesh, x_0)
    if refine:
        x_T = inversion.invert(model, process.schedule, process.tau, x_0, refine, process.end, process.stride).x_T
    else:
        x_T = samplers.invert(model, process.schedule, process.tau, x_0, end=process.end, stride=process.stride)
    return _checked_on_host("the latent of image", x_T, pipeline, first)


def decode(pipeline: Pipeline, x_T: np.ndarray, labels: np.ndarray | None, first: int = 0) -> np.ndarray:
    """Decodes latents x_T (B, H, W, C) into images x_0, float32 on the host. The range is [-1, 1], but values may lie
    slightly outside of it. The process must be deterministic. labels, first: see `encode`. ConfigError if an image is
    not finite.
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
    """J_sigma, Eq. (11), in nats, (B,) float64: an upper bound of the negative log-likelihood of each image.

    images: pixels (B, H, W, C) uint8. index: their indices (B,); the noise of image i depends only on (seed, i).
    labels: (B,) ints, or None. eta: of the process, above 0. ValueError if eta is 0; ConfigError if a bound is not
    finite.
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
    """Real images uint8 (B, H, W, C) and their classes (B,), None for an unconditional network.

    index: (B,) indices into the first `total` images of the source; for an index beyond these, the last image is
    repeated. The classes are the labels of the data, or `labels_of` if the data has no labels. ValueError for a class
    that the network does not have.
    """
    batch = source[np.minimum(index, total - 1)]
    if batch.labels is None or not pipeline.num_classes:
        return batch.images, labels_of(pipeline, index)
    check_labels(batch.labels, pipeline.num_classes, np.minimum(index, total - 1))
    return batch.images, batch.labels


def _split(pipeline: Pipeline, labels: np.ndarray | None) -> jax.Array | None:
    return None if labels is None else sharding.split_batch(pipeline.mesh, labels)


def _delayed(items: Iterable[Any], count: int) -> Iterator[Any]:
    """Yields each item after `count` further items have been produced."""
    queue = collections.deque()
    for item in items:
        queue.append(item)
        if len(queue) > count:
            yield queue.popleft()
    yield from queue


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
    """Draws samples x_0 (count, *shape), float32 on the host. Sample i depends only on (seed, i).

    model: a denoiser or an eps_fn. shape: of one sample. sampler: None for `samplers.ddim()`. tau: a name in
    registry.NAMED_TAUS, or custom timesteps, see `trajectory.explicit`. steps: S, for a named tau. batch_size: samples
    per batch. labels: (count,) ints, for a `Denoiser` of a class-conditional network. ValueError for an invalid
    argument.
    """
    checks.integer("count", count, 1)
    checks.integer("batch_size", batch_size, 1)
    sampler = samplers.ddim() if sampler is None else sampler
    transitions = trajectory.descend(noise_schedule, tau_of(noise_schedule, tau, steps))
    size, samples = min(batch_size, count), []
    for begin in range(0, count, size):
        index = np.minimum(np.arange(begin, begin + size), count - 1)
        keys = samplers.image_keys(jax.random.key(seed), jnp.asarray(index))
        x_T = samplers.initial_noise(keys, tuple(shape))
        conditioned = model if labels is None else model.with_labels(np.asarray(labels)[index])
        x_0 = samplers.integrate(sampler, conditioned, transitions, x_T, keys if sampler.stochastic else None)
        samples.append(sharding.to_host(x_0)[: count - begin])
    return np.concatenate(samples)


def tau_of(noise_schedule: Schedule, tau: str | np.ndarray, steps: int) -> np.ndarray:
    """The timesteps (S + 1,). tau: a name in registry.NAMED_TAUS, or custom timesteps. steps: S, for a named tau."""
    T = schedule.check(noise_schedule).num_steps
    if not isinstance(tau, str):
        return trajectory.explicit(T, tau)
    make = registry.resolve(registry.NAMED_TAUS, tau)
    return make(T if tau in registry.TAUS else noise_schedule, steps)
