"""Draws images.

    python -m ddim_jax.sample --config configs/digits.py [--workdir DIR] [--out DIR] [--config.sample.FIELD=VALUE ...]

Writes to the output folder: `samples.npz` with all images, `grid.png`, and `run.json`, which records everything that
the images depend on. The same command resumes an interrupted run.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import pathlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from ddim_jax import cli, registry, sampling
from ddim_jax import config as config_lib
from ddim_jax.config import Config, weights
from ddim_jax.config import fingerprint as fingerprint_lib
from ddim_jax.samplers import SamplingProcess
from ddim_jax.sampling import Pipeline
from ddim_jax.training.memory import check_sampling
from ddim_jax.utils import files, images, output_arrays, output_folder, output_parts, sharding

GRID_IMAGES = 100
FILM_IMAGES = 8
FILM_COLUMNS = 11
FILM_FRAMES = 60

WRITTEN = ("samples.npz", "grid.png", "film.png", "film.gif", "png", "samples.parts")

OPTIONS = {
    "workdir": (None, "Sample the latest checkpoint of this run, not the weights that are shipped with the package."),
    "out": (None, "Output folder. Default: a folder named after the settings, in samples/NAME or WORKDIR/samples."),
    "overwrite": (False, "Replace the results of another run in the output folder."),
    "png": (False, "Also write every image as png/NUMBER.png."),
    "film": (
        False,
        "Also write the sampling trajectories: film.png (x_t above, the predicted x_0 below) and film.gif.",
    ),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    network = config_lib.network(config.model)  # first, so that a config error appears before any file is touched
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    if options.out or not options.workdir:  # a missing workdir is reported by weights.find
        output_folder.check_writable(options.out or root(config, None))
    mesh = sharding.data_mesh()
    check_sampling(network, mesh, min(config.sample.batch_size, config.sample.num_images))
    trained = weights.find(config, options.workdir, mesh)
    made_from = fingerprint(config, process, trained)
    out = options.out or default_folder(config, options.workdir, process, trained, made_from)
    out = output_folder.open_folder(out, made_from, WRITTEN, options.overwrite)
    steps = len(process.tau) - 1
    named = config.sample.tau in registry.NAMED_TAUS or registry.is_code(config.sample.tau)
    requested = f" ({config.sample.steps} were requested)" if named and steps != config.sample.steps else ""
    cli.say(
        f"{config.sample.num_images} images, {config.sample.sampler} in {steps} steps{requested}, from {trained.source}"
    )

    pipeline = config_lib.pipeline(config, trained.params, mesh, process)
    npz = draw_all(out, pipeline, config.sample.num_images)
    frames = None
    if options.film:
        frames = sampling.trajectory_frames(pipeline, min(FILM_IMAGES, config.sample.num_images))
    if not sharding.is_main_process():
        return
    samples = images.open_npz(npz)["arr_0"]
    written = [npz, write(out / "grid.png", images.write_png, images.grid(samples[:GRID_IMAGES]))]
    if options.png:
        folder = cli.writable_folder(out / "png")
        for i, image in enumerate(tqdm(samples, "png", unit="file")):
            images.write_png(folder / f"{i:06d}.png", image)
        written.append(folder)
    if frames is not None:
        written += write_film(out.path, *frames)
    out.record(*(path.name for path in written if path.suffix in (".png", ".gif")))
    for path in written:
        cli.say(str(path))


def root(config: Config, workdir: str | None) -> pathlib.Path:
    """The parent of the default output folders. config.name may come from a checkpoint file: characters that could make
    it a path are replaced.
    """
    return pathlib.Path(workdir, "samples") if workdir else pathlib.Path("samples", files.name_from(config.name))


def default_folder(
    config: Config, workdir: str | None, process: SamplingProcess, trained: weights.Weights, made_from: dict[str, Any]
) -> pathlib.Path:
    """The default output folder. Runs with different settings have different folders, so that none of them meets the
    results of another.
    """
    return root(config, workdir) / fingerprint_lib.folder_name(config, process, workdir and trained.step, made_from)


def fingerprint(config: Config, process: SamplingProcess, trained: weights.Weights) -> dict[str, Any]:
    """Everything that the images depend on, except the batch size and the devices: these change only the rounding."""
    return {**fingerprint_lib.of_images(config, process), "weights": trained.digest}


def draw_all(out: output_folder.Folder, pipeline: Pipeline, count: int) -> pathlib.Path:
    """Writes samples.npz: `count` images as `arr_0`, and for a class-conditional network their classes as `arr_1`."""
    items = {"arr_0": (pipeline.shape, "uint8")}
    if pipeline.num_classes:
        items["arr_1"] = ((), "int32")
    arrays = output_arrays.Arrays(count, "config.sample.num_images", items)

    def batches(first: int) -> Iterator[dict[str, np.ndarray]]:
        for samples in sampling.batches(pipeline, count, first):
            labels = sampling.labels_of(pipeline, np.arange(first, first + len(samples)))
            yield {"arr_0": samples} | ({} if labels is None else {"arr_1": labels})
            first += len(samples)

    output_parts.check_room(out, {"samples.npz": arrays})
    computed_with = sampling.computed_with(pipeline, count)
    return output_parts.gather(out, "samples.npz", arrays, batches, "sampling", computed_with)


def write_film(out: pathlib.Path, x_t: np.ndarray, x_0: np.ndarray) -> list[pathlib.Path]:
    """Writes film.png, a strip of x_t and of the predicted x_0 at some timesteps, and film.gif, an animation of the
    pairs. x_t, x_0: uint8 (S + 1, B, H, W, C), see `sampling.trajectory_frames`.
    """
    indices = lambda count: np.unique(np.linspace(0, len(x_t) - 1, count).round().astype(int))
    columns = indices(FILM_COLUMNS)
    strip = [images.grid(np.concatenate(list(frames[columns].swapaxes(0, 1))), len(columns)) for frames in (x_t, x_0)]
    animation = [
        images.grid(np.stack([x_t[i], x_0[i]], axis=1).reshape(-1, *x_t.shape[2:]), columns=2)
        for i in indices(FILM_FRAMES)
    ]
    return [
        write(out / "film.png", images.write_png, np.concatenate(strip)),
        write(out / "film.gif", images.write_gif, animation),
    ]


def write(path: pathlib.Path, writer: Any, content: Any) -> pathlib.Path:
    writer(path, content)
    return path


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
