"""Table 1: sample quality over eta and S, and over any further field of the config. A preset of `ablation`.

    python -m experiments.table1_fid --config configs/digits.py --out DIR --steps 10,20,50,100
    python -m experiments.table1_fid --config configs/cifar10.py --config.pretrained=google/ddpm-cifar10-32 --out DIR
    python -m experiments.table1_fid ... --etas 0,0.5 --sweep sample.tau=uniform,quadratic --sweep sample.seed=0,1

Every cell draws config.evaluate.num_images images and computes config.evaluate.metrics. The first metric fills the
printed table; table.csv has all metrics. Where the paper reports a FID, the table also has the paper's value and the
difference.

An interrupted command resumes with the batch that it was drawing. A later command with the same --out adds its cells.
The images of a cell are deleted after the evaluation, unless --keep_samples is given. table.png keeps the first ones.
"""

from __future__ import annotations

from ddim_jax.utils import interrupts

if __name__ == "__main__":
    interrupts.install()

import types
from collections.abc import Mapping
from typing import Any

from ddim_jax.utils import images
from experiments import ablation, common, grid, paper

OPTIONS = grid.OPTIONS | ablation.EVALUATION


def main(options: types.SimpleNamespace) -> None:
    config = options.config
    places = grid.places(options.etas, options.steps, options.sweep)
    axes = list(places[0])
    done = ablation.fill(
        options,
        places,
        [grid.at(options, place, config.evaluate.num_images) for place in places],
        experiment="table1_fid",
        written=[*common.WRITTEN, "reference.npz"],
        sample=grid.fixed(config, axes),
    )
    table = paper.fid_of(config.name) if config.evaluate.features == "inception" else {}
    rows = [with_paper_values(row, table) for row in done.rows]
    common.write_table(
        done.out, rows, metrics=done.evaluator.metrics, real=done.real, features=done.evaluator.network.name
    )
    images.write_png(done.out / "table.png", grid.picture(rows, axes, done.out))
    common.finish(done.out, text(rows, axes, done.real))


def with_paper_values(row: dict[str, Any], table: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """The row, with the paper's FID and the difference to it if the paper has one."""
    value = table.get((row.get("eta"), row["S"]))
    return row if value is None or "fid" not in row else {**row, "paper": value, "difference": row["fid"] - value}


def text(rows: list[dict[str, Any]], axes: list[str], real: dict[str, Any] | None) -> str:
    """The Markdown table of the first metric, with the paper's value and the difference in brackets."""
    main_number = next(name for name in rows[0] if name not in axes)
    lines, columns, cells = grid.laid_out(rows, axes)

    has_paper = main_number == "fid" and any("paper" in row for row in rows)

    def formatted(row):
        if row is None:
            return None
        comparison = f" ({row['paper']:g}, {row['difference']:+.2f})" if has_paper and "paper" in row else ""
        return f"{row[main_number]:.4g}{comparison}"

    table = common.markdown(
        [main_number + " (the paper's, difference)" * has_paper, *(f"S = {column}" for column in columns)],
        [[line, *map(formatted, row)] for line, row in zip(lines, cells, strict=True)],
    )
    if has_paper and rows[0]["images"] < paper.IMAGES:
        table += f"\nOf {rows[0]['images']} images each; the paper has {paper.IMAGES}. Fewer images increase FID.\n"
    if real is not None:
        table += "\n" + ablation.line_of_real_images(real, [main_number])
    return table


if __name__ == "__main__":
    common.start(main, OPTIONS, may_be_empty=grid.MAY_BE_EMPTY)
