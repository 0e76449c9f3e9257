"""Which numbers of a probe stand on the page, and how one panel of them is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps

from . import style
from .labels import label_ends
from .stored_run import Key, StoredRun


@dataclass(frozen=True)
class Panel:
    """One number of every block against the step.

    Attributes:
        title: what the number is.
        key: where it stands in a block's report.
        over: another number that it is divided by.
        log: whether a logarithmic axis suits it.
        line: a value worth a line: "as long as the other", "at right angles".
        bound: what says whether the number is exact; if not, it is a bound, and dashed.
        empty: what to say where no block has the number.
    """

    title: str
    key: Key
    over: Key | None = None
    log: bool = True
    line: float | None = None
    bound: Key | None = None
    empty: str = "not known"

    def values(self, run: StoredRun) -> list[list[float]]:
        """One number per block and probe."""
        found = run.series(self.key)
        if self.over is None:
            return [style.drawable(one) for one in found]
        return [
            style.drawable([a / b if b > 0 else math.nan for a, b in zip(one, other, strict=True)])
            for one, other in zip(found, run.series(self.over), strict=True)
        ]


def _cosine(title: str, *key: str) -> Panel:
    return Panel(title, key, log=False, line=0.0)


def _ratio(title: str, *key: str) -> Panel:
    return Panel(title, key, line=1.0)


_BEFORE = ("loss", "before")

LOSSES = (
    Panel("local loss before the step", _BEFORE),
    Panel("share left: weights moved", ("loss", "after_weights"), over=_BEFORE, line=1.0),
    Panel("share left: weights and input", ("loss", "after_both"), over=_BEFORE, line=1.0),
)
ATTAINED = (
    _ratio("weights alone: length", "local", "ratio"),
    _cosine("weights alone: cosine", "local", "cosine"),
    _cosine("weights and input: cosine", "joint", "cosine"),
    _ratio("whole new net: length", "propagated", "ratio"),
    _cosine("whole new net: cosine", "propagated", "cosine"),
)
WEIGHT_STEP = (
    _cosine("cosine to gradient step", "weight", "cosine", "gradient"),
    _cosine("cosine to Adam's step", "weight", "cosine", "adam"),
    _ratio("length / gradient step", "weight", "ratio", "gradient"),
    _ratio("length / scalar step", "weight", "ratio", "scalar"),
    _ratio("length / Adam's step (lr 0.001)", "weight", "ratio", "adam"),
)
INPUT_STEP = (
    _cosine("cosine to gradient step", "input", "cosine", "gradient"),
    _cosine("same, local problem", "input", "cosine", "local_gradient"),
    _ratio("length / gradient step", "input", "ratio", "gradient"),
    _ratio("length / scalar step", "input", "ratio", "scalar"),
    _ratio("same, local problem", "input", "ratio", "local_scalar"),
)


def _systems(side: str) -> tuple[Panel, ...]:
    return (
        Panel("condition on the range", (side, "spectrum", "condition", "median")),
        Panel(
            "condition as solved",
            (side, "spectrum", "condition_damped", "median"),
            bound=(side, "spectrum", "exact"),
            empty="no damped system solved",
        ),
        Panel("damping", (side, "damping", "median"), empty="no damping"),
        Panel("CG iterations", (side, "iterations"), log=False),
        Panel("residual of the solve", (side, "residual"), empty="no system solved"),
    )


#: Rows of the page: heading, panels, and what is to be said of the row.
SECTIONS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("attained displacement beside the requested one", ATTAINED),
    ("weight step beside those of other methods", WEIGHT_STEP),
    ("input step beside those of other methods (the bottom block has none)", INPUT_STEP),
    (
        "weight systems (medians over the systems of a block; dashed: an upper bound)",
        _systems("weight"),
    ),
    (
        "input systems (medians over the systems of a block; dashed: an upper bound)",
        _systems("input"),
    ),
)


def colors(count: int) -> list[Any]:
    """From dark (bottom block) to light (top): the order can be read without the labels."""
    scale = colormaps["viridis"]
    return [scale(0.82 * b / max(count - 1, 1)) for b in range(count)]


def draw(axes: Any, run: StoredRun, panel: Panel, height: float) -> None:
    """One panel on axes that are ``height`` points high."""
    values, hues = panel.values(run), colors(len(run.blocks))
    axes.set_title(panel.title, loc="left", pad=4)
    every = [v for one in values for v in one if math.isfinite(v)]
    if not every:
        _say(axes, panel.empty)
        return
    if panel.key[-1] == "iterations" and not any(every):
        _say(axes, "none: solved directly")
        return
    style.scale(axes, every if panel.line is None else [*every, panel.line], log=panel.log)
    if "cosine" in panel.key:
        axes.set_ylim(min(0.0, *every) - 0.05, 1.05)
    if panel.key[-1] == "iterations":
        style.whole_values(axes, max(every))
    if panel.line is not None:
        axes.axhline(panel.line, color=style.GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0.9)
    few = len(run.probed) <= 25
    for b, (one, hue) in enumerate(zip(values, hues, strict=True)):
        steps, shown = style.thin(run.probed, one, most=1000)
        dashed = panel.bound is not None and run.flag(b, panel.bound) is False
        axes.plot(
            steps,
            shown,
            color=hue,
            linewidth=1.0,
            linestyle="--" if dashed else "-",
            marker="o" if few else None,
            markersize=1.8,
        )
    span = run.probed[-1] - run.probed[0]
    axes.set_xlim(run.probed[0] - 0.03 * span - 0.5 * (not span), run.probed[-1] + 0.5 * (not span))
    style.step_axis(axes, 4)
    style.grid(axes)
    ends = [
        (style.plain(name, 8), _last(one), hue)
        for name, one, hue in zip(run.blocks, values, hues, strict=True)
    ]
    label_ends(axes, _legible(ends), height, 6.5 if len(ends) <= 8 else 5.6)


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _legible(ends: list[tuple[str, float, Any]], most: int = 16) -> list[tuple[str, float, Any]]:
    """Of very many blocks a few are named; the colours tell the others' order."""
    every = -(-len(ends) // most)
    return ends[::every]


def _say(axes: Any, text: str) -> None:
    axes.text(
        *(0.5, 0.5, text), transform=axes.transAxes, ha="center", va="center", color=style.GREY
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
