"""The predicted x_0 at every step, compared with the final image: why one step does not remove all of the noise.

    python -m experiments.predicted_x0 --config configs/digits.py --out DIR

table.png shows the predicted x_0, Eq. (9), from t = T on the left to the final image on the right. distances.png plots
the root mean square distance from the predicted x_0 to the final image, over pixels in [0, 1]. In the table, `one_shot`
is this distance at t = T, and `half_way` the one after half of the steps. The columns `..._between` are mean distances
between predictions, and between final images, of different x_T.

With the optimal eps, the first prediction is the mean of all images, the same for every x_T, and the later predictions
are a blurred image that becomes sharp. The eps of a trained network has an error, which Eq. (9) multiplies by
`magnified`, sqrt((1 - alpha_bar_T) / alpha_bar_T). This error dominates the first prediction.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import functools
import pathlib
import types
from typing import Any

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import samplers, sampling
from ddim_jax.config import Config, weights
from ddim_jax.data.scaling import to_uint8
from ddim_jax.samplers import SamplingProcess
from ddim_jax.sampling import Pipeline
from ddim_jax.utils import images, output_folder, sharding
from experiments import common, grid
from experiments.common import Cell

PICTURED = 6
COLUMNS = 11

OPTIONS = common.OPTIONS | {
    "steps": ("50", "The values of S."),
    "count": ("100", "The number of x_T."),
}


def main(options: types.SimpleNamespace) -> None:
    config, steps = options.config, common.ints("steps", options.steps)
    (count,) = common.ints("count", options.count, least=2)
    cells = [dataclasses.replace(config, sample=dataclasses.replace(config.sample, steps=S)) for S in steps]
    processes = [grid.process_of(cell) for cell in cells]
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    out = common.begin(
        options,
        [*common.WRITTEN, "distances.png"],
        experiment="predicted_x0",
        weights=trained.digest,
        sample=grid.fixed(config, ("steps",)) | {"sampler": config.sample.sampler, "eta": config.sample.eta},
        count=count,
    )

    def measure(cell: Config, process: SamplingProcess, folder: output_folder.Folder) -> dict[str, Any]:
        """Only the trajectory of one batch at a time is in memory."""
        distances, first, middle, last = [], [], [], []
        pipeline = config_lib.pipeline(cell, trained.params, mesh, process)
        for index in sampling.batch_indices(pipeline.batch_size, mesh, 0, count):
            x, predicted = path_of(pipeline, index)
            valid = slice(count - index[0])
            distances.append(common.root_mean_square(predicted[:, valid], x[None, valid]))
            first.append(predicted[0, valid])
            middle.append(predicted[len(predicted) // 2, valid])
            last.append(x[valid])
            if index[0] == 0:
                images.write_png(folder / "first.png", strip(predicted[:, valid], x[valid]))
        distances = np.concatenate(distances, axis=1).mean(axis=1)  # (S,)
        with folder.writing("distances.npz") as file:
            np.savez(file, t=process.transitions.t, distance=distances)
        return {
            "one_shot": float(distances[0]),
            "half_way": float(distances[len(distances) // 2]),
            "one_shot_between": between(np.concatenate(first)),
            "half_way_between": between(np.concatenate(middle)),
            "final_between": between(np.concatenate(last)),
            "magnified": float(np.sqrt(1 / process.transitions.alpha_bar_t[0] - 1)),
            "images": count,
        }

    rows = common.run(
        out,
        [
            Cell({"S": S}, grid.depends_on(cell, process), S, functools.partial(measure, cell, process))
            for S, cell, process in zip(steps, cells, processes, strict=True)
        ],
    )
    common.write_table(out, rows, source=trained.source)
    folders = {row["S"]: out / common.folder_of({"S": row["S"]}) for row in rows}
    pictures = {S: common.read_png(folder / "first.png") for S, folder in folders.items()}
    images.write_png(
        out / "table.png", common.labelled([[p] for p in pictures.values()], [f"S = {S}" for S in pictures], [""])
    )
    common.plot(out / "distances.png", functools.partial(draw, folders))
    names = ("S", "one_shot", "half_way", "one_shot_between", "half_way_between", "final_between", "magnified")
    head = ["S", "one shot to image", "half way to image", "between one shots", "half way", "between images", "error x"]
    body = [[row[name] for name in names] for row in rows]
    common.finish(out, common.markdown(head, body), [*common.FILES, "distances.png"])


def path_of(pipeline: Pipeline, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images (B, H, W, C) of the indices (B,), and the predicted x_0 at every step, (S, B, H, W, C); both uint8."""
    keys, x_T = sampling.start(pipeline, sharding.split_batch(pipeline.mesh, index))
    labels = sampling.labels_of(pipeline, index)
    labels = None if labels is None else sharding.split_batch(pipeline.mesh, labels)
    denoiser = sampling.conditioned(pipeline, labels)
    sampler, transitions = pipeline.process.sampler, pipeline.process.transitions
    x, path = samplers.trajectory(sampler, denoiser, transitions, x_T, keys if sampler.stochastic else None)
    return tuple(to_uint8(sharding.to_host(leaf)) for leaf in (x, path.x_0))


def between(batch: np.ndarray) -> float:
    """The mean distance between two different images of a batch (N, H, W, C)."""
    distances = np.stack([common.root_mean_square(image, batch) for image in batch])
    return float(distances.sum() / (len(batch) * (len(batch) - 1)))


def strip(predicted: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One row for each x_T: predictions at evenly spaced steps from left to right, and the final image."""
    path = np.concatenate([predicted, x[None]])[:, :PICTURED]
    chosen = path[np.unique(np.linspace(0, len(path) - 1, COLUMNS).round().astype(int))]
    return images.grid(chosen.swapaxes(0, 1).reshape(-1, *x.shape[1:]), len(chosen))


def draw(folders: dict[int, pathlib.Path], figure: Any) -> None:
    axes = figure.add_subplot(xlabel="t", ylabel="distance of the predicted x_0 to the image")
    for S, folder in folders.items():
        with np.load(folder / "distances.npz", allow_pickle=False) as file:
            axes.plot(file["t"], file["distance"], ".-", label=f"S = {S}")
    axes.invert_xaxis()
    axes.legend()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    common.start(main, OPTIONS)
