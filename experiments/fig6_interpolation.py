"""Figures 6 and 11 to 13: interpolation between two latents, and between four.

    python -m experiments.fig6_interpolation --config configs/digits.py --out DIR

Lines and a grid by slerp, between random latents (random_lines.png, random_grid.png) and between the latents of real
test images (encoded_lines.png, encoded_grid.png). `largest_jump` is the largest distance between neighbouring images of
a line, `ends` the mean distance between the two ends of a line. An interpolation is smooth if `largest_jump` is much
smaller than `ends`. For encoded latents, `reconstruction` is the distance between the corners of the grid and the real
images. All distances are root mean squares over pixels in [0, 1].
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import encode, latent, sampling
from ddim_jax.config import weights
from ddim_jax.data.scaling import to_uint8, to_unit
from ddim_jax.utils import files, images, output_folder, sharding
from experiments import common, grid
from experiments.common import Cell

CORNERS = 4
PICTURES = ("random_lines.png", "random_grid.png", "encoded_lines.png", "encoded_grid.png")

OPTIONS = common.OPTIONS | {
    "images": encode.OPTIONS["images"],
    "lines": ("6", "The number of lines."),
    "points": ("11", "The number of images of a line, including its ends."),
    "side": ("8", "The number of rows, and of columns, of the grid."),
}


def main(options: types.SimpleNamespace) -> None:
    config = encode.deterministic(options.config)
    (lines,) = common.ints("lines", options.lines)
    (points,), (side,) = (common.ints(name, getattr(options, name), least=2) for name in ("points", "side"))
    process = grid.process_of(config)
    ends = 2 * lines + CORNERS
    source, total = encode.load_images(options.images, str(ends), config)
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    pipeline, refine = config_lib.pipeline(config, trained.params, mesh, process), config.sample.refine
    depends = encode.fingerprint(config, process, trained, source, total)
    written = [*common.WRITTEN, *PICTURES]
    sizes = [lines, points, side]
    out = common.begin(options, written, experiment="fig6", **depends, seed=config.sample.seed, sizes=sizes)

    def in_batches(make: Callable[[np.ndarray, np.ndarray | None], np.ndarray], count: int) -> np.ndarray:
        """make(indices, labels) for 0 .. count - 1, batch by batch. All images have the same class, if any."""
        return np.concatenate(
            [
                make(np.minimum(index, count - 1), sampling.labels_of(pipeline, np.zeros_like(index)))[
                    : count - index[0]
                ]
                for index in sampling.batch_indices(pipeline.batch_size, mesh, 0, count)
            ]
        )

    def random() -> np.ndarray:
        return np.asarray(sampling.start(pipeline, np.arange(ends))[1])

    def encoded() -> np.ndarray:
        return in_batches(
            lambda index, labels: sampling.encode(pipeline, to_unit(source[index].images), labels, refine=refine), ends
        )

    def measure(latents: Callable[[], np.ndarray], folder: output_folder.Folder) -> dict[str, Any]:
        x_T = latents()
        on_lines = [latent.line(*x_T[2 * i : 2 * i + 2], points) for i in range(lines)]
        on_grid = latent.grid(x_T[2 * lines :], side, side).reshape(-1, *x_T.shape[1:])
        interpolated = np.concatenate([*on_lines, on_grid])
        decode = lambda index, labels: sampling.decode(pipeline, interpolated[index], labels)
        drawn = to_uint8(in_batches(decode, len(interpolated)))
        drawn_lines, drawn_grid = np.split(drawn, [lines * points])
        images.write_png(folder / "lines.png", images.grid(drawn_lines, points))
        images.write_png(folder / "grid.png", images.grid(drawn_grid, side))
        drawn_lines = drawn_lines.reshape(lines, points, *drawn.shape[1:])
        numbers = {
            "largest_jump": float(common.root_mean_square(drawn_lines[:, 1:], drawn_lines[:, :-1]).max()),
            "ends": float(common.root_mean_square(drawn_lines[:, 0], drawn_lines[:, -1]).mean()),
        }
        if latents is encoded:
            corners = drawn_grid[[0, side - 1, side * (side - 1), side**2 - 1]]
            real = source[np.arange(2 * lines, ends)].images
            numbers["reconstruction"] = float(common.root_mean_square(corners, real).mean())
        return numbers

    kinds = (random, encoded)
    rows = common.run(
        out, [Cell({"latents": kind.__name__}, {}, 1, functools.partial(measure, kind)) for kind in kinds]
    )
    common.write_table(out, rows, S=len(process.tau) - 1, source=trained.source)
    for name in PICTURES:
        kind, _, file = name.partition("_")
        with files.replacing(out / name) as copy:
            copy.write((out / common.folder_of({"latents": kind}) / file).read_bytes())
    head = ["latents", "largest jump", "distance of the ends", "corners to the real images"]
    body = [[row.get(name) for name in ("latents", "largest_jump", "ends", "reconstruction")] for row in rows]
    common.finish(out, common.markdown(head, body), ["table.csv", "table.json", "table.md", *PICTURES])


if __name__ == "__main__":
    common.start(main, OPTIONS)
