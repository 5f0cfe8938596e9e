"""The fields of a config, with their types and ranges.

`configs/*.py` are ml_collections files with the default and a comment for every field. `parsing` converts them to the
frozen dataclasses below. An error is one line that names the field. A section with the name of a factory, such as
config.model, also has the parameters of that factory as fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddim_jax import registry
from ddim_jax.data import DATASETS, SPLITS
from ddim_jax.models import NETWORKS
from ddim_jax.training.objectives import OBJECTIVES
from ddim_jax.training.optimizers import EMAS, OPTIMIZERS, RATES
from ddim_jax.training.times import TIMES
from ddim_jax.utils import files, ranges
from ddim_jax.utils.ranges import Options

MOST_STEPS = 1_000_000  # the maximum of T: a larger one is rejected before any array of that size is allocated


def entry_of(table: Mapping[str, Any], default: Any = ranges.MISSING) -> Any:
    """A field whose value is the name of a table entry, or "package.module:attribute". The check imports nothing."""
    return ranges.field(default, lambda name: registry.check_name(table, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = entry_of(DATASETS)
    path: str = ranges.field()
    flip: bool = ranges.field()
    in_memory: bool = ranges.field()
    workers: int = ranges.at_least(0, 1024)
    options: Options = ranges.field(Options())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields that all networks have. The other fields of config.model are the parameters of the factory `name`,
    with their types, ranges and defaults; see `parsing.section_of`.
    """

    name: str = entry_of(NETWORKS)
    image_size: int = ranges.at_least(1, 2048)
    image_channels: int = ranges.at_least(1, 4096)
    num_classes: int = ranges.at_least(0, 1_000_000, 0)
    label_dropout: float = ranges.below_one(0.0)
    prediction: str = ranges.one_of(registry.PREDICTIONS, "eps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    name: str = entry_of(registry.SCHEDULES)
    num_steps: int = ranges.at_least(1, MOST_STEPS)
    beta_start: float = ranges.above_zero()
    beta_end: float = ranges.above_zero()
    betas: tuple[float, ...] = ranges.at_most_so_many(MOST_STEPS)
    log_snr_max: float = ranges.field(13.3)
    log_snr_min: float = ranges.field(-10.0)
    zero_terminal_snr: bool = ranges.field(False)
    options: Options = ranges.field(Options())


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The fields that all optimizers have. The other fields are the parameters of the factory `name`."""

    name: str = entry_of(OPTIMIZERS)
    schedule: str = entry_of(RATES, "constant")
    schedule_options: Options = ranges.field(Options())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    name: str = entry_of(OBJECTIVES)
    weight: str = entry_of(registry.WEIGHTS)
    weight_options: Options = ranges.field(Options())
    time: str = entry_of(TIMES)
    time_options: Options = ranges.field(Options())
    options: Options = ranges.field(Options())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    num_steps: int = ranges.at_least(1)
    batch_size: int = ranges.at_least(1)
    seed: int = ranges.at_least(0, ranges.SEED)
    learning_rate: float = ranges.above_zero()
    warmup: int = ranges.at_least(0)
    clip_norm: float = ranges.above_zero()
    optimizer: OptimizerConfig = ranges.field()
    objective: ObjectiveConfig = ranges.field()
    ema_decay: float = ranges.below_one()
    ema_schedule: str = entry_of(EMAS)
    accumulate: int = ranges.at_least(1)
    max_skipped: int = ranges.at_least(1)
    log_every: int = ranges.at_least(1)
    checkpoint_every: int = ranges.at_least(1)
    keep: int = ranges.at_least(1)
    keep_every: int = ranges.at_least(0)
    grid_every: int = ranges.at_least(0)
    evaluate_every: int = ranges.at_least(0)
    evaluate_images: int = ranges.at_least(2)
    wandb: str = ranges.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = ranges.at_least(-1)
    fsdp: int = ranges.at_least(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    sampler: str = entry_of(registry.SAMPLERS)
    eta: float = ranges.at_least(0)
    steps: int = ranges.at_least(1, 1_000_000)
    tau: str = ranges.field()
    tau_offset: int = ranges.at_least(0, MOST_STEPS)
    tau_end: int = ranges.at_least(0, MOST_STEPS)
    fixed_stride: bool = ranges.field()
    num_images: int = ranges.at_least(1)
    batch_size: int = ranges.at_least(1)
    seed: int = ranges.at_least(0, ranges.SEED)
    clip_x0: bool = ranges.field()
    keep_eps: bool = ranges.field()
    clip_range: float = ranges.above_zero()
    clip_quantile: float = ranges.below_one()
    ema: bool = ranges.field()
    label: int = ranges.at_least(-1)
    guidance: float = ranges.at_least(0)
    refine: int = ranges.at_least(0, 1000)
    options: Options = ranges.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    features: str = ranges.field()
    weights: str = ranges.field()
    metrics: str = ranges.field()
    num_images: int = ranges.at_least(2)
    batch_size: int = ranges.at_least(1, 65_536)
    reference: str = ranges.field()
    split: str = ranges.one_of({split: None for split in SPLITS})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    name: str = ranges.field(check=files.check_name)
    pretrained: str = ranges.field()
    data: DataConfig = ranges.field()
    model: ModelConfig = ranges.field()
    schedule: ScheduleConfig = ranges.field()
    train: TrainConfig = ranges.field()
    mesh: MeshConfig = ranges.field()
    sample: SampleConfig = ranges.field()
    evaluate: EvaluateConfig = ranges.field()


# Sections that also have the parameters of a factory as fields -> the table of the factories.
FACTORIES = {ModelConfig: NETWORKS, OptimizerConfig: OPTIMIZERS}
GIVEN = ("learning_rate",)  # parameters of factories that another field of the config sets

# Fields of config.model that do not change the parameters of the network.
NOT_ARCHITECTURE = ("dropout", "dtype", "remat")


class DefaultIfUnset(NamedTuple):
    """A field that may be unset (None). A published checkpoint then sets the field and its dependent fields."""

    value: Any  # without a checkpoint
    dependent: Mapping[str, Any]  # the dependent fields -> their defaults, with which they have no effect


DEFAULT_IF_UNSET = {  # fields of config.sample
    "tau": DefaultIfUnset("uniform", {"tau_offset": 0, "tau_end": 0}),
    "clip_x0": DefaultIfUnset(False, {"clip_range": 1.0, "clip_quantile": 0.0}),
}
