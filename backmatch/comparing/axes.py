"""The axis of accuracy that the panels of ``compare.png`` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import FixedLocator, NullLocator

# Okabe and Ito's palette: told apart with every common colour vision.
BLACK, GREY = "#000000", "#6E6E6E"
BLUE, ORANGE = "#0072B2", "#E69F00"
#: Errors in % that the axis of accuracy names.
_ERRORS = (90, 50, 40, 30, 20, 15, 10, 7, 5, 4, 3, 2, 1, 0.5, 0.2, 0.1)


def least_error(result: Mapping[str, Any]) -> float:
    """Half a test sample: where no error at all is drawn."""
    return 0.5 / int(result["data"]["test"])


def accuracy_axis(axes: Any, result: Mapping[str, Any], least: float, most_ticks: int = 20) -> None:
    """Logarithmic in the error (%), with ticks that say accuracies.

    Args:
        least: the smallest error that is drawn.
        most_ticks: about how many ticks there is room for.
    """
    final = [run for run in result["runs"] if run["kind"] == "final" and run["accuracy"]]
    best = max((max(run["accuracy"]) for run in final), default=0.9)
    bottom = 100 * max(1 - best, least) * 0.8
    top = 65.0 if any(run["accuracy"][-1] > 0.4 for run in final) else 100.0
    axes.set_yscale("log")
    axes.set_ylim(top, bottom)
    ticks: list[float] = []
    for error in _ERRORS:  # the distance of neighbours is a ratio on this axis
        apart = not ticks or ticks[-1] / error > (top / bottom) ** (1 / most_ticks)
        if apart and bottom <= error <= top:
            ticks.append(error)
    if best > 1 - least:  # no error at all stands at its place on the axis, under its own name
        floor = 100 * least
        ticks = [e for e in ticks if e / floor > (top / bottom) ** (1 / most_ticks)] + [floor]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        lambda error, _: "100" if error <= 100 * least else f"{100 - error:g}"
    )
    axes.grid(color="#E3E3E3", linewidth=0.6)
