"""Images by index: what `sample` writes, what `train` shows, what an experiment measures."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddim_jax import guidance, inversion, losses, samplers, sharding
from ddim_jax.config import Config, Process, ScheduleConfig, network, noise_schedule
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.gaussian import Denoise, clip_x0, threshold_x0
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.schedule import Level

_image_keys = jax.jit(samplers.image_keys)
_initial_noise = jax.jit(samplers.initial_noise, static_argnums=1)


def image_shape(config: Config) -> tuple[int, int, int]:
    return config.model.image_size, config.model.image_size, config.model.image_channels


def labels_of(config: Config, index: np.ndarray) -> np.ndarray | None:
    """The classes of images index (B,): config.sample.label, or in turn where it is -1; None for a network
    without classes.
    """
    classes, label = config.model.num_classes, config.sample.label
    if not classes:
        return None
    return (index % classes if label < 0 else np.full_like(index, label)).astype(np.int32)


def denoiser(config: Config, params: Any, labels: jax.Array | None = None) -> Denoise:
    """The network of config.model with these parameters, guided by config.sample.guidance, its x_0 bounded where
    config.sample.clip_x0 says so.
    """
    sample, lowest = config.sample, _lowest(config.schedule)
    of_class = lambda labels: Denoiser(network(config.model), params, config.model.prediction, labels, lowest)
    model = of_class(labels)
    if sample.guidance != 1:
        model = guidance.guided(model, of_class(jnp.full_like(labels, config.model.num_classes)), sample.guidance)
    if not sample.clip_x0:
        return model
    if sample.clip_quantile:
        with error_context("config.sample.clip_range"):
            return threshold_x0(model, sample.clip_quantile, sample.clip_range, keep_eps=sample.keep_eps)
    return clip_x0(model, -sample.clip_range, sample.clip_range, keep_eps=sample.keep_eps)


@functools.cache
def _lowest(config: ScheduleConfig) -> Level:
    """The lowest level that a network is trained on."""
    return jax.tree.map(np.float32, noise_schedule(config).level(1))._replace(t=np.int32(1))


def start(config: Config, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys (B,) and x_T (B, H, W, C) of images index (B,); both depend on (config.sample.seed, index) alone."""
    keys = _image_keys(jax.random.key(config.sample.seed), index)
    return keys, _initial_noise(keys, image_shape(config))


def batch_indices(config: Config, mesh: Mesh, first: int, total: int) -> Iterator[np.ndarray]:
    """The indices first .. total - 1 in batches of one size, a multiple of the devices, so that one program serves
    all. The last may go beyond total - 1: what is made of that is to be dropped.
    """
    size = -(-min(config.sample.batch_size, total) // mesh.size) * mesh.size
    for begin in range(first, total, size):
        yield np.arange(begin, begin + size)


def batches(config: Config, process: Process, params: Any, mesh: Mesh, first: int = 0) -> Iterator[np.ndarray]:
    """Images first .. num_images - 1 of config.sample in batches of uint8 (b, H, W, C) on the host. params:
    replicated over the mesh. An accelerator is given the next batch before it is waited for this one. ConfigError,
    naming the first, for an image that is not finite, or so far from [-1, 1] that it shows nothing.
    """
    total = config.sample.num_images

    def dispatched() -> Iterator[tuple[int, tuple[jax.Array, jax.Array]]]:
        for index in batch_indices(config, mesh, first, total):
            labels = _split(mesh, labels_of(config, index))
            keys, x = start(config, sharding.split_batch(mesh, index))
            x = samplers.integrate(
                process.sampler,
                denoiser(config, params, labels),
                process.transitions,
                x,
                keys if process.sampler.stochastic else None,
            )
            yield index[0], _to_pixels(x, _largest(process))

    for begin, (drawn, right) in _delayed(dispatched(), sharding.batches_ahead()):
        _check_images("image", sharding.to_host(right)[: total - begin], begin, params)
        yield sharding.to_host(drawn)[: total - begin]


def _largest(process: Process) -> np.float32:
    """What no value of an image or a latent exceeds: a million times what becomes of noise by a network that predicts
    nothing.
    """
    return np.float32(1e6 / np.sqrt(np.min(process.transitions.alpha_bar_t)))


@jax.jit
def _to_pixels(x: jax.Array, largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint8 (B, H, W, C), and which of the images are what they seem, (B,)."""
    return to_uint8(x), _within(x, largest)


def _within(x, largest):
    """(B,): whether all values of an image are finite and not absurd. NaN is not below anything."""
    return (abs(x) <= largest).reshape(len(x), -1).all(axis=1)


def _check_images(name: str, right: np.ndarray, first: int, params: Any) -> None:
    """ConfigError where one of the images first, first + 1, ... is not right."""
    if right.all():
        return
    broken = not _all_finite(params)
    look = "so are the parameters of the network" if broken else "look at config.sample: eta, guidance, tau, sampler"
    raise ConfigError(f"{name} {first + np.flatnonzero(~right)[0]} is not finite, or beyond any image: {look}")


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def encode(
    config: Config,
    process: Process,
    params: Any,
    mesh: Mesh,
    x_0: np.ndarray,
    labels: np.ndarray | None,
    first: int = 0,
) -> np.ndarray:
    """The latents x_T (B, H, W, C), float32 on the host, of images x_0 (B, H, W, C) in [-1, 1]: Eq. (13) up the levels
    of the process's tau, each step solved where config.sample.refine asks for it. B: a multiple of the devices. labels:
    (B,) ints for a network with classes. ConfigError where a latent is not finite; first: the index of the first image.
    """
    model, x_0 = denoiser(config, params, _split(mesh, labels)), sharding.split_batch(mesh, x_0)
    noise = noise_schedule(config.schedule)
    end, refine = config.sample.tau_end, config.sample.refine
    if refine:
        x_T = inversion.invert(model, noise, process.tau, x_0, refine, end, process.stride).x_T
    else:
        x_T = samplers.invert(model, noise, process.tau, x_0, end=end, stride=process.stride)
    return _checked_on_host("the latent of image", x_T, process, first, params)


def decode(
    config: Config,
    process: Process,
    params: Any,
    mesh: Mesh,
    x_T: np.ndarray,
    labels: np.ndarray | None,
    first: int = 0,
) -> np.ndarray:
    """What the process makes of latents x_T (B, H, W, C): images in [-1, 1] and a little beyond, float32 on the host.
    The process must be deterministic. ConfigError where an image is not finite; first: the index of the first.
    """
    model = denoiser(config, params, _split(mesh, labels))
    x_0 = samplers.integrate(process.sampler, model, process.transitions, sharding.split_batch(mesh, x_T))
    return _checked_on_host("image", x_0, process, first, params)


def _checked_on_host(name: str, x: jax.Array, process: Process, first: int, params: Any) -> np.ndarray:
    x = sharding.to_host(x)
    _check_images(name, _within(x, _largest(process)), first, params)
    return x


def bound(
    config: Config, process: Process, params: Any, mesh: Mesh, images: np.ndarray, index: np.ndarray, labels: Any
) -> np.ndarray:
    """J_sigma of pixels (B, H, W, C) uint8 in nats, (B,): what images index (B,) cost at most under the process's tau
    and config.sample.eta. The draws of image i depend on (config.sample.seed, i) alone. ValueError for an eta of 0,
    and where a bound is not finite.
    """
    model = denoiser(config, params, _split(mesh, labels))
    keys = _image_keys(jax.random.key(config.sample.seed), sharding.split_batch(mesh, index))
    x_0 = sharding.split_batch(mesh, to_unit(images))
    nats = losses.j_sigma(model, process.transitions, x_0, keys, config.sample.eta, "pixels")
    nats = np.asarray(sharding.to_host(nats), np.float64)
    _check_images("the bound of image", np.isfinite(nats), int(index[0]), params)
    return nats


def _split(mesh: Mesh, labels: np.ndarray | None) -> jax.Array | None:
    return None if labels is None else sharding.split_batch(mesh, labels)


def _delayed(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The same items, each when so many more have been made."""
    waiting = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
