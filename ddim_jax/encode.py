"""Encodes real images into latents and back (section 5.4).

    python -m ddim_jax.encode --config configs/digits.py [--images DIR_OR_NPZ] [--workdir DIR] --out DIR

Without --images it takes the test split of the config's data set. Writes `latents.npz` (x_T as float32 `latents`),
`reconstructions.npz` (uint8 `arr_0`, and `error`), `report.json`, `pairs.png`, images above their reconstructions, and
`run.json`, the record of what they are made from. The error is that of table 2: the mean square over pixels in [0, 1].
A run that was interrupted resumes when the same command is given again.

config.sample.refine solves each step, so that decoding returns the image itself.
Encoding is deterministic, so eta must be 0, and nothing is clipped: what is clipped cannot be taken back.
"""

from __future__ import annotations

from ddim_jax import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import hashlib
import json
import pathlib
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddim_jax import cli, data, files, generate, images, output, sharding, weights
from ddim_jax import config as config_lib
from ddim_jax import fingerprint as fingerprint_lib
from ddim_jax.config import Config
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.errors import ConfigError, error_context
from ddim_jax.memory import check_sampling

PAIRS = 20
CHUNK = 500  # images that are read at a time

WRITTEN = ("latents.npz", "reconstructions.npz", "report.json", "pairs.png", "latents.parts", "reconstructions.parts")

OPTIONS = {
    "images": (None, "A folder of images, or an .npz of them. Default: the test split of config.data."),
    "count": (None, "Only so many of them, the first. Default: all."),
    "workdir": (None, "Use the latest checkpoint of this run."),
    "out": (None, "Output folder."),
    "overwrite": (False, "Replace what another run left in the output folder."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if not options.out:
        raise ConfigError("--out is missing: the folder of the results")
    config = deterministic(config)
    config_lib.network(config.model)  # mistakes show before anything is read or written
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    output.check_writable(options.out)
    source, total = load_images(options.images, options.count, config)
    mesh = sharding.data_mesh()
    check_sampling(config, mesh, total)
    found = weights.find(config, options.workdir, mesh)
    made_from = fingerprint(config, process, found, source, total)
    out = output.open_folder(options.out, made_from, WRITTEN, options.overwrite)
    cli.say(f"{total} images, {len(process.tau) - 1} steps up and as many down, {found.source}")

    latents, reconstructions = round_trip(out, config, process, found.params, mesh, source, total)
    if not sharding.is_first():
        return
    report = make_report(latents, reconstructions, len(process.tau) - 1)
    with files.replacing(out / "report.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    shown = np.arange(min(PAIRS, total))
    again = images.open_npz(reconstructions)["arr_0"][shown]
    images.write_png(out / "pairs.png", images.grid(np.concatenate([source[shown].images, again]), len(shown)))
    out.record("report.json", "pairs.png")
    cli.say(
        f"error {report['error_mean']:.3g} per pixel and image, mean square in [0, 1] (largest "
        f"{report['error_max']:.3g}); latents have mean {report['latent_mean']:.3g}, std {report['latent_std']:.3g}"
    )
    for name in ("latents.npz", "reconstructions.npz", "report.json", "pairs.png"):
        cli.say(str(out / name))


def deterministic(config: Config) -> Config:
    """The config to encode with: nothing is clipped. ConfigError if its process draws noise."""
    sample = config.sample
    if sample.sampler != "ddim" or sample.eta:
        raise ConfigError(
            f"config.sample: encoding is deterministic, sampler must be 'ddim' and eta 0; got "
            f"{sample.sampler!r} and {sample.eta}"
        )
    return dataclasses.replace(config, sample=dataclasses.replace(sample, clip_x0=False))


def round_trip(
    out: output.Folder,
    config: Config,
    process: config_lib.Process,
    params: Any,
    mesh: Mesh,
    source: data.Source,
    total: int,
) -> tuple[pathlib.Path, pathlib.Path]:
    """The first `total` images of the source up into `out/latents.npz`, and down again into
    `out/reconstructions.npz`. What is there already is verified, and not made again.
    """
    shape = generate.image_shape(config)
    results = {
        "latents.npz": output.Arrays(total, "--count", {"latents": (shape, "float32")}),
        "reconstructions.npz": output.Arrays(total, "--count", {"arr_0": (shape, "uint8"), "error": ((), "float64")}),
    }

    def real(index: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Images in [-1, 1], and their classes for a network with classes: those of the data, where it has them.
        Beyond the end the last image again.
        """
        with error_context("--images"):
            batch = source[np.minimum(index, total - 1)]
            own = batch.labels if config.model.num_classes else None
            if own is not None:
                data.check_labels(own, config.model.num_classes, np.minimum(index, total - 1))
        return to_unit(batch.images), generate.labels_of(config, index) if own is None else own

    def encoded(first: int) -> Iterator[dict[str, np.ndarray]]:
        for index in generate.batch_indices(config, mesh, first, total):
            latents = generate.encode(config, process, params, mesh, *real(index), first=index[0])
            yield {"latents": latents[: total - index[0]]}

    def decoded(first: int) -> Iterator[dict[str, np.ndarray]]:
        stored = images.open_npz(latents)["latents"]
        for index in generate.batch_indices(config, mesh, first, total):
            x_0, labels = real(index)
            x_T = stored[np.minimum(index, total - 1)]
            again = generate.decode(config, process, params, mesh, x_T, labels, first=index[0])
            error = np.square((again - x_0) / 2, dtype=np.float64).mean((1, 2, 3))
            kept = slice(total - index[0])
            yield {"arr_0": to_uint8(again[kept]), "error": error[kept]}

    output.check_room(out, results)
    computed_with = fingerprint_lib.computed_with(config, mesh, total)
    gather = lambda name, batches, doing: output.gather(out, name, results[name], batches, doing, computed_with)
    latents = gather("latents.npz", encoded, "encoding")
    return latents, gather("reconstructions.npz", decoded, "decoding")


def load_images(path: str | None, count: str | None, config: Config) -> tuple[data.Source, int]:
    """The images to encode, which must be what the network takes, and how many of them."""
    if path is None:
        with error_context("config.data"):
            source = data.load(config.data.name, config.data.path, "test")
    else:
        if not pathlib.Path(path).exists():
            raise ConfigError(f"--images: there is no file or folder {path}")
        with error_context("--images"):
            source = data.load("folder" if pathlib.Path(path).is_dir() else "npz", path, "test")
    expected = generate.image_shape(config)
    if source.image_shape != expected:
        raise ConfigError(
            f"--images: the network takes {'x'.join(map(str, expected))}, these are "
            f"{'x'.join(map(str, source.image_shape))}"
        )
    if count is None:
        return source, len(source)
    number = int(count) if count.isascii() and count.isdigit() and len(count) < 20 else 0
    if not 1 <= number <= len(source):
        raise ConfigError(f"--count must be in 1..{len(source)}, the number of images, got {count[:20]}")
    return source, number


def fingerprint(
    config: Config, process: config_lib.Process, found: weights.Weights, source: data.Source, total: int
) -> dict[str, Any]:
    """All that the latents depend on."""
    made_from = fingerprint_lib.of_images(config, process)
    sample = made_from.pop("sample")
    return {
        **digests_of(source, total, bool(config.model.num_classes)),
        "count": total,
        **{name: sample[name] for name in ("tau", "tau_end", "label", "guidance") if name in sample},
        **made_from,
        "weights": found.digest,
        **({"refine": config.sample.refine} if config.sample.refine else {}),
    }


def digests_of(source: data.Source, total: int, with_labels: bool) -> dict[str, str]:
    """SHA-256 of the first `total` images of a source: of all, with their classes, and of those at 1000 places, which
    earlier versions recorded.
    """
    every, some = hashlib.sha256(), hashlib.sha256()
    chosen = np.unique(np.linspace(0, total - 1, 1000).astype(int))
    with error_context("--images"):
        for begin in range(0, total, CHUNK):
            index = np.arange(begin, min(begin + CHUNK, total))
            batch = source[index]
            every.update(np.ascontiguousarray(batch.images).data)
            if with_labels and batch.labels is not None:
                every.update(np.ascontiguousarray(batch.labels).data)
            some.update(batch.images[np.isin(index, chosen)].tobytes())
    return {"images": some.hexdigest(), "all_images": every.hexdigest()}


def make_report(latents: pathlib.Path, reconstructions: pathlib.Path, steps: int) -> dict[str, Any]:
    """Errors, and how near the latents are to N(0, I), in float64 without all of them in memory."""
    errors = images.open_npz(reconstructions)["error"]
    sums = np.zeros(2)
    for x in images.open_npz(latents)["latents"]:
        sums += [x.mean(dtype=np.float64), np.square(x, dtype=np.float64).mean()]
    mean, square = sums / len(errors)
    return {
        "images": len(errors),
        "steps": steps,
        "error_mean": float(errors.mean()),
        "error_max": float(errors.max()),
        "latent_mean": float(mean),
        "latent_std": float(np.sqrt(max(square - mean**2, 0))),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    cli.start(main, OPTIONS, several=True)
