"""Figures 3 and 5: sample consistency, that is how far x_T determines the image, over eta and S.

    python -m experiments.fig3_fig5_consistency --config configs/digits.py --out DIR

For each eta, an image of S steps is compared with its twin: the image that the largest S gives from the same x_T. The
table has the distance to the twin, the distance to the images from other x_T, and the fraction of images whose nearest
neighbour is their twin. Distances are root mean squares over pixels in [0, 1].
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
    "steps": (",".join(map(str, paper.STEPS)), "The columns: values of S. All are compared with the largest one."),
    "count": ("100", "The number of x_T."),
}


def main(options: types.SimpleNamespace) -> None:
    config, (count,) = options.config, common.ints("count", options.count, least=2)
    places = grid.places(options.etas, options.steps)
    if not options.etas or len({place["S"] for place in places}) < 2:
        raise ConfigError("--etas must have a value, and --steps two values, the largest of which is the reference")
    cells = [grid.at(options, place, count) for place in places]
    processes = [grid.process_of(cell) for cell in cells]
    mesh = sharding.data_mesh()
    trained = weights.find(config, options.workdir, mesh)
    out = common.begin(
        options, experiment="fig3_fig5", weights=trained.digest, count=count, sample=grid.fixed(config, ("eta", "S"))
    )

    def measure(cell: Config, process: SamplingProcess, folder: output_folder.Folder) -> dict[str, Any]:
        pipeline = config_lib.pipeline(cell, trained.params, mesh, process)
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
    most = {row["eta"]: row["S"] for row in rows}  # rows are sorted by S
    rows = [
        {**row, **consistency(drawn(row["eta"], row["S"]), drawn(row["eta"], most[row["eta"]]))}
        for row in rows
        if row["S"] != most[row["eta"]]
    ]
    common.write_table(out, rows, compared_with=most, source=trained.source)
    pictured = [*rows, *({"eta": eta, "S": S} for eta, S in most.items())]
    pictured.sort(key=lambda row: list(most).index(row["eta"]))
    images.write_png(out / "table.png", grid.picture(pictured, ["eta", "S"], out))
    head = ["eta", "S", "to its twin", "to others", "quotient", "twin is nearest"]
    lines = [[row[name] for name in ("eta", "S", "twin", "others", "quotient", "recognised")] for row in rows]
    lines.sort(key=lambda line: list(most).index(line[0]))
    common.finish(out, common.markdown(head, lines))


def consistency(few: np.ndarray, many: np.ndarray) -> dict[str, float]:
    """Compares images (N, H, W, C) of few steps with those of many steps from the same N latents, N at least 2.

    twin: mean distance between two images from the same x_T. others: mean distance between two images from different
    x_T. quotient: twin / others. recognised: fraction of images whose nearest image of many steps is their twin.
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
