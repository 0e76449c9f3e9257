"""``compare.png``: the ways to an accuracy, and the continuum from back-propagation to exact."""

from __future__ import annotations

import io
import statistics
import textwrap
from collections.abc import Mapping
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import StrMethodFormatter

from ..plotting.style import plain
from . import continuum, summary
from .axes import BLACK, GREY, ORANGE, accuracy_axis, least_error
from .methods import find
from .table import title

_VERMILION = "#D55E00"
#: Beside the continuum; a method has its colour in every figure.
_BESIDE = {
    "bp-momentum": "#9A9A9A",
    "bp-adam": GREY,
    "layerwise-adaptive": "#B39DDB",
    "scale-amended": "#6A51A3",
    "scalar": ORANGE,
    "foof": "#8C510A",
    "exact-weights": "#009E73",
    "exact-inputs": "#CC79A7",
    "layer-inverse": "#6B7A00",
    "exact-undamped": "#A50026",
}
#: From few to many steps of conjugate gradient: one hue, darker and darker.
_CG = ("#A6CEE8", "#6FB1DC", "#3A8FC8", "#0F6BA8", "#084F80", "#05365A")
_DASHES = {"bp-momentum": ":", "bp-adam": "-."}
_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}

Style = dict[str, Any]


def draw(result: Mapping[str, Any]) -> bytes:
    """The figure as a PNG, 1650 x 1350 pixels; the same result gives the same bytes.

    Above, mean test accuracy against steps and against seconds of steps; below, every method's
    accuracy and cost per step, those of the continuum in a row and the others beside them. The
    axes of accuracy are logarithmic in the error, so that 98 % and 99 % are as far apart as 80 %
    and 90 %.

    Args:
        result: the content of ``compare.json``.
    """
    styles = _styles(result)
    with matplotlib.style.context(["default", _RC]):  # whatever the user's own file says
        figure = Figure(figsize=(11, 9), dpi=150, layout="constrained")
        figure.suptitle(_headline(result), fontsize=10)
        rows: Any = figure.subfigures(2, 1, height_ratios=(1.12, 1))
        by_step, by_second = rows[0].subplots(1, 2, sharey=True)
        accuracy, cost = rows[1].subplots(2, 1, sharex=True, height_ratios=(1.7, 1))
        curves = {row["name"]: curve(result, row["name"]) for row in result["methods"]}
        _draw_curves(by_step, result, curves, styles, seconds=False)
        _draw_curves(by_second, result, curves, styles, seconds=True)
        _draw_legend(rows[0], result, curves, styles)
        continuum.draw(accuracy, cost, result)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def curve(result: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    """Steps, mean seconds and mean accuracy over the seeds, those that diverged left out.

    ``low`` and ``high`` are the mean minus and plus one standard deviation.
    """
    runs = [run for run in summary.of(result["runs"], name) if run["error"] is None]
    columns = list(zip(*(run["accuracy"] for run in runs), strict=True))
    times = list(zip(*(run["training_seconds"] for run in runs), strict=True))
    means = [statistics.fmean(column) for column in columns]
    deviations = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    return {
        "steps": list(runs[0]["steps"]) if runs else [],
        "seconds": [statistics.fmean(column) for column in times],
        "mean": means,
        "low": [mean - sd for mean, sd in zip(means, deviations, strict=True)],
        "high": [mean + sd for mean, sd in zip(means, deviations, strict=True)],
    }


def _headline(result: Mapping[str, Any]) -> str:
    """Two lines where a path or a net is long; a file may be called $x$."""
    text = f"{plain(title(result), 300)}: mean over {_seeds(result)}"
    return textwrap.fill(text, 130).replace("$", r"\$")


def _seeds(result: Mapping[str, Any]) -> str:
    count = len(result["options"]["seeds"])
    return "1 seed" if count == 1 else f"{count} seeds, bands and bars: one standard deviation"


def _styles(result: Mapping[str, Any]) -> dict[str, Style]:
    """Colour, width and dashes per method: the continuum's ends stand out, steps of CG are blue."""
    names = [row["name"] for row in result["methods"]]
    steps = [name for name in names if name.startswith("cg-")]
    steps.sort(key=lambda name: find(name).place or 0)
    styles: dict[str, Style] = {}
    for name in names:
        width = 1.2
        if name == "exact":
            color, width = _VERMILION, 2.6
        elif name == "bp-sgd":
            color, width = BLACK, 2.2
        elif name in steps:
            place = (steps.index(name) + 1) / (len(steps) + 1)
            color = _CG[round(place * (len(_CG) - 1))]
        else:
            color = _BESIDE[name]
        on_the_way = find(name).place is not None
        dashes = "-" if on_the_way else _DASHES.get(name, "--")
        styles[name] = {"color": color, "linewidth": width, "linestyle": dashes}
    return styles


def _draw_curves(
    axes: Any,
    result: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, list[float]]],
    styles: Mapping[str, Style],
    *,
    seconds: bool,
) -> None:
    least = least_error(result)
    for name, found in curves.items():
        at = found["seconds"] if seconds else found["steps"]
        # A logarithmic axis has no place for the start.
        from_ = 1 if seconds else 0
        style = styles[name]
        errors = {
            key: [100 * max(1 - value, least) for value in found[key]][from_:]
            for key in ("mean", "low", "high")
        }
        axes.plot(at[from_:], errors["mean"], **style)
        if name in ("bp-sgd", "exact"):
            band = (errors["low"], errors["high"])
            axes.fill_between(at[from_:], *band, color=style["color"], alpha=0.13, linewidth=0)
    goal = 100 * (1 - result["target"]["accuracy"])
    axes.axhline(max(goal, 100 * least), color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.text(
        0.995,
        max(goal, 100 * least),
        f"target {100 * result['target']['accuracy']:g} %",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
        color=GREY,
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
    )
    accuracy_axis(axes, result, least)
    if seconds:
        axes.set_xscale("log")
        axes.set_xlim(left=_first_second(axes, curves))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel("seconds of steps (evaluation not counted)")
    else:
        axes.set_xlim(0, result["total_steps"])
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(f"steps ({result['steps_per_epoch']} an epoch)")
        axes.set_ylabel("test accuracy (%)")


def _first_second(axes: Any, curves: Mapping[str, Mapping[str, list[float]]]) -> float | None:
    """Where the first curve enters the panel."""
    entered = [
        at
        for found in curves.values()
        for at, mean in zip(found["seconds"], found["mean"], strict=True)
        if at > 0 and 100 * (1 - mean) < axes.get_ylim()[0]
    ]
    return 0.8 * min(entered) if entered else None


def _draw_legend(
    figure: Any,
    result: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, list[float]]],
    styles: Mapping[str, Style],
) -> None:
    """Best method first, as the curves end."""
    ends = {name: found["mean"][-1] if found["mean"] else -1.0 for name, found in curves.items()}
    handles, labels = [], []
    for name in sorted(ends, key=lambda name: -ends[name]):
        handles.append(Line2D([], [], **styles[name]))
        end = "diverged" if ends[name] < 0 else f"{100 * ends[name]:.1f}"
        labels.append(f"{name}  {end}")
    figure.legend(
        handles,
        labels,
        loc="outside right center",
        frameon=False,
        fontsize=8.5,
        title="after the last step (%)",
        title_fontsize=8.5,
        labelspacing=0.55,
    )
