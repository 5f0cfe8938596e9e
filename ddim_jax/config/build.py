"""The objects that a config names."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ddim_jax import registry, samplers, trajectory
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
from ddim_jax.utils.errors import error_context


def noise_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule that config.schedule names. Its factory gets those fields that its signature names, and
    config.schedule.options.
    """
    with error_context("config.schedule.name"):
        factory = registry.resolve(registry.SCHEDULES, config.name)
    with error_context("config.schedule"):
        made = _built(factory, config)
    with error_context("config.schedule.zero_terminal_snr"):
        return zero_terminal_snr(made) if config.zero_terminal_snr else made


@functools.lru_cache(maxsize=16)  # it is asked for by every batch
def network(config: ModelConfig) -> Network:
    """The network that config.model describes. ConfigError if its sizes do not fit together."""
    with error_context("config.model.name"):
        factory = registry.resolve(NETWORKS, config.name)
    with error_context("config.model"):
        fields = ranges.arguments(factory, dataclasses.asdict(config))
        return network_lib.make(factory, fields, image_shape(config), config.num_classes)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer that config.train describes, on clipped gradients. ConfigError where it cannot be made."""
    chosen = config.optimizer
    with error_context("config.train.optimizer.schedule"):
        rate_of = registry.resolve(optimizers.RATES, chosen.schedule)
    with error_context("config.train.optimizer.schedule_options"):
        rate = registry.build(rate_of, _named(config, "learning_rate", "warmup", "num_steps"), chosen.schedule_options)
    with error_context("config.train.optimizer.name"):
        factory = registry.resolve(optimizers.OPTIMIZERS, chosen.name)
    with error_context("config.train.optimizer"):
        fields = {"learning_rate": rate} | dataclasses.asdict(chosen)
        return optimizers.clipped(factory(**ranges.arguments(factory, fields)), config.clip_norm)


def objective(config: Config) -> Objective:
    """The objective that config.train.objective describes. ConfigError where it cannot be made."""
    chosen = config.train.objective
    parts = {}
    for name, table in (("weight", registry.WEIGHTS), ("time", TIMES)):
        with error_context(f"config.train.objective.{name}"):
            factory = registry.resolve(table, getattr(chosen, name))
        with error_context(f"config.train.objective.{name}_options"):
            parts[name] = registry.build(factory, {}, getattr(chosen, f"{name}_options"))
    with error_context("config.train.objective.name"):
        factory = registry.resolve(OBJECTIVES, chosen.name)
    made_of = {
        "network": network(config.model),
        "noise_schedule": noise_schedule(config.schedule),
        "prediction": config.model.prediction,
        **parts,
    }
    with error_context("config.train.objective"):
        made = registry.build(factory, made_of, chosen.options)
        if not isinstance(made, Objective):
            raise ValueError(f"{chosen.name} must return an Objective, got {type(made).__name__}")
    return made


def recipe(config: Config, objective_of: Callable[[Config], Objective] = objective) -> Recipe:
    """The training that a config describes. objective_of: what makes its objective."""
    train, model = config.train, config.model
    counted = None
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
    """step -> the decay of the moving average."""
    with error_context("config.train.ema_schedule"):
        return registry.build(registry.resolve(optimizers.EMAS, config.ema_schedule), {"decay": config.ema_decay})


def _named(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _built(factory: Any, config: Any) -> Any:
    """What a factory makes of the fields of a section that it names, and of its options, whose types it annotates."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("name", "options")}
    options, parameters = {}, ranges.parameters(factory)
    for name, value in config.options.items():
        try:
            options[name] = ranges.typed(parameters[name].kind, value) if name in parameters else value
        except ValueError as error:
            raise ValueError(f"options.{name}: {error}") from error
    return registry.build(factory, fields, options)


def process(config: SampleConfig, schedule: Schedule) -> SamplingProcess:
    """Sampler, tau and transitions of config.sample; ConfigError if they do not fit together or the schedule.

    config.tau is a name in registry.TAUS or registry.SPACINGS, a function of the user's, "module:function", from
    (schedule, steps) to (S+1,) numbers, or the levels themselves: "1,10,99.5,1000"; tau_offset and tau_end: see
    `trajectory.shift_and_truncate`. The sampler's factory gets those fields that its signature names, and
    config.options.
    """
    with error_context("config.sample.tau"):
        given = _numbers(config.tau)
        if given:
            tau = trajectory.explicit(schedule.num_steps, given)
        else:
            make_tau = registry.resolve(registry.NAMED_TAUS, config.tau)
    if not given:
        with error_context("config.sample.steps"):
            tau = make_tau(schedule.num_steps if config.tau in registry.TAUS else schedule, config.steps)
    stride = schedule.num_steps // (len(tau) - 1) if config.fixed_stride else 0
    with error_context("config.sample.tau_offset and tau_end"):
        tau = trajectory.shift_and_truncate(schedule.num_steps, tau, config.tau_offset, config.tau_end)
    with error_context("config.sample.fixed_stride" if stride else "config.sample.tau"):
        transitions = trajectory.descend(schedule, tau, config.tau_end, stride)
    with _named_in_message({"eta": "eta", "steps": "tau" if given else "steps", "tau": "tau"}):
        factory = registry.resolve(registry.SAMPLERS, config.sampler)
        sampler = _built(factory, config)
        samplers.check_sampler(sampler)
        sampler.check(transitions)
    return SamplingProcess(sampler, tau, transitions, schedule, config.tau_end, stride)


def pipeline(config: Config, params: Any, mesh: Mesh, sampling_process: SamplingProcess | None = None) -> Pipeline:
    """The network of config.model with these parameters, replicated over the mesh, sampled as config.sample says.

    sampling_process: default: that of config.sample.
    """
    sample = config.sample
    if sampling_process is None:
        sampling_process = process(sample, noise_schedule(config.schedule))
    return Pipeline(
        denoiser(config, params),
        sampling_process,
        mesh,
        sample.batch_size,
        sample.seed,
        sample.label,
        sample.guidance,
        _bound_x0(sample),
    )


def denoiser(config: Config, params: Any) -> Denoiser:
    """The network of config.model with these parameters, without guidance and bounds."""
    return Denoiser(network(config.model), params, config.model.prediction, lowest=_lowest(config.schedule))


def _bound_x0(config: SampleConfig) -> Callable[[Denoise], Denoise] | None:
    """What bounds the predicted x_0, None where config.clip_x0 is False."""
    if not config.clip_x0:
        return None
    if not config.clip_quantile:
        return functools.partial(clip_x0, low=-config.clip_range, high=config.clip_range, keep_eps=config.keep_eps)
    bound = functools.partial(
        threshold_x0, quantile=config.clip_quantile, maximum=config.clip_range, keep_eps=config.keep_eps
    )
    with error_context("config.sample.clip_range"):
        bound(from_eps(lambda x, t: x))  # a mistake shows here
    return bound


@functools.lru_cache(maxsize=16)
def _lowest(config: ScheduleConfig) -> Level:
    """The lowest level that a network is trained on."""
    return jax.tree.map(np.float32, noise_schedule(config).level(1))._replace(t=np.int32(1))


def image_shape(config: ModelConfig) -> tuple[int, int, int]:
    """(H, W, C) of the images of a network."""
    return config.image_size, config.image_size, config.image_channels


@contextlib.contextmanager
def _named_in_message(fields: Mapping[str, str]) -> Iterator[None]:
    """`error_context` of the field of config.sample that stands for the first of these words in the error's message; of
    the sampler itself, if there is none.
    """
    try:
        yield
    except ValueError as error:
        word = next((word for word in re.findall(r"\w+", str(error)) if word in fields), None)
        with error_context(f"config.sample.{fields.get(word, 'sampler')}"):
            raise


def _numbers(text: str) -> list[float]:
    """Those of a list with commas; none if it is something else."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        return []
