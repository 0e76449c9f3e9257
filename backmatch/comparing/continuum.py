"""The lower half of ``compare.png``: accuracy and cost of every method, the continuum in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import NullFormatter, StrMethodFormatter

from .axes import BLACK, BLUE, GREY, ORANGE, accuracy_axis, least_error
from .methods import find
from .table import row_of


def draw(accuracy: Any, cost: Any, result: Mapping[str, Any]) -> None:
    """Accuracy after the first and the last reported epoch, and milliseconds per step.

    Args:
        accuracy: the upper axes.
        cost: the lower axes, on the same x.
        result: the content of ``compare.json``.
    """
    names = [row["name"] for row in result["methods"]]
    on = sorted(
        (name for name in names if find(name).place is not None),
        key=lambda name: find(name).place or 0,
    )
    beside = [name for name in names if name not in on]
    at = {name: float(place) for place, name in enumerate(on)}
    at |= {name: len(on) + 0.4 + place for place, name in enumerate(beside)}
    least = least_error(result)
    epochs = [str(epoch) for epoch in result["options"]["report_epochs"]]
    looks = {epochs[0]: (ORANGE, "o"), epochs[-1]: (BLUE, "s")}
    for epoch, (color, marker) in looks.items():
        spreads = {n: row_of(result, n)["summary"]["accuracy"][epoch] for n in at}
        _draw_errors(accuracy, at, on, spreads, least, (color, marker, f"after epoch {epoch}"))
    times = {n: row_of(result, n)["summary"]["step_ms"] for n in at}
    _draw_cost(cost, at, on, times)
    accuracy_axis(accuracy, result, least, most_ticks=9)
    accuracy.set_ylabel("test accuracy (%)")
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    accuracy.legend(frameon=False, fontsize=8.5, ncols=2, **place)
    cost.set_ylabel("ms per step")
    cost.set_xticks(list(at.values()), [_label(result, name) for name in at], fontsize=8)
    cost.set_xlim(-0.5, max(at.values()) + 0.5)
    for axes in (accuracy, cost):
        if on and beside:
            axes.axvline(len(on) - 0.3, color=GREY, linewidth=0.8)
    parts = {-0.5: "the continuum from back-propagation to exact", len(on) - 0.3: "beside it"}
    for (left, text), shown in zip(parts.items(), (len(on) > 1, on and beside), strict=True):
        if shown:
            height = accuracy.get_xaxis_transform()
            accuracy.text(left, 1.03, f" {text}", transform=height, fontsize=9)


def _label(result: Mapping[str, Any], name: str) -> str:
    row = row_of(result, name)
    return f"{name.replace('-', '-' + chr(10), 1) if len(name) > 8 else name}\nlr {row['lr']:g}"


def _draw_errors(
    axes: Any,
    at: Mapping[str, float],
    on: Sequence[str],
    spreads: Mapping[str, Mapping[str, Any]],
    least: float,
    look: tuple[str, str, str],
) -> None:
    color, marker, label = look
    there = [name for name in at if spreads[name]["mean"] is not None]
    middle = {name: max(1 - spreads[name]["mean"], least) for name in there}
    # Half a sample is the end of the axis: a bar that would pass it ends there.
    bars: list[list[float]] = [[], []]
    for name in there:
        error, deviation = 1 - spreads[name]["mean"], spreads[name]["sd"] or 0.0
        bars[0].append(100 * (middle[name] - max(error - deviation, least)))
        bars[1].append(100 * max(error + deviation - middle[name], 0.0))
    axes.errorbar(
        [at[name] for name in there],
        [100 * middle[name] for name in there],
        yerr=bars,
        color=color,
        marker=marker,
        linestyle="",
        markersize=5.5,
        capsize=2.5,
        elinewidth=1,
        label=label,
    )
    row = [name for name in on if name in there]
    axes.plot([at[n] for n in row], [100 * middle[n] for n in row], color=color, linewidth=1.4)


def _draw_cost(
    axes: Any,
    at: Mapping[str, float],
    on: Sequence[str],
    times: Mapping[str, Mapping[str, Any]],
) -> None:
    there = [name for name in at if times[name]["mean"] is not None]
    axes.plot(
        [at[name] for name in there],
        [times[name]["mean"] for name in there],
        color=GREY,
        marker="D",
        markersize=5,
        linestyle="",
    )
    row = [name for name in on if name in there]
    axes.plot([at[n] for n in row], [times[n]["mean"] for n in row], color=GREY, linewidth=1.4)
    for name in there:
        mean = times[name]["mean"]
        axes.annotate(
            f"{mean:.3g}",
            (at[name], mean),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=BLACK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.25)
    axes.grid(color="#E3E3E3", linewidth=0.6)
