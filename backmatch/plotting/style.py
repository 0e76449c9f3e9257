"""The look of the pages: colours told apart with every common colour vision, plain axes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

# Okabe and Ito's palette, as in the other figures.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8C8C8C"
#: Colour and marker of several runs: the palette first, then with other markers and dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")

#: Differences and squares of larger numbers leave what a float holds.
LARGEST = 1e100

RC: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.usetex": False,
    "text.parse_math": False,  # a block or a file may be called $x$
}


def save(figure: Figure) -> bytes:
    """The figure as a PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def context() -> Any:
    """matplotlib's settings for our pages, whatever the user's own file says."""
    return matplotlib.style.context(["default", RC])


def plain(text: object, limit: int = 60) -> str:
    """Text that every font has, on one line."""
    shown = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 2] + ".."


def drawable(values: Sequence[float]) -> list[float]:
    """Gaps where a number is too large for an axis.

    >>> drawable([1.0, -1e200])
    [1.0, nan]
    """
    return [value if abs(value) <= LARGEST else math.nan for value in values]


def grid(axes: Any) -> None:
    axes.grid(color="#E3E3E3", linewidth=0.6)


def scale(axes: Any, values: Sequence[float], *, log: bool) -> bool:
    """Logarithmic if asked for and worth it: over less than a factor of 10 it has no ticks.

    Returns:
        Whether the axis is logarithmic.
    """
    known = [value for value in values if math.isfinite(value)]
    positive = [value for value in known if value > 0]
    if log and positive and len(positive) == len(known) and max(known) > 10 * min(known):
        axes.set_yscale("log")
        decades = math.log10(max(known)) - math.log10(min(known))
        axes.yaxis.set_major_locator(LogLocator(numticks=6, subs=(1.0,) if decades > 2 else (1, 3)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        return True
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))
    return False


def step_axis(axes: Any, ticks: int) -> None:
    """Whole steps only."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True))


def whole_values(axes: Any, largest: float) -> None:
    """Whole numbers on the value axis, from 0 to a little above the largest."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_ylim(-0.04 * largest, 1.08 * largest)


def thin(
    steps: Sequence[int], values: Sequence[float], most: int = 4000
) -> tuple[list[float], list[float]]:
    """At most ``most`` points: means over equally many neighbours, so that no peak is invented.

    >>> thin([1, 2, 3, 4], [1.0, 3.0, 5.0, 5.0], most=2)
    ([1.5, 3.5], [2.0, 5.0])
    """
    width = -(-len(steps) // most)
    if width <= 1:
        return [float(step) for step in steps], list(values)
    starts = range(0, len(steps), width)
    return (
        [math.fsum(part) / len(part) for part in (steps[i : i + width] for i in starts)],
        [_mean(values[i : i + width]) for i in starts],
    )


def _mean(part: Sequence[float]) -> float:
    known = [value for value in part if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
