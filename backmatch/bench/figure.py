"""``bench.png``: time and GF/s against n, ours and the peers, with both limits of the machine."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

from .case import OURS
from .measure import Row

# Okabe and Ito's palette: told apart with every common colour vision; markers differ as well.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
_GREY = "#6E6E6E"
_TITLES = {
    "spd_solve": "spd_solve",
    "scaled_gram": "scaled_gram_solve, half active",
    "weighted_gram": "weighted_gram, half of the weights zero",
}
_RC: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw(rows: Sequence[Row]) -> bytes | None:
    """The figure as a PNG, ``None`` if nothing was measured against n or no case has a ratio.

    One column per kernel in the first dtype: time per system above, arithmetic rate below. Runs
    without kernels get bars of the ratios instead.
    """
    curves = {name: chosen for name in _TITLES if (chosen := _curve(rows, name))}
    timed = [row for row in rows if row.get("ratios")]
    if not curves and not timed:
        return None
    with matplotlib.style.context(["default", _RC]):  # whatever the user's own file says
        figure = _curves(curves) if curves else _points_only(timed)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _curve(rows: Sequence[Row], question: str) -> list[Row]:
    """The timed rows of one kernel, one dtype, by n."""
    found = [row for row in rows if row["question"] == question and "times" in row]
    found = [row for row in found if row["case"].get("slopes", "relu") == "relu"]
    if not found:
        return []
    dtype = found[0]["case"]["dtype"]
    found = [row for row in found if row["case"]["dtype"] == dtype]
    return sorted(found, key=lambda row: int(row["case"]["n"]))


def _curves(curves: dict[str, list[Row]]) -> Figure:
    figure = Figure(figsize=(1 + 3.9 * len(curves), 6.2), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, rows) in enumerate(curves.items()):
        upper, lower = grid[0][column], grid[1][column]
        upper.set_title(f"{_TITLES[name]}, {rows[0]['case']['dtype']}", fontsize=10)
        peers = dict.fromkeys(peer for row in rows for peer in row["ratios"])
        for (color, marker), peer in zip(_STYLES, (OURS, *peers), strict=False):
            style = {"color": color, "marker": marker, "markersize": 4.5}
            style["linewidth"] = 2.2 if peer == OURS else 1.2
            upper.plot(*_points(rows, peer, _microseconds), label=peer, **style)
            lower.plot(*_points(rows, peer, _gflops), label=peer, **style)
        _limits(lower, rows)
        for axes in (upper, lower):
            _scale(axes, [int(row["case"]["n"]) for row in rows])
        upper.legend(frameon=False, fontsize=9)
        if column == 0:
            upper.set_ylabel("time per system (µs)")
            lower.set_ylabel("GF/s")
        lower.set_xlabel("n")
    return figure


def _points(rows: Sequence[Row], name: str, value: Any) -> tuple[list[int], list[float]]:
    timed = [row for row in rows if name in row["times"]]
    return [row["case"]["n"] for row in timed], [value(row, name) for row in timed]


def _microseconds(row: Row, name: str) -> float:
    return 1e6 * float(row["times"][name]["median_seconds"]) / int(row["case"]["batch"])


def _gflops(row: Row, name: str) -> float:
    return float(row["gflops"][name])


def _limits(axes: Any, rows: Sequence[Row]) -> None:
    """The FMA loop's rate, and what a copy's rate would allow if memory alone counted."""
    sizes = [row["case"]["n"] for row in rows]
    fma = [row["fma_gflops"] for row in rows]
    copy = [row["copy_gbytes_per_second"] * row["flops"] / row["bytes"] for row in rows]
    axes.plot(sizes, fma, color=_GREY, linewidth=1, linestyle="--", label="FMA loop")
    below = [min(c, f) for c, f in zip(copy, fma, strict=True)]
    if any(c < f for c, f in zip(copy, fma, strict=True)):
        axes.plot(sizes, below, color=_GREY, linewidth=1, linestyle=":", label="at copy rate")
    handles, labels = axes.get_legend_handles_labels()
    kept = [
        (h, n) for h, n in zip(handles, labels, strict=True) if n in ("FMA loop", "at copy rate")
    ]
    axes.legend(*zip(*kept, strict=True), frameon=False, fontsize=9)


def _scale(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=12))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)


def _points_only(rows: Sequence[Row]) -> Figure:
    """Time of every candidate on one line per case."""
    figure = Figure(figsize=(8.6, 1.3 + 0.5 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for row in rows for name in row["times"])
    for (color, marker), name in zip(itertools.cycle(_STYLES), names, strict=False):
        at = [i for i, row in enumerate(rows) if name in row["times"]]
        times = [1e3 * float(rows[i]["times"][name]["median_seconds"]) for i in at]
        size = 9 if name == OURS else 6.5
        axes.plot(times, at, marker, color=color, markersize=size, linestyle="", label=name)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("time of one call (ms)")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(6, len(names)), frameon=False, fontsize=9)
    return figure


def _label(row: Row) -> str:
    values = [str(value) for key, value in row["case"].items() if key != "dtype"]
    return ", ".join([row["question"], *values])
