"""Draws images.

    python -m ddim_jax.sample --config configs/digits.py [--workdir DIR] [--out DIR] [--config.sample.FIELD=VALUE ...]

Writes `grid.png`, and `samples.npz` with all images, into the output folder. A run that was interrupted goes
on where it was when the same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import types
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ddim_jax import cli, generate, images, registry, samplers, sharding, weights
from ddim_jax import config as config_lib
from ddim_jax.config import Config, ConfigError, Process
from ddim_jax.data.scaling import to_uint8

GRID_IMAGES = 100
FILM_IMAGES = 8
FILM_COLUMNS = 11
FILM_FRAMES = 60

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
    found = weights.find(config, options.workdir, mesh)
    out = cli.writable_folder(options.out or default_folder(config, options.workdir))

    claim(out, fingerprint(config, process, found), options.overwrite)
    steps = len(process.tau) - 1
    fewer_or_more = config.sample.tau in registry.TAUS and steps != config.sample.steps
    asked = f" ({config.sample.steps} were asked for)" if fewer_or_more else ""
    print(f"{config.sample.num_images} images, {config.sample.sampler} in {steps} steps{asked}, from {found.source}")

    npz = draw_all(out, config, process, found.params, mesh)
    first = np.stack(list(itertools.islice(images.read_npz(npz), GRID_IMAGES)))
    written = [npz, write(out / "grid.png", images.write_png, images.grid(first))]
    if options.png:
        folder = cli.writable_folder(out / "png")
        for i, image in enumerate(tqdm(images.read_npz(npz), "png", config.sample.num_images, unit="file")):
            images.write_png(folder / f"{i:06d}.png", image)
        written.append(folder)
    if options.film:
        written += film(out, config, process, found.params)
    for path in written:
        print(path)


def default_folder(config: Config, workdir: str | None) -> pathlib.Path:
    """A folder for each way to sample, so that the default of one never meets the other's files."""
    sample = config.sample
    eta = f"-eta{sample.eta:g}" if "eta" in registry.accepts(registry.SAMPLERS[sample.sampler]) else ""
    tau = f"{sample.tau}-{sample.steps}" if sample.tau in registry.TAUS else f"explicit-{sample.tau.count(',') + 1}"
    root = pathlib.Path(workdir, "samples") if workdir else pathlib.Path("samples", config.name)
    return root / f"{sample.sampler}{eta}-{tau}-seed{sample.seed}-n{sample.num_images}"


def fingerprint(config: Config, process: Process, found: weights.Weights) -> dict[str, Any]:
    """All that the images depend on, as JSON values. Not the batch size: it does not change them."""
    sample = dataclasses.asdict(config.sample) | {"tau": process.tau.tolist()}
    del sample["batch_size"], sample["steps"]
    schedule, model = dataclasses.asdict(config.schedule), dataclasses.asdict(config.model)
    as_dict = {"sample": sample, "schedule": schedule, "model": model, "weights": found.digest}
    return json.loads(json.dumps(as_dict))


def claim(out: pathlib.Path, ours: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder this run's own, or raises ConfigError because another run's images, or foreign files, are
    in it.
    """
    record = out / "run.json"
    known = ["run.json", "samples.npz", "grid.png", "film.png", "film.gif", "png", "parts"]
    present = [name for name in known if (out / name).exists()]
    if record.exists():
        try:
            theirs = json.loads(record.read_text())
        except json.JSONDecodeError:
            theirs = {}
        difference = next(_differences("", theirs, ours), None)
        if difference is None:
            return
        reason = f"{out} holds images of another run ({difference})"
    elif present:
        reason = f"{out} already holds {present[0]}"
    else:
        reason = None
    if reason and not overwrite:
        raise ConfigError(f"{reason}; give another --out, or --overwrite to replace it")
    for name in present:
        _remove(out / name)
    with images.replacing(record) as file:
        file.write(json.dumps(ours, indent=1).encode())


def _remove(path: pathlib.Path) -> None:
    """A file, or a folder of files whose names are numbers; whatever else somebody put into that folder stays."""
    if not path.is_dir():
        path.unlink()
        return
    for file in path.iterdir():
        if file.stem.isdigit():
            file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _differences(path: str, theirs: Any, ours: Any):
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *theirs]:
            yield from _differences(f"{path}.{name}" if path else name, theirs.get(name), ours.get(name))
    elif theirs != ours:
        yield f"{path} is {str(theirs)[:40]} there, {str(ours)[:40]} here"


def draw_all(out: pathlib.Path, config: Config, process: Process, params: Any, mesh: jax.sharding.Mesh) -> pathlib.Path:
    """samples.npz with all images. Finished batches wait as parts/FIRST.npy, so that none is drawn twice."""
    npz, parts = out / "samples.npz", out / "parts"
    if npz.exists():
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed after its last word
        return npz
    parts.mkdir(exist_ok=True)
    done = 0
    while (parts / f"{done:08d}.npy").exists():
        done += len(np.load(parts / f"{done:08d}.npy", mmap_mode="r", allow_pickle=False))
    with tqdm(total=config.sample.num_images, initial=done, desc="sampling", unit="image") as bar:
        for batch in generate.batches(config, process, params, mesh, done):
            with images.replacing(parts / f"{done:08d}.npy") as file:
                np.save(file, batch, allow_pickle=False)
            done += len(batch)
            bar.update(len(batch))
    index = np.arange(config.sample.num_images)
    images.write_npz(
        npz,
        (config.sample.num_images, *generate.image_shape(config)),
        (np.load(part, allow_pickle=False) for part in sorted(parts.glob("*.npy"))),
        generate.labels_of(config, index),
    )
    shutil.rmtree(parts)
    return npz


def film(out: pathlib.Path, config: Config, process: Process, params: Any) -> list[pathlib.Path]:
    """The first images on their way: x_t and the predicted x_0, as a strip and as an animation of both side by side."""
    index = np.arange(min(FILM_IMAGES, config.sample.num_images))
    keys, x = generate.start(config, jax.numpy.asarray(index))
    eps_fn = generate.eps_fn(config, params, generate.labels_of(config, index))
    _, path = samplers.trajectory(
        process.sampler, eps_fn, process.transitions, x, keys if process.sampler.stochastic else None
    )
    x_t, x_0 = (to_uint8(np.asarray(leaf)) for leaf in path)  # (S+1, B, ...), (S, B, ...)
    x_0 = np.concatenate([x_0, x_t[-1:]])  # beside the final image, itself
    at = lambda count: np.unique(np.linspace(0, len(x_t) - 1, count).round().astype(int))
    strip = [
        images.grid(np.concatenate(list(frames[at(FILM_COLUMNS)].swapaxes(0, 1))), len(at(FILM_COLUMNS)))
        for frames in (x_t, x_0)
    ]
    moving = [
        images.grid(np.stack([x_t[i], x_0[i]], axis=1).reshape(-1, *x.shape[1:]), columns=2) for i in at(FILM_FRAMES)
    ]
    return [
        write(out / "film.png", images.write_png, np.concatenate(strip)),
        write(out / "film.gif", images.write_gif, moving),
    ]


def write(path: pathlib.Path, writer: Any, content: Any) -> pathlib.Path:
    writer(path, content)
    return path


if __name__ == "__main__":
    cli.start(main, OPTIONS)
