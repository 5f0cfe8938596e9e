"""Builds the objects that a config describes: schedule, network, optimizer, objective, data, sampling process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ddim_jax import data, registry, samplers, trajectory
from ddim_jax.config.schema import Config, ModelConfig, SampleConfig, ScheduleConfig, TrainConfig
from ddim_jax.gaussian import Denoise, clip_x0, from_eps, threshold_x0
from ddim_jax.models import NETWORKS
from ddim_jax.models import network as network_lib
from ddim_jax.models.denoiser import Denoiser
from ddim_jax.models.network import Network
from ddim_jax.samplers import SamplingProcess
from ddim_jax.sampling import Pipeline
from ddim_jax.schedule import Level, Schedule, zero_terminal_snr
from ddim_jax.training import optimizers
from ddim_jax.training.objectives import OBJECTIVES, Objective
from ddim_jax.training.recipe import Recipe
from ddim_jax.training.times import TIMES
from ddim_jax.utils import ranges
from ddim_jax.utils.errors import ConfigError, error_context


def noise_schedule(config: ScheduleConfig) -> Schedule:
    """The noise schedule of config.schedule. Its factory receives the fields that are in its signature, and
    config.schedule.options. ConfigError if the factory rejects them.
    """
    with error_context("config.schedule.name"):
        factory = registry.resolve(registry.SCHEDULES, config.name)
    with error_context("config.schedule"):
        schedule = _call_factory(factory, config)
    with error_context("config.schedule.zero_terminal_snr"):
        return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


@functools.lru_cache(maxsize=16)  # called for every batch
def network(config: ModelConfig) -> Network:
    """The network of config.model. ConfigError if its fields are inconsistent."""
    with error_context("config.model.name"):
        factory = registry.resolve(NETWORKS, config.name)
    with error_context("config.model"):
        fields = ranges.arguments(factory, dataclasses.asdict(config))
        return network_lib.make(factory, fields, image_shape(config), config.num_classes)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of config.train, with gradient clipping. ConfigError if a factory rejects its arguments."""
    section = config.optimizer
    with error_context("config.train.optimizer.schedule"):
        make_rate = registry.resolve(optimizers.RATES, section.schedule)
    with error_context("config.train.optimizer.schedule_options"):
        common = {name: getattr(config, name) for name in ("learning_rate", "warmup", "num_steps")}
        rate = registry.build(make_rate, common, section.schedule_options)
    with error_context("config.train.optimizer.name"):
        factory = registry.resolve(optimizers.OPTIMIZERS, section.name)
    with error_context("config.train.optimizer"):
        fields = {"learning_rate": rate} | dataclasses.asdict(section)
        return optimizers.clipped(factory(**ranges.arguments(factory, fields)), config.clip_norm)


def objective(config: Config) -> Objective:
    """The training objective of config.train.objective. ConfigError if a factory rejects its arguments."""
    section = config.train.objective
    parts = {}
    for name, table in (("weight", registry.WEIGHTS), ("time", TIMES)):
        with error_context(f"config.train.objective.{name}"):
            factory = registry.resolve(table, getattr(section, name))
        with error_context(f"config.train.objective.{name}_options"):
            parts[name] = registry.build(factory, {}, getattr(section, f"{name}_options"))
    with error_context("config.train.objective.name"):
        factory = registry.resolve(OBJECTIVES, section.name)
    fields = {
        "network": network(config.model),
        "noise_schedule": noise_schedule(config.schedule),
        "prediction": config.model.prediction,
        **parts,
    }
    with error_context("config.train.objective"):
        result = registry.build(factory, fields, section.options)
        if not isinstance(result, Objective):
            raise ValueError(f"{section.name} must return an Objective, got {type(result).__name__}")
    return result


def recipe(config: Config, objective_of: Callable[[Config], Objective] = objective) -> Recipe:
    """The training recipe of a config. objective_of: the function that builds the objective from a config."""
    train, model = config.train, config.model
    counted = None  # the objective without rematerialisation, see Recipe
    if getattr(model, "remat", False):
        counted = objective_of(dataclasses.replace(config, model=dataclasses.replace(model, remat=False)))
    return Recipe(
        network=network(model),
        objective=objective_of(config),
        optimizer=optimizer(train),
        num_steps=train.num_steps,
        batch_size=train.batch_size,
        seed=train.seed,
        ema_decay=ema_decay(train),
        accumulate=train.accumulate,
        flip=config.data.flip,
        max_skipped=train.max_skipped,
        checkpoint_every=train.checkpoint_every,
        keep=train.keep,
        keep_every=train.keep_every,
        workers=config.data.workers,
        counted=counted,
    )


def ema_decay(config: TrainConfig) -> Callable[[Any], Any]:
    """The EMA decay as a function of the step. ConfigError if config.train.ema_schedule is unknown."""
    with error_context("config.train.ema_schedule"):
        return registry.build(registry.resolve(optimizers.EMAS, config.ema_schedule), {"decay": config.ema_decay})


def training_data(config: Config, mesh: Mesh) -> data.Source:
    """The training images of config.data. ConfigError if they cannot be read, if their shape or their number of classes
    is not that of config.model, or if the batch cannot be divided over the devices of the mesh.
    """
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, "train", config.data.options)
        source = data.in_memory(source) if config.data.in_memory else source
    expected = image_shape(config.model)
    if source.image_shape != expected:
        raise ConfigError(
            f"config.model.image_size and image_channels: the network takes {'x'.join(map(str, expected))}, the images "
            f"of data set {config.data.name!r} are {'x'.join(map(str, source.image_shape))}"
        )
    if config.model.num_classes and source.num_classes != config.model.num_classes:
        raise ConfigError(
            f"config.model.num_classes: is {config.model.num_classes}, data set {config.data.name!r} "
            f"has {source.num_classes}"
        )
    check_batch(config.train, mesh)
    return source


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """ConfigError unless the devices of the mesh divide the images of one accumulation step."""
    unit = mesh.size * config.accumulate
    if config.batch_size % unit:
        parts = f" x {config.accumulate} accumulation steps" if config.accumulate > 1 else ""
        below = config.batch_size // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        raise ConfigError(
            f"config.train.batch_size: must be a multiple of {mesh.size} devices{parts}, such as {nearest}, "
            f"got {config.batch_size}"
        )


def _call_factory(factory: Any, config: Any) -> Any:
    """Calls a factory with those fields of a section that are in its signature, and with config.options. Each option
    is converted to the annotated type of its parameter.
    """
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("name", "options")}
    options, parameters = {}, ranges.parameters(factory)
    for name, value in config.options.items():
        try:
            options[name] = ranges.typed(parameters[name].kind, value) if name in parameters else value
        except ValueError as error:
            raise ValueError(f"options.{name}: {error}") from error
    return registry.build(factory, fields, options)


def process(config: SampleConfig, schedule: Schedule) -> SamplingProcess:
    """The sampling process of config.sample: sampler, tau and transitions. ConfigError if they are inconsistent with
    each other or with the schedule.

    config.tau is a name in registry.TAUS or registry.SPACINGS, a user's function "module:function" from (schedule,
    steps) to (S + 1,) numbers, or numbers, see `trajectory.parse`. tau_offset, tau_end: see
    `trajectory.shift_and_truncate`. The factory of the sampler receives the fields that are in its signature, and
    config.options.
    """
    with error_context("config.sample.tau"):
        tau = trajectory.parse(schedule.num_steps, config.tau)
        has_steps = tau is None  # else the text gives the timesteps, and config.steps has no effect
        if has_steps:
            make_tau = registry.resolve(registry.NAMED_TAUS, config.tau)
    if has_steps:
        with error_context("config.sample.steps"):
            tau = make_tau(schedule.num_steps if config.tau in registry.TAUS else schedule, config.steps)
    stride = schedule.num_steps // (len(tau) - 1) if config.fixed_stride else 0
    with error_context("config.sample.tau_offset and tau_end"):
        tau = trajectory.shift_and_truncate(schedule.num_steps, tau, config.tau_offset, config.tau_end)
    with error_context("config.sample.fixed_stride" if stride else "config.sample.tau"):
        transitions = trajectory.descend(schedule, tau, config.tau_end, stride)
    with _context_from_message({"eta": "eta", "steps": "steps" if has_steps else "tau", "tau": "tau"}):
        factory = registry.resolve(registry.SAMPLERS, config.sampler)
        sampler = _call_factory(factory, config)
        samplers.check_sampler(sampler)
        sampler.check(transitions)
    return SamplingProcess(sampler, tau, transitions, schedule, config.tau_end, stride)


def pipeline(config: Config, params: Any, mesh: Mesh, sampling_process: SamplingProcess | None = None) -> Pipeline:
    """The network of config.model with its sampling process, guidance and clipping.

    params: replicated over the mesh. sampling_process: None for that of config.sample.
    """
    sample = config.sample
    if sampling_process is None:
        sampling_process = process(sample, noise_schedule(config.schedule))
    model = denoiser(config, params)
    with error_context("config.sample.sampler"):
        _check_variance(sample.sampler, sampling_process, model)
    return Pipeline(
        model,
        sampling_process,
        mesh,
        sample.batch_size,
        sample.seed,
        sample.label,
        sample.guidance,
        _bound_x0(sample),
    )


def _check_variance(name: str, process: SamplingProcess, model: Denoiser) -> None:
    """Raises ValueError if the sampler needs a variance that the network does not predict."""
    if not getattr(process.sampler, "needs_variance", False):
        return
    network = model.network
    level = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), process.transitions.level_t)
    labels = jnp.zeros(1, jnp.int32) if network.num_classes else None
    predicted = jax.eval_shape(model.with_labels(labels), jax.ShapeDtypeStruct((1, *network.shape), np.float32), level)
    if predicted.variance_fraction is None:
        raise ValueError(f"{name} needs a network that predicts the variance, see config.model.learn_sigma")


def denoiser(config: Config, params: Any) -> Denoiser:
    """The denoiser of config.model with these parameters, without guidance and clipping."""
    return Denoiser(network(config.model), params, config.model.prediction, lowest=_lowest(config.schedule))


def _bound_x0(config: SampleConfig) -> Callable[[Denoise], Denoise] | None:
    """The combinator that clips the predicted x_0. None if config.clip_x0 is False."""
    if not config.clip_x0:
        return None
    if not config.clip_quantile:
        return functools.partial(clip_x0, low=-config.clip_range, high=config.clip_range, keep_eps=config.keep_eps)
    bound = functools.partial(
        threshold_x0, quantile=config.clip_quantile, maximum=config.clip_range, keep_eps=config.keep_eps
    )
    with error_context("config.sample.clip_range"):
        bound(from_eps(lambda x, t: x))  # raises an error for an invalid clip_range
    return bound


@functools.lru_cache(maxsize=16)
def _lowest(config: ScheduleConfig) -> Level:
    """The noise level at t = 1, the lowest one that a network is trained on."""
    return jax.tree.map(np.float32, noise_schedule(config).level(1))._replace(t=np.int32(1))


def image_shape(config: ModelConfig) -> tuple[int, int, int]:
    """(H, W, C) of the network's images."""
    return config.image_size, config.image_size, config.image_channels


@contextlib.contextmanager
def _context_from_message(fields: Mapping[str, str]) -> Iterator[None]:
    """Turns a ValueError of a sampler into a ConfigError that names a field of config.sample: the field of the first
    argument in the message, or config.sample.sampler if the message has none of the arguments.

    fields: argument -> field.
    """
    try:
        yield
    except ValueError as error:
        argument = next((name for name in re.findall(r"\w+", str(error)) if name in fields), None)
        with error_context(f"config.sample.{fields.get(argument, 'sampler')}"):
            raise
