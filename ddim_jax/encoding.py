"""Encodes real images into latents, decodes the latents, and writes both to an output folder (section 5.4)."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ddim_jax import data, sampling
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.sampling import Pipeline
from ddim_jax.utils import images, output_arrays, output_folder, output_parts
from ddim_jax.utils.errors import error_context

CHUNK = 500  # images that are read at once


def round_trip(
    out: output_folder.Folder, pipeline: Pipeline, source: data.Source, total: int, refine: int
) -> tuple[pathlib.Path, pathlib.Path]:
    """Encodes the first `total` images of the source into `out/latents.npz`, and decodes these latents into
    `out/reconstructions.npz`. Existing results are verified and not recomputed. refine: see `sampling.encode`. Returns
    the paths of the two files.
    """
    results = {
        "latents.npz": output_arrays.Arrays(total, "--count", {"latents": (pipeline.shape, "float32")}),
        "reconstructions.npz": output_arrays.Arrays(
            total, "--count", {"arr_0": (pipeline.shape, "uint8"), "error": ((), "float64")}
        ),
    }

    def real(index: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Images in [-1, 1], and their classes for a class-conditional network."""
        with error_context("--images"):
            pixels, labels = sampling.real_batch(pipeline, source, index, total)
        return to_unit(pixels), labels

    def indices(first: int) -> Iterator[np.ndarray]:
        return sampling.batch_indices(pipeline.batch_size, pipeline.mesh, first, total)

    def encoded(first: int) -> Iterator[dict[str, np.ndarray]]:
        for index in indices(first):
            x_T = sampling.encode(pipeline, *real(index), first=index[0], refine=refine)
            yield {"latents": x_T[: total - index[0]]}

    def decoded(first: int) -> Iterator[dict[str, np.ndarray]]:
        stored = images.open_npz(latents)["latents"]
        for index in indices(first):
            x_0, labels = real(index)
            x_T = stored[np.minimum(index, total - 1)]
            reconstructed = sampling.decode(pipeline, x_T, labels, first=index[0])
            error = np.square((reconstructed - x_0) / 2, dtype=np.float64).mean((1, 2, 3))
            valid = slice(total - index[0])
            yield {"arr_0": to_uint8(reconstructed[valid]), "error": error[valid]}

    output_parts.check_room(out, results)
    computed_with = sampling.computed_with(pipeline, total)
    gather = lambda name, batches, task: output_parts.gather(out, name, results[name], batches, task, computed_with)
    latents = gather("latents.npz", encoded, "encoding")
    return latents, gather("reconstructions.npz", decoded, "decoding")


def digests_of(source: data.Source, total: int, with_labels: bool) -> dict[str, str]:
    """Two SHA-256 digests of the first `total` images of a source. `all_images` covers all of them, and their classes
    if with_labels is True. `images` covers 1000 of them, evenly spaced: it is the only digest that earlier versions
    recorded.
    """
    all_digest, subset_digest = hashlib.sha256(), hashlib.sha256()
    subset = np.unique(np.linspace(0, total - 1, 1000).astype(int))
    with error_context("--images"):
        for begin in range(0, total, CHUNK):
            index = np.arange(begin, min(begin + CHUNK, total))
            batch = source[index]
            all_digest.update(np.ascontiguousarray(batch.images).data)
            if with_labels and batch.labels is not None:
                all_digest.update(np.ascontiguousarray(batch.labels).data)
            subset_digest.update(batch.images[np.isin(index, subset)].tobytes())
    return {"images": subset_digest.hexdigest(), "all_images": all_digest.hexdigest()}


def make_report(latents: pathlib.Path, reconstructions: pathlib.Path, steps: int) -> dict[str, Any]:
    """The mean and the maximum of the reconstruction errors, and the mean and the standard deviation of the latents,
    which are those of N(0, I) for a perfect encoder. It is computed in float64, and reads one latent at a time.
    """
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
