"""Figures 3 and 5: images from one x_T over eta and S, and how much of the image x_T decides.

    python -m experiments.fig3_fig5_consistency --config configs/digits.py --out DIR

For each eta, images of S steps are compared with those of the most steps from the same x_T: their distance, against the
distance between images from different x_T, and the share of images that are nearer to their own twin than to any
other. Distances are root mean squares over pixels in [0, 1].
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import functools
import types
from typing import Any

import numpy as np

from ddim_jax import config as config_lib
from ddim_jax import sample
from ddim_jax.config import Config, weights
from ddim_jax.samplers import SamplingProcess
from ddim_jax.utils import images, output_folder, sharding
from ddim_jax.utils.errors import ConfigError
from experiments import common, grid, paper
from experiments.common import Cell

PICTURED = 8

OPTIONS = common.OPTIONS | {
    "etas": ("0,0.5,1", grid.OPTIONS["etas"][1]),
    "steps": (",".join(map(str, paper.STEPS)), "The columns: values of S. All are compared with the largest."),
    "count": ("100", "How many x_T."),
}


def main(options: types.SimpleNamespace) -> None:
    config, (count,) = options.config, common.ints("count", options.count, least=2)
    places = grid.places(options.etas, options.steps)
    if not options.etas or len({place["S"] for place in places}) < 2:
        raise ConfigError("--etas needs a value, and --steps two: the images of fewer steps are compared with the most")
    cells = [grid.at(options, place, count) for place in places]
    processes = [grid.process_of(cell) for cell in cells]
    mesh = sharding.data_mesh()
    found = weights.find(config, options.workdir, mesh)
    out = common.begin(
        options, experiment="fig3_fig5", weights=found.digest, count=count, sample=grid.fixed(config, ("eta", "S"))
    )

    def measure(cell: Config, process: SamplingProcess, folder: output_folder.Folder) -> dict[str, Any]:
        pipeline = config_lib.pipeline(cell, found.params, mesh, process)
        drawn = images.open_npz(sample.draw_all(folder, pipeline, cell.sample.num_images))["arr_0"]
        images.write_png(folder / "first.png", images.grid(drawn[:PICTURED], PICTURED))
        return {"images": count}

    rows = common.run(
        out,
        [
            Cell(
                place,
                grid.depends_on(cell, process),
                len(process.tau) - 1,
                functools.partial(measure, cell, process),
            )
            for place, cell, process in zip(places, cells, processes, strict=True)
        ],
    )
    drawn = lambda eta, S: images.open_npz(out / common.folder_of({"eta": eta, "S": S}) / "samples.npz")["arr_0"]
    most = {row["eta"]: row["S"] for row in rows}  # rows ascend in S
    rows = [
        {**row, **consistency(drawn(row["eta"], row["S"]), drawn(row["eta"], most[row["eta"]]))}
        for row in rows
        if row["S"] != most[row["eta"]]
    ]
    common.write_table(out, rows, compared_with=most, source=found.source)
    shown = [*rows, *({"eta": eta, "S": S} for eta, S in most.items())]
    shown.sort(key=lambda row: list(most).index(row["eta"]))
    images.write_png(out / "table.png", grid.picture(shown, ["eta", "S"], out))
    head = ["eta", "S", "to its twin", "to others", "quotient", "twin is nearest"]
    lines = [[row[name] for name in ("eta", "S", "twin", "others", "quotient", "recognised")] for row in rows]
    lines.sort(key=lambda line: list(most).index(line[0]))
    common.finish(out, common.markdown(head, lines))


def consistency(few: np.ndarray, many: np.ndarray) -> dict[str, float]:
    """How images (N, H, W, C) of few steps agree with those of many steps from the same N latents, N at least 2.

    twin: mean distance of an image to the one of many steps from the same x_T; others: to those from the others;
    quotient: of the two; recognised: share of images to which their twin is the nearest.
    """
    distances = np.stack([common.root_mean_square(image, many) for image in few])  # (N, N)
    twin = np.diag(distances)
    others = (distances.sum() - twin.sum()) / (distances.size - len(distances))
    return {
        "twin": float(twin.mean()),
        "others": float(others),
        "quotient": float(twin.mean() / others),
        "recognised": float((distances.argmin(axis=1) == np.arange(len(distances))).mean()),
    }


if __name__ == "__main__":
    common.start(main, OPTIONS)
