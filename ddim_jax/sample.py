"""Draws images.

    python -m ddim_jax.sample --config configs/digits.py [--workdir DIR] [--out DIR] [--config.sample.FIELD=VALUE ...]

Writes `grid.png`, `samples.npz` with all images, and `run.json`, the record of what they are made from, into the output
folder. A run that was interrupted resumes when the same command is given again.
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

from ddim_jax import cli, registry, samplers, sampling
from ddim_jax import config as config_lib
from ddim_jax.config import Config, weights
from ddim_jax.config import fingerprint as fingerprint_lib
from ddim_jax.data.scaling import to_uint8
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
    "workdir": (None, "Sample the latest checkpoint of this run, not the weights that ship with the package."),
    "out": (None, "Output folder. Default: one for each way to sample, in samples/NAME, or in WORKDIR/samples."),
    "overwrite": (False, "Replace what another run left in the output folder."),
    "png": (False, "Also write every image as png/NUMBER.png."),
    "film": (
        False,
        "Also write the way from noise to image, film.png (x_t above, the predicted x_0 below) and film.gif.",
    ),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    network = config_lib.network(config.model)  # mistakes show before anything is read or written
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    if options.out or not options.workdir:  # a workdir that is not there is another mistake
        output_folder.check_writable(options.out or root(config, None))
    mesh = sharding.data_mesh()
    check_sampling(network, mesh, min(config.sample.batch_size, config.sample.num_images))
    found = weights.find(config, options.workdir, mesh)
    made_from = fingerprint(config, process, found)
    out = options.out or default_folder(config, options.workdir, process, found, made_from)
    out = output_folder.open_folder(out, made_from, WRITTEN, options.overwrite)
    steps = len(process.tau) - 1
    named = config.sample.tau in registry.NAMED_TAUS or registry.is_code(config.sample.tau)
    fewer_or_more = named and steps != config.sample.steps
    asked = f" ({config.sample.steps} were asked for)" if fewer_or_more else ""
    cli.say(f"{config.sample.num_images} images, {config.sample.sampler} in {steps} steps{asked}, from {found.source}")

    pipeline = config_lib.pipeline(config, found.params, mesh, process)
    npz = draw_all(out, pipeline, config.sample.num_images)
    frames = film(pipeline, min(FILM_IMAGES, config.sample.num_images)) if options.film else None
    if not sharding.is_main_process():
        return
    drawn = images.open_npz(npz)["arr_0"]
    written = [npz, write(out / "grid.png", images.write_png, images.grid(drawn[:GRID_IMAGES]))]
    if options.png:
        folder = cli.writable_folder(out / "png")
        for i, image in enumerate(tqdm(drawn, "png", unit="file")):
            images.write_png(folder / f"{i:06d}.png", image)
        written.append(folder)
    if frames is not None:
        written += write_film(out.path, *frames)
    out.record(*(path.name for path in written if path.suffix in (".png", ".gif")))
    for path in written:
        cli.say(str(path))


def root(config: Config, workdir: str | None) -> pathlib.Path:
    """Where the default output folders are. A name that a file gives is a name, never a path."""
    return pathlib.Path(workdir, "samples") if workdir else pathlib.Path("samples", files.name_from(config.name))


def default_folder(
    config: Config, workdir: str | None, process: SamplingProcess, found: weights.Weights, made_from: dict[str, Any]
) -> pathlib.Path:
    """A folder for each way to sample, so that the default of one never meets the other's files."""
    return root(config, workdir) / fingerprint_lib.folder_name(config, process, workdir and found.step, made_from)


def fingerprint(config: Config, process: SamplingProcess, found: weights.Weights) -> dict[str, Any]:
    """All that the images depend on; how they are computed decides their last bits, and is not in it."""
    return {**fingerprint_lib.of_images(config, process), "weights": found.digest}


def draw_all(out: output_folder.Folder, pipeline: Pipeline, count: int) -> pathlib.Path:
    """samples.npz with all images, and their classes where the network has them."""
    items = {"arr_0": (pipeline.shape, "uint8")}
    if pipeline.num_classes:
        items["arr_1"] = ((), "int32")
    arrays = output_arrays.Arrays(count, "config.sample.num_images", items)

    def batches(first: int) -> Iterator[dict[str, np.ndarray]]:
        for drawn in sampling.batches(pipeline, count, first):
            labels = sampling.labels_of(pipeline, np.arange(first, first + len(drawn)))
            yield {"arr_0": drawn} | ({} if labels is None else {"arr_1": labels})
            first += len(drawn)

    output_parts.check_room(out, {"samples.npz": arrays})
    computed_with = sampling.computed_with(pipeline, count)
    return output_parts.gather(out, "samples.npz", arrays, batches, "sampling", computed_with)


def film(pipeline: Pipeline, count: int) -> tuple[np.ndarray, np.ndarray]:
    """x_t and the predicted x_0 of the first `count` images at every level: uint8 (S+1, B, H, W, C), both."""
    index, process = np.arange(count), pipeline.process
    keys, x = sampling.start(pipeline, sharding.put_replicated(pipeline.mesh, index))
    labels = sharding.put_replicated(pipeline.mesh, sampling.labels_of(pipeline, index))
    model = sampling.conditioned(pipeline, labels)
    _, path = samplers.trajectory(
        process.sampler, model, process.transitions, x, keys if process.sampler.stochastic else None
    )
    x_t, x_0 = (to_uint8(sharding.to_host(leaf)) for leaf in path)  # (S+1, B, ...), (S, B, ...)
    return x_t, np.concatenate([x_0, x_t[-1:]])  # beside the final image, itself


def write_film(out: pathlib.Path, x_t: np.ndarray, x_0: np.ndarray) -> list[pathlib.Path]:
    """As a strip, and as an animation of both side by side."""
    at = lambda count: np.unique(np.linspace(0, len(x_t) - 1, count).round().astype(int))
    strip = [
        images.grid(np.concatenate(list(frames[at(FILM_COLUMNS)].swapaxes(0, 1))), len(at(FILM_COLUMNS)))
        for frames in (x_t, x_0)
    ]
    moving = [
        images.grid(np.stack([x_t[i], x_0[i]], axis=1).reshape(-1, *x_t.shape[2:]), columns=2) for i in at(FILM_FRAMES)
    ]
    return [
        write(out / "film.png", images.write_png, np.concatenate(strip)),
        write(out / "film.gif", images.write_gif, moving),
    ]


def write(path: pathlib.Path, writer: Any, content: Any) -> pathlib.Path:
    writer(path, content)
    return path


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
