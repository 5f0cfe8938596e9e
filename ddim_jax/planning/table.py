"""The table of a plan: whether a program fits, and the lower bound of its time."""

from __future__ import annotations

from typing import Any, NamedTuple

from ddim_jax.planning.reports import Report
from ddim_jax.utils.files import human_size


class Rates(NamedTuple):
    """The memory and the peak rates of one device. None: unknown."""

    memory: int | None  # bytes
    flops: float | None  # per second
    bandwidth: float | None  # bytes per second
    source: str = "the published peak"  # of the two rates
    caches: bool = False  # whether caches hold a part of the traffic, so that it bounds no time


class Row(NamedTuple):
    """One program on the devices."""

    program: str  # "train" or "sample"
    report: Report
    flops: float  # per device, for the whole program
    images: int  # of one execution, over all devices
    executions: int = 0  # of the recipe; 0 if there is no recipe
    seconds: float | None = None  # measured; None if nothing was executed


def fits(row: Row, rates: Rates) -> bool | None:
    """Whether the program fits into the memory of a device; None if its memory is not known."""
    if not row.report.compiled:
        return False
    return None if rates.memory is None else row.report.memory <= rates.memory


def bounds(row: Row, rates: Rates) -> tuple[float | None, float | None]:
    """The time of one execution in seconds at the rates, (of the operations, of the HBM traffic). At peak rates they
    are lower bounds.
    """
    moved = sum(row.report.traffic.values())
    return (
        row.flops / rates.flops if rates.flops and row.flops else None,
        moved / rates.bandwidth if rates.bandwidth and moved else None,
    )


def as_json(row: Row, rates: Rates) -> dict[str, Any]:
    """The numbers of a row, for a JSON file. None: unknown."""
    report = row.report
    operations, traffic = bounds(row, rates)
    valid = [operations] if rates.caches else [operations, traffic]
    bound = max((each for each in valid if each is not None), default=None) if report.compiled else None
    known = lambda value: value if report.compiled else None
    return {
        "program": row.program,
        "images": row.images,
        "fits": fits(row, rates),
        "memory_bytes": report.memory,
        "device_memory_bytes": rates.memory,
        "argument_bytes": report.arguments,
        "temporary_bytes": known(report.temporaries),
        "output_bytes": known(report.outputs),
        "code_bytes": known(report.code),
        "donated_bytes": known(report.donated),
        "collectives": {kind: {"count": each.count, "bytes": each.bytes} for kind, each in report.collectives.items()},
        "flops": row.flops,
        "hbm_bytes": known(sum(report.traffic.values())),
        "hbm_bytes_by_operation": report.traffic,
        "hbm_bytes_by_module": report.modules,
        "rates": rates.source,
        "operations_seconds": operations,
        "traffic_seconds": traffic,
        "bound_seconds": bound,
        "most_images_per_second": row.images / bound if bound else None,
        "least_hours_of_the_recipe": bound * row.executions / 3600 if bound and row.executions else None,
        "measured_seconds": row.seconds,
        "measured_images_per_second": row.images / row.seconds if row.seconds else None,
    }


def lines(rows: list[Row], rates: Rates) -> list[str]:
    """A Markdown table with one column per program."""
    values = [as_json(row, rates) for row in rows]
    size = lambda count: "unknown" if count is None else human_size(count)
    time = lambda seconds: "unknown" if seconds is None else f"{1000 * seconds:,.4g} ms"
    number = lambda value, form: "unknown" if value is None else format(value, form)
    yes = {True: "yes", False: "no", None: "unknown"}
    columns = {
        "images": lambda v: f"{v['images']:,}, over all devices",
        "fits": lambda v: yes[v["fits"]],
        "memory needed, of": lambda v: f"{size(v['memory_bytes'])} of {size(v['device_memory_bytes'])}",
        "arguments; of these donated": lambda v: f"{size(v['argument_bytes'])}; {size(v['donated_bytes'])}",
        "temporaries": lambda v: size(v["temporary_bytes"]),
        "further outputs": lambda v: size(v["output_bytes"]),
        "code": lambda v: size(v["code_bytes"]),
        "collectives": _collectives,
        "operations": lambda v: f"{v['flops'] / 1e12:,.4g} TFLOP",
        "HBM traffic": lambda v: size(v["hbm_bytes"]),
        "most of it in": _largest_modules,
        "time of the operations": lambda v: time(v["operations_seconds"]),
        "time of the HBM traffic": lambda v: time(v["traffic_seconds"]) + " without caches" * rates.caches,
        "lower bound of the time": lambda v: time(v["bound_seconds"]),
        "images/s, at most": lambda v: number(v["most_images_per_second"], ",.0f"),
        "hours of the recipe, at least": lambda v: (
            "" if v["program"] != "train" else number(v["least_hours_of_the_recipe"], ",.1f")
        ),
        "measured": lambda v: "nothing ran" if v["measured_seconds"] is None else _measured(v),
    }
    head = [
        f"| per device, times at {rates.source} | {' | '.join(row.program for row in rows)} |",
        "|---|" + "---|" * len(rows),
    ]
    return head + [f"| {name} | {' | '.join(show(value) for value in values)} |" for name, show in columns.items()]


def _collectives(values: dict[str, Any]) -> str:
    if values["hbm_bytes"] is None:
        return "unknown"
    each = [f"{v['count']} {kind} ({human_size(v['bytes'])})" for kind, v in values["collectives"].items()]
    return ", ".join(each) or "none"


def _largest_modules(values: dict[str, Any]) -> str:
    """The three modules with the most traffic."""
    total = sum(values["hbm_bytes_by_module"].values())
    largest = list(values["hbm_bytes_by_module"].items())[:3]
    return ", ".join(f"{name} {count / total:.0%}" for name, count in largest) or "unknown"


def _measured(values: dict[str, Any]) -> str:
    return f"{1000 * values['measured_seconds']:,.4g} ms, {values['measured_images_per_second']:,.4g} images/s"
