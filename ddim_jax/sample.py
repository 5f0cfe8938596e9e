"""Draws images.

    python -m ddim_jax.sample --config configs/digits.py [--workdir DIR] [--out DIR] [--config.sample.FIELD=VALUE ...]

Writes `grid.png`, and `samples.npz` with all images, into the output folder. A run that was interrupted goes
on where it was when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddim_jax import cli, generate, images, output, registry, samplers, sharding, weights
from ddim_jax import config as config_lib
from ddim_jax.config import Config, Process
from ddim_jax.data.scaling import to_uint8
from ddim_jax.memory import check_sampling

GRID_IMAGES = 100
FILM_IMAGES = 8
FILM_COLUMNS = 11
FILM_FRAMES = 60

WRITTEN = ("samples.npz", "grid.png", "film.png", "film.gif", "png", "samples.parts")

OPTIONS = {
    "workdir": (None, "Sample the latest checkpoint of this run, not the weights that ship with the package."),
    "out": (None, "Output folder. Default: samples/NAME/PROCESS, or WORKDIR/samples/PROCESS."),
    "overwrite": (False, "Replace what another run left in the output folder."),
    "png": (False, "Also write every image as png/NUMBER.png."),
    "film": (
        False,
        "Also write the way from noise to image, film.png (x_t above, the predicted x_0 below) and film.gif.",
    ),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    mesh = sharding.data_mesh()
    check_sampling(config, mesh, config.sample.num_images)
    found = weights.find(config, options.workdir, mesh)
    out = cli.writable_folder(options.out or default_folder(config, options.workdir))

    output.claim(out, fingerprint(config, process, found), WRITTEN, options.overwrite)
    steps = len(process.tau) - 1
    fewer_or_more = config.sample.tau in registry.NAMED_TAUS and steps != config.sample.steps
    asked = f" ({config.sample.steps} were asked for)" if fewer_or_more else ""
    cli.say(f"{config.sample.num_images} images, {config.sample.sampler} in {steps} steps{asked}, from {found.source}")

    npz = draw_all(out, config, process, found.params, mesh)
    frames = film(config, process, found.params, mesh) if options.film else None
    if not sharding.is_first():
        return
    drawn = images.open_npz(npz)["arr_0"]
    written = [npz, write(out / "grid.png", images.write_png, images.grid(drawn[:GRID_IMAGES]))]
    if options.png:
        folder = cli.writable_folder(out / "png")
        for i, image in enumerate(tqdm(drawn, "png", unit="file")):
            images.write_png(folder / f"{i:06d}.png", image)
        written.append(folder)
    if frames is not None:
        written += write_film(out, *frames)
    for path in written:
        print(path)


def default_folder(config: Config, workdir: str | None) -> pathlib.Path:
    """A folder for each way to sample, so that the default of one never meets the other's files."""
    sample = config.sample
    eta = f"-eta{sample.eta:g}" if "eta" in registry.accepts(registry.SAMPLERS[sample.sampler]) else ""
    tau = (
        f"{sample.tau}-{sample.steps}" if sample.tau in registry.NAMED_TAUS else f"explicit-{sample.tau.count(',') + 1}"
    )
    root = pathlib.Path(workdir, "samples") if workdir else pathlib.Path("samples", config.name)
    return root / f"{sample.sampler}{eta}-{tau}-seed{sample.seed}-n{sample.num_images}"


def fingerprint(config: Config, process: Process, found: weights.Weights) -> dict[str, Any]:
    """All that the images depend on. Not the batch size: it does not change them."""
    sample = dataclasses.asdict(config.sample) | {"tau": process.tau.tolist()}
    del sample["batch_size"], sample["steps"], sample["refine"]
    schedule, model = dataclasses.asdict(config.schedule), dataclasses.asdict(config.model)
    return {"sample": sample, "schedule": schedule, "model": model, "weights": found.digest}


def draw_all(out: pathlib.Path, config: Config, process: Process, params: Any, mesh: jax.sharding.Mesh) -> pathlib.Path:
    """samples.npz with all images, and their classes where the network has them."""

    def batches(first: int) -> Iterator[dict[str, np.ndarray]]:
        for images_ in generate.batches(config, process, params, mesh, first):
            labels = generate.labels_of(config, np.arange(first, first + len(images_)))
            yield {"arr_0": images_} | ({} if labels is None else {"arr_1": labels})
            first += len(images_)

    return output.gather(out / "samples.npz", batches, config.sample.num_images, "sampling")


def film(config: Config, process: Process, params: Any, mesh: jax.sharding.Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The first images on their way, x_t and the predicted x_0: uint8 (S+1, B, H, W, C), both."""
    index = np.arange(min(FILM_IMAGES, config.sample.num_images))
    keys, x = generate.start(config, sharding.put_replicated(mesh, index))
    eps_fn = generate.eps_fn(config, params, sharding.put_replicated(mesh, generate.labels_of(config, index)))
    _, path = samplers.trajectory(
        process.sampler, eps_fn, process.transitions, x, keys if process.sampler.stochastic else None
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
    cli.start(main, OPTIONS, several=True)
