"""The tables that ``backmatch bench`` prints: at most 100 columns, plain when piped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

try:
    import rich.box
    import rich.console
    import rich.table
except ImportError:  # an extra: without it a terminal gets the plain tables
    _HAS_RICH = False
else:
    _HAS_RICH = True

from ..training.progress import say
from .measure import Row

WIDTH = 100
_SHORT = {"float32": "f32", "float64": "f64", "back-propagation": "back-prop"}
_MIB = 2**20


def legend() -> list[str]:
    """What the columns mean."""
    return [
        "ours: one call on the whole batch; under a peer's name: its time over ours",
        "/FMA, /copy: fractions of a multiply-add loop's and a copy's rate, measured in turn",
        "error: worst scaled residual of our answer (step, peers: relative difference)",
    ]


def show(question: str, rows: Sequence[Row]) -> None:
    """Print the tables of one question, one for each axis of scaling, and the remarks on it."""
    for axis in dict.fromkeys(row["case"].get("over") for row in rows):
        _print(*table(question, [row for row in rows if row["case"].get("over") == axis]))
    for remark in remarks(rows):
        say("  " + remark)


def _print(heading: str, columns: list[str], lines: list[list[str]]) -> None:
    say("")
    say(heading)
    if not (_HAS_RICH and sys.stdout.isatty()):
        for text in aligned([columns, *lines]):
            say(text)
        return
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in columns:
        grid.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        grid.add_row(*line)
    rich.console.Console(width=WIDTH, highlight=False).print(grid)


def table(question: str, rows: Sequence[Row]) -> tuple[str, list[str], list[list[str]]]:
    """Heading, column names and cells; what is the same in all rows stands in the heading."""
    keys = list(dict.fromkeys(key for row in rows for key in row["case"]))
    varying = [key for key in keys if len({str(row["case"].get(key)) for row in rows}) > 1]
    fixed = [f"{key} {rows[0]['case'][key]}" for key in keys if key not in varying]
    peers = list(
        dict.fromkeys(name for row in rows for name in (*row.get("ratios", ()), *row["failed"]))
    )
    columns = [*varying, "ours", *(_SHORT.get(name, name) for name in peers)]
    columns += ["GF/s", "/FMA", "/copy", "error"]
    lines = [
        [
            *(_short(row["case"].get(key, "")) for key in varying),
            *_results(row, peers),
        ]
        for row in rows
    ]
    used = [i for i in range(len(columns)) if any(line[i] not in ("", "-") for line in lines)]
    heading = question + (f" ({', '.join(fixed)})" if fixed else "")
    return heading, [columns[i] for i in used], [[line[i] for i in used] for line in lines]


def _results(row: Row, peers: Iterable[str]) -> list[str]:
    if "error" in row:
        return ["WRONG", *("-" for _ in peers), "-", "-", "-", "-"]
    ours = row["ours"]
    return [
        seconds(row["times"][ours]["median_seconds"]),
        *(_ratio(row, name) for name in peers),
        _figure(row.get("gflops", {}).get(ours), "{:.1f}"),
        _figure(row.get("fraction_of_fma"), "{:.2f}"),
        _figure(row.get("fraction_of_copy"), "{:.2f}"),
        _figure(row["worst_scaled_residual"][ours], "{:.1e}"),
    ]


def _ratio(row: Row, name: str) -> str:
    if name in row["failed"]:
        return "failed"
    value = row["ratios"].get(name)
    return "-" if value is None else ratio(value)


def ratio(value: float) -> str:
    """Three digits at most: ``0.08``, ``1.3``, ``24``.

    >>> ratio(0.0834), ratio(1.26), ratio(24.4)
    ('0.083', '1.3', '24')
    """
    if value < 1:
        return f"{value:.2g}"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def seconds(value: float) -> str:
    """A time in the unit that suits it.

    >>> seconds(3.21e-6), seconds(0.0452), seconds(2.5)
    ('3.21 us', '45.2 ms', '2.5 s')
    """
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if value < 1000 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table leaves out: wrong answers, failures, fewer repeats, slices, memory."""
    lines = []
    failures: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            where = ", ".join(f"{key} {value}" for key, value in row["case"].items())
            lines.append(f"WRONG, not timed: {where}: {row['error']}")
        for name, why in row["failed"].items():
            failures.setdefault(name, []).append(why)
    for name, reasons in failures.items():
        lines.append(f"failed: {name} in {len(reasons)} of {len(rows)} cases: {reasons[0]}")
    lines += [_peaks(row) for row in rows if "tensor_peak_bytes" in row]
    lines.append(_repeats(rows))
    return [line[: WIDTH - 4] + ".." if len(line) > WIDTH - 2 else line for line in lines if line]


def _peaks(row: Row) -> str:
    found = row.get("process_peak_bytes", {})
    found = {name: found.get(name) or size for name, size in row["tensor_peak_bytes"].items()}
    if "batch_m_n_bytes" in row:
        found["batch x m x n"] = row["batch_m_n_bytes"]
    sizes = ", ".join(f"{name} {size / _MIB:.0f}" for name, size in found.items())
    return f"peak MiB, n {row['case']['n']}, {_short(row['case']['dtype'])}: {sizes}"


def _repeats(rows: Sequence[Row]) -> str:
    ours = [row["times"][row["ours"]]["repeats"] for row in rows if "times" in row]
    others = [
        entry for row in rows for name, entry in row.get("times", {}).items() if name != row["ours"]
    ]
    if not ours:
        return ""
    text = f"medians of {_range(ours)} repeats"
    if others:
        text += f", of peers {_range([entry['repeats'] for entry in others])}"
    sliced = [
        row["case"].get("batch") != entry["systems_timed"]
        for row in rows
        for entry in row.get("times", {}).values()
        if "systems_timed" in entry
    ]
    return text + ("; slow peers on a slice of the batch, scaled" if any(sliced) else "")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Right-aligned columns, two spaces between them."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _short(value: Any) -> str:
    return _SHORT.get(str(value), str(value))


def summary(machine: Mapping[str, Any]) -> str:
    """One line on where a result was measured."""
    place = machine.get("gpu", machine["cpu"])
    return (
        f"{machine['date']}, {place}, threads {machine['threads']}, SIMD {machine['simd']}, "
        f"torch {machine['torch']}, Python {machine['python']}"
    )
