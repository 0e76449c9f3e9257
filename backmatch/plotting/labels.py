"""Names at the ends of lines, moved apart where they would cover one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.collections import LineCollection


def moved_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as may be to the wanted ones, in their order and ``gap`` apart.

    Neighbours that are too close form a group that is centred on its members' mean (the pooling of
    isotonic regression). Where all do not fit between ``low`` and ``high``, the gap shrinks.

    >>> moved_apart([0.5, 0.5, 0.9], gap=0.1, low=0.0, high=1.0)
    [0.45, 0.55, 0.9]
    """
    if not places:
        return []
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[float, int]] = []  # mean of the first member's place, members
    for rank, i in enumerate(order):
        mean, count = places[i] - rank * gap, 1
        while groups and groups[-1][0] > mean:
            before, many = groups.pop()
            mean, count = (mean * count + before * many) / (count + many), count + many
        groups.append((mean, count))
    spread = [mean for mean, count in groups for _ in range(count)]
    top = high - gap * (len(places) - 1)
    found = [0.0] * len(places)
    for rank, i in enumerate(order):
        found[i] = round(min(max(spread[rank], low), top) + rank * gap, 12)
    return found


def label_ends(
    axes: Any, ends: Sequence[tuple[str, float, str]], height: float, size: float
) -> None:
    """Write names to the right of the axes, each at the height of its line's end.

    Args:
        ends: name, last value and colour of every line; NaN for a line without a value.
        height: of the axes, in points; limits and scale must be settled.
        size: of the font, in points.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[0]
    shown = [
        (name, float(to_axes.transform((left, value))[1]), color)
        for name, value, color in ends
        if math.isfinite(value)
    ]
    places = moved_apart([y for _, y, _ in shown], 1.05 * size / height, -0.03, 1.03)
    leaders = [((1.0, y), (1.035, place)) for (_, y, _), place in zip(shown, places, strict=True)]
    hues = [color for _, _, color in shown]
    lines = LineCollection(
        leaders, colors=hues, linewidths=0.5, transform=axes.transAxes, clip_on=False
    )
    axes.add_collection(lines, autolim=False)
    for (name, _, color), place in zip(shown, places, strict=True):
        axes.text(
            *(1.045, place, name),
            transform=axes.transAxes,
            color=color,
            fontsize=size,
            va="center_baseline",
        )
