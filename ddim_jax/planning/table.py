"""The report of a plan: whether a program fits, the lower bound of its time, and the table."""

from __future__ import annotations

from typing import Any, NamedTuple

from ddim_jax.planning.programs import Report
from ddim_jax.utils.files import human_size


class Rates(NamedTuple):
    """The published peak of one device. None: unknown."""

    memory: int | None  # bytes
    flops: float | None  # per second
    bandwidth: float | None  # bytes per second


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
    if row.report.needed:
        return False
    return None if rates.memory is None else row.report.memory <= rates.memory


def bounds(row: Row, rates: Rates) -> tuple[float | None, float | None]:
    """The lower bounds of the time of one execution in seconds, (by operations, by HBM traffic), at the peak rates."""
    moved = sum(row.report.traffic.values())
    return (
        row.flops / rates.flops if rates.flops and row.flops else None,
        moved / rates.bandwidth if rates.bandwidth and moved else None,
    )


def as_json(row: Row, rates: Rates) -> dict[str, Any]:
    """The numbers of a row, for a JSON file."""
    operations, traffic = bounds(row, rates)
    bound = max((value for value in (operations, traffic) if value is not None), default=None)
    report = row.report
    return {
        "program": row.program,
        "fits": fits(row, rates),
        "memory_bytes": report.memory,
        "argument_bytes": report.arguments,
        "temporary_bytes": report.temporaries,
        "output_bytes": report.outputs,
        "donated_bytes": report.donated,
        "device_memory_bytes": rates.memory,
        "flops": row.flops,
        "hbm_bytes": sum(report.traffic.values()),
        "hbm_bytes_by_operation": report.traffic,
        "hbm_bytes_by_module": report.modules,
        "collectives": {kind: {"count": each.count, "bytes": each.bytes} for kind, each in report.collectives.items()},
        "bound_by_operations_seconds": operations,
        "bound_by_traffic_seconds": traffic,
        "most_images_per_second": row.images / bound if bound else None,
        "least_hours_of_the_recipe": bound * row.executions / 3600 if bound and row.executions else None,
        "measured_seconds": row.seconds,
    }


def lines(rows: list[Row], rates: Rates) -> list[str]:
    """A Markdown table with one column per program."""
    values = [as_json(row, rates) for row in rows]
    size = lambda count: "unknown" if count is None or count < 0 else human_size(count)
    time = lambda seconds: "unknown" if seconds is None else f"{1000 * seconds:.4g} ms"
    yes = {True: "yes", False: "no", None: "unknown"}
    columns = {
        "fits": lambda v: yes[v["fits"]],
        "memory of a device, needed of": lambda v: f"{size(v['memory_bytes'])} of {size(v['device_memory_bytes'])}",
        "arguments": lambda v: size(v["argument_bytes"]),
        "temporaries": lambda v: size(v["temporary_bytes"]),
        "outputs": lambda v: size(v["output_bytes"]),
        "donated arguments": lambda v: size(v["donated_bytes"]),
        "collectives": lambda v: (
            ", ".join(f"{each['count']} {kind} ({size(each['bytes'])})" for kind, each in v["collectives"].items())
            or "none"
        ),
        "operations": lambda v: f"{v['flops'] / 1e12:.4g} TFLOP",
        "HBM traffic": lambda v: size(v["hbm_bytes"]),
        "lower bound by operations": lambda v: time(v["bound_by_operations_seconds"]),
        "lower bound by HBM traffic": lambda v: time(v["bound_by_traffic_seconds"]),
        "measured": lambda v: "nothing ran" if v["measured_seconds"] is None else time(v["measured_seconds"]),
        "images/s, at most": lambda v: _number(v["most_images_per_second"], ",.0f"),
        "hours of the recipe, at least": lambda v: _number(v["least_hours_of_the_recipe"], ",.1f"),
    }
    head = [f"| per device | {' | '.join(row.program for row in rows)} |", "|---|" + "---|" * len(rows)]
    return head + [f"| {name} | {' | '.join(show(value) for value in values)} |" for name, show in columns.items()]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
