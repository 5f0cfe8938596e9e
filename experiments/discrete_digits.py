"""Appendix A on real data: the digits as categorical data with 17 grey levels per pixel, over sigma and S.

    python -m experiments.discrete_digits --config configs/digits.py --out DIR [--config.train.num_steps=3000]

First, the config's network with one channel per grey level is trained by the classification loss, in DIR/training. If
the command is repeated, training resumes there. Then a table is filled. Its rows are sigma as a fraction of its limit
(1 is the discrete DDIM), its columns S. Samples are evaluated like those of table 1. `bits_per_dim` is J_sigma of
held-out digits over d log 2. It bounds the probability of the grey levels, so it is not comparable with a Gaussian
process.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddim_jax import cli, data, discrete, samplers, sampling, train
from ddim_jax import config as config_lib
from ddim_jax.checkpoints.tensors import digest
from ddim_jax.config import Config, evaluation
from ddim_jax.data.scaling import from_one_hot, to_one_hot
from ddim_jax.discrete import LogProbsFn
from ddim_jax.evaluation.evaluator import evaluate_samples
from ddim_jax.models.denoiser import log_probs_fn
from ddim_jax.training import objectives
from ddim_jax.training.objectives import Objective
from ddim_jax.trajectory import Transitions
from ddim_jax.utils import images, sharding
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import common, grid
from experiments.common import Cell

LEVELS = 17
PICTURED = 8

OPTIONS = {
    "out": common.OPTIONS["out"],
    "fractions": ("0,0.5,1", "The rows: sigma as a fraction of its limit."),
    "steps": ("5,10,20,50,100,1000", "The columns: values of S."),
    "count": ("100", "The number of held-out digits for bits_per_dim."),
    "held_out": (None, "The earlier name of --count."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    fractions, steps = fractions_of(options.fractions), common.ints("steps", options.steps)
    transitions_of = {S: transitions(config, S) for S in steps}
    (held_out,) = common.ints("count", options.held_out or options.count)
    network = dataclasses.replace(config, model=dataclasses.replace(config.model, image_channels=LEVELS))
    mesh = sharding.data_mesh(config.mesh.data, config.mesh.fsdp)
    with error_context("config.data"):
        load = lambda split: data.load(config.data.name, config.data.path, split, config.data.options)
        source, test = load("train"), load("test")
    if source.image_shape[-1] != 1:
        raise ConfigError("config.data: must have grey images, with one channel")

    features = evaluation.open_network(config)
    trained_with = {name: value for name, value in dataclasses.asdict(network).items() if name in TRAINED_WITH}
    out = common.begin(
        options,
        [*common.WRITTEN, "reference.npz", "training"],
        experiment="discrete_digits",
        levels=LEVELS,
        features=features.weights,
        evaluate=dataclasses.asdict(config.evaluate) | {"batch_size": None},
        sample=grid.fixed(config, []),
        **trained_with,
    )
    stored = out.find("reference.npz")
    evaluator = evaluation.evaluator(config, features, mesh, source.image_shape, [], stored)
    common.keep_reference(out, stored, evaluator.reference)
    out.claim()
    params = train.run(
        network, config_lib.recipe(network, objective), source, cli.writable_folder(out / "training"), mesh
    )
    params = sharding.put_replicated(mesh, jax.device_get(params))
    predict = log_probs_fn(config_lib.network(network.model), params)

    def measure(fraction: float, S: int, folder: Any) -> dict[str, Any]:
        drawn = draw(config, predict, fraction, transitions_of[S], mesh)
        images.write_png(folder / "first.png", images.grid(drawn[:PICTURED], PICTURED))
        numbers = evaluate_samples(evaluator, data.ArraySource(drawn), config.evaluate.num_images, "the samples")
        x_0 = to_one_hot(LEVELS, test[np.arange(min(held_out, len(test)))].images)
        keys = samplers.image_keys(jax.random.key(config.sample.seed), jnp.arange(len(x_0)))
        nats = discrete.j_sigma(predict, transitions_of[S], x_0, keys, fraction)
        bits = float(nats.mean()) / (np.log(2) * np.prod(source.image_shape))
        return {**numbers, "bits_per_dim": bits, "images": len(drawn)}

    weights = digest(params)
    places = [{"sigma": f"{fraction:g}", "S": S} for S in steps for fraction in fractions]
    rows = common.run(
        out,
        [
            Cell(place, {"weights": weights}, place["S"], functools.partial(measure, float(place["sigma"]), place["S"]))
            for place in places
        ],
    )
    axes = list(places[0])
    common.write_table(out, rows, features=features.name)
    images.write_png(out / "table.png", grid.picture(rows, axes, out))
    lines, columns, cells = grid.laid_out(rows, axes)
    tables = []
    for number in (evaluator.metrics[0], "bits_per_dim"):
        body = [
            [line, *(None if row is None else f"{row[number]:.4g}" for row in of_line)]
            for line, of_line in zip(lines, cells, strict=True)
        ]
        tables.append(common.markdown([number, *(f"S = {column}" for column in columns)], body))
    common.finish(out, "\n".join(tables))


TRAINED_WITH = ("model", "schedule", "data", "train")


def fractions_of(text: str) -> list[float]:
    """The values of --fractions. ConfigError for one outside [0, 1]."""
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--fractions: must be numbers, got {text!r}") from None
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ConfigError(f"--fractions: must be in [0, 1], got {fraction:g}")
    return fractions


def transitions(config: Config, S: int) -> Transitions:
    """S steps with the tau of the config."""
    return grid.process_of(dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=S))).transitions


def objective(config: Config) -> Objective:
    """The classification loss over LEVELS classes."""
    noise_schedule = config_lib.noise_schedule(config.schedule)
    return objectives.classification(config_lib.network(config.model), noise_schedule, LEVELS)


_initial = jax.jit(discrete.initial, static_argnums=1)


def draw(config: Config, log_probs_fn: LogProbsFn, fraction: float, steps: Transitions, mesh: Mesh) -> np.ndarray:
    """Draws config.evaluate.num_images digits, uint8 (N, H, W, 1). Image i depends only on (config.sample.seed, i)."""
    total, drawn = config.evaluate.num_images, []
    shape = (config.model.image_size, config.model.image_size, LEVELS)
    sampler = discrete.discrete_ddim(fraction)
    for index in sampling.batch_indices(config.sample.batch_size, mesh, 0, total):
        keys = samplers.image_keys(jax.random.key(config.sample.seed), sharding.split_batch(mesh, index))
        x_0 = samplers.integrate(sampler, discrete.from_log_probs(log_probs_fn), steps, _initial(keys, shape), keys)
        drawn.append(from_one_hot(sharding.to_host(x_0))[: total - index[0]])
    return np.concatenate(drawn)


if __name__ == "__main__":
    common.start(main, OPTIONS)
