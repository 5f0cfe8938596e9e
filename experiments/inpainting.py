"""Inpainting: the lower half of real images is masked and drawn, conditioned on the upper half.

    python -m experiments.inpainting --config configs/digits.py --out DIR

The images are held out from training. `guidance.inpainted` draws the lower halves, over eta and S. `agreement` is
the fraction of results to which the classifier of config.evaluate assigns the class of the complete image. `known` is
the largest error of a known pixel. `table.png` shows the images, the masked images, and the results.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import functools
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import data, guidance, samplers, sampling
from ddim_jax.config import Config, evaluation, weights
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.evaluation import features as features_lib
from ddim_jax.evaluation import metrics as metrics_lib
from ddim_jax.utils import images, output_folder, sharding
from ddim_jax.utils.errors import ConfigError, error_context
from experiments import common, grid
from experiments.common import Cell

PICTURED = 16

OPTIONS = common.OPTIONS | {
    "etas": ("0,0.5,1", "The rows: values of eta."),
    "steps": ("20,50,200", "The columns: values of S."),
    "count": ("359", "The number of images."),
}


def main(options: types.SimpleNamespace) -> None:
    config, steps = options.config, common.ints("steps", options.steps)
    (count,) = common.ints("count", options.count)
    axes = [{"eta": eta, "S": S} for S in steps for eta in options.etas.split(",")]
    cells = [grid.at(options, place, count) for place in axes]
    processes = [grid.process_of(cell) for cell in cells]
    with error_context("config.data"):
        source = data.load(config.data.name, config.data.path, "test", config.data.options)
    if not source.num_classes or count > len(source):
        raise ConfigError(f"--count: there are {len(source)} images of {source.num_classes} classes, got {count}")
    real = source[np.arange(count)]
    mesh = sharding.data_mesh()
    trained, features = weights.find(config, options.workdir, mesh), evaluation.open_network(config)
    out = common.begin(
        options,
        experiment="inpainting",
        weights=trained.digest,
        features=features.weights,
        sample=grid.fixed(config, ["eta"]),
        count=count,
    )
    x_0, mask = to_unit(real.images), lower_half(source.image_shape)
    index = np.arange(count)
    pipeline = config_lib.pipeline(config, trained.params, mesh)
    labels = sampling.labels_of(pipeline, index)
    network = sampling.conditioned(pipeline, None if labels is None else jnp.asarray(labels))
    inpainted = guidance.inpainted(network, x_0, ~mask)

    def agreement(pixels: np.ndarray) -> float:
        extracted = features_lib.extract(
            features, data.ArraySource(pixels, real.labels), mesh, 500, {"logits", "labels"}
        )
        return metrics_lib.METRICS["agreement"].compute(extracted, extracted)["agreement"]

    def measure(cell: Config, process: Any, folder: output_folder.Folder) -> dict[str, Any]:
        keys, x_T = sampling.start(config_lib.pipeline(cell, trained.params, mesh, process), jnp.asarray(index))
        keys = keys if process.sampler.stochastic else None
        drawn = np.asarray(samplers.integrate(process.sampler, inpainted, process.transitions, x_T, keys))
        images.write_png(folder / "first.png", images.grid(to_uint8(drawn[:PICTURED]), PICTURED))
        known = np.abs(drawn - x_0)[np.broadcast_to(~mask, drawn.shape)].max()
        return {"agreement": agreement(to_uint8(drawn)), "known": float(known), "images": count}

    rows = common.run(
        out,
        [
            Cell(place, grid.depends_on(cell, process), place["S"], functools.partial(measure, cell, process))
            for place, cell, process in zip(axes, cells, processes, strict=True)
        ],
    )
    of_real, of_masked = agreement(real.images), agreement(to_uint8(np.where(mask, -1, x_0)))
    common.write_table(out, rows, real=of_real, hidden=of_masked)
    inputs = [real.images[:PICTURED], np.where(mask, 128, real.images[:PICTURED]).astype(np.uint8)]
    last = [row for row in rows if row["S"] == max(steps)]
    pictures = [images.grid(batch, PICTURED) for batch in inputs]
    pictures += [
        common.read_png(out / common.folder_of({"eta": row["eta"], "S": row["S"]}) / "first.png") for row in last
    ]
    labels_ = ["real", "masked", *(f"eta {row['eta']}" for row in last)]
    images.write_png(out / "table.png", common.labelled([[picture] for picture in pictures], labels_, [""]))
    lines, columns, cells_ = grid.laid_out(rows, list(axes[0]))
    body = [
        [line, *(row and f"{row['agreement']:.3f}" for row in body)] for line, body in zip(lines, cells_, strict=True)
    ]
    text = common.markdown(["agreement", *(f"S = {column}" for column in columns)], body)
    common.finish(out, f"{text}\nreal images {of_real:.3f}, the upper halves alone {of_masked:.3f}\n")


def lower_half(shape: tuple[int, int, int]) -> np.ndarray:
    """The mask (1, H, W, 1) of images (H, W, C): True for the lower half."""
    return (np.arange(shape[0]) >= shape[0] // 2)[None, :, None, None]


if __name__ == "__main__":
    common.start(main, OPTIONS)
