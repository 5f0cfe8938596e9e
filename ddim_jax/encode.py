"""Encodes real images into latents and decodes them (section 5.4).

    python -m ddim_jax.encode --config configs/digits.py [--images DIR_OR_NPZ] [--workdir DIR] --out DIR

Without --images it encodes the test split of config.data. Writes to the output folder: `latents.npz` (x_T as float32
`latents`), `reconstructions.npz` (uint8 `arr_0`, and `error`), `report.json`, `pairs.png` with the images above their
reconstructions, and `run.json`, which records everything that the results depend on. The error is that of table 2: the
mean squared error per pixel, for pixels in [0, 1]. The same command resumes an interrupted run.

config.sample.refine is the number of fixed-point iterations per step for exact DDIM inversion. Decoding then returns
the encoded image.

Encoding is deterministic, so eta must be 0. The predicted x_0 is not clipped, because clipping cannot be inverted.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import dataclasses
import json
import pathlib
import types
from typing import Any

import numpy as np

from ddim_jax import cli, data, encoding
from ddim_jax import config as config_lib
from ddim_jax.config import Config, weights
from ddim_jax.config import fingerprint as fingerprint_lib
from ddim_jax.samplers import SamplingProcess
from ddim_jax.training.memory import check_sampling
from ddim_jax.utils import files, images, output_folder, sharding
from ddim_jax.utils.errors import ConfigError, error_context

PAIRS = 20

WRITTEN = ("latents.npz", "reconstructions.npz", "report.json", "pairs.png", "latents.parts", "reconstructions.parts")

OPTIONS = {
    "images": (None, "A folder of images, or an .npz file of images. Default: the test split of config.data."),
    "count": (None, "Encode only the first COUNT images. Default: all."),
    "workdir": (None, "Use the latest checkpoint of this run, not the weights that are shipped with the package."),
    "out": (None, "Output folder."),
    "overwrite": (False, "Replace the results of another run in the output folder."),
}


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    if not options.out:
        raise ConfigError("--out is missing: the folder of the results")
    config = deterministic(config)
    network = config_lib.network(config.model)  # first, so that a config error appears before any file is touched
    process = config_lib.process(config.sample, config_lib.noise_schedule(config.schedule))
    output_folder.check_writable(options.out)
    source, total = load_images(options.images, options.count, config)
    mesh = sharding.data_mesh()
    check_sampling(network, mesh, min(config.sample.batch_size, total))
    trained = weights.find(config, options.workdir, mesh)
    made_from = fingerprint(config, process, trained, source, total)
    out = output_folder.open_folder(options.out, made_from, WRITTEN, options.overwrite)
    steps = len(process.tau) - 1
    cli.say(f"{total} images, {steps} encoding steps and {steps} decoding steps, {trained.source}")

    pipeline = config_lib.pipeline(config, trained.params, mesh, process)
    latents, reconstructions = encoding.round_trip(out, pipeline, source, total, config.sample.refine)
    if not sharding.is_main_process():
        return
    report = encoding.make_report(latents, reconstructions, steps)
    with files.replacing(out / "report.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    first = np.arange(min(PAIRS, total))
    decoded = images.open_npz(reconstructions)["arr_0"][first]
    images.write_png(out / "pairs.png", images.grid(np.concatenate([source[first].images, decoded]), len(first)))
    out.record("report.json", "pairs.png")
    cli.say(
        f"mean squared error {report['error_mean']:.3g} per pixel in [0, 1], at most {report['error_max']:.3g} in an "
        f"image; latents have mean {report['latent_mean']:.3g}, std {report['latent_std']:.3g}"
    )
    for name in ("latents.npz", "reconstructions.npz", "report.json", "pairs.png"):
        cli.say(str(out / name))


def deterministic(config: Config) -> Config:
    """The config with clip_x0=False. ConfigError if its sampling process is stochastic."""
    sample = config.sample
    if sample.sampler != "ddim" or sample.eta:
        raise ConfigError(
            f"config.sample: encoding is deterministic: sampler must be 'ddim' and eta must be 0, got "
            f"{sample.sampler!r} and {sample.eta}"
        )
    return dataclasses.replace(config, sample=dataclasses.replace(sample, clip_x0=False))


def load_images(path: str | None, count: str | None, config: Config) -> tuple[data.Source, int]:
    """The images to encode, and the number of images. ConfigError if their shape is not that of the network.

    path: the value of --images, None for the test split of config.data. count: the value of --count, None for all.
    """
    if path is None:
        with error_context("config.data"):
            source = data.load(config.data.name, config.data.path, "test", config.data.options)
    else:
        if not pathlib.Path(path).exists():
            raise ConfigError(f"--images: there is no file or folder {path}")
        with error_context("--images"):
            source = data.load("folder" if pathlib.Path(path).is_dir() else "npz", path, "test")
    expected = config_lib.image_shape(config.model)
    if source.image_shape != expected:
        raise ConfigError(
            f"--images: the network takes {'x'.join(map(str, expected))}, the images are "
            f"{'x'.join(map(str, source.image_shape))}"
        )
    if count is None:
        return source, len(source)
    number = int(count) if count.isascii() and count.isdigit() and len(count) < 20 else 0
    if not 1 <= number <= len(source):
        raise ConfigError(f"--count must be in 1..{len(source)}, the number of images, got {count[:20]}")
    return source, number


def fingerprint(
    config: Config, process: SamplingProcess, trained: weights.Weights, source: data.Source, total: int
) -> dict[str, Any]:
    """Everything that the latents depend on."""
    made_from = fingerprint_lib.of_images(config, process)
    sample = made_from.pop("sample")
    return {
        **encoding.digests_of(source, total, bool(config.model.num_classes)),
        "count": total,
        **{name: sample[name] for name in ("tau", "tau_end", "label", "guidance") if name in sample},
        **made_from,
        "weights": trained.digest,
        **({"refine": config.sample.refine} if config.sample.refine else {}),
    }


if __name__ == "__main__":
    cli.start(main, OPTIONS, distributed=True)
