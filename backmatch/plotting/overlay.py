"""Several runs on one page: accuracy and loss on the test data, against steps and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from . import style
from .stored_run import StoredRun

#: More lines than this nobody can tell apart.
MOST_RUNS = 32

#: Options that say where and how fast a run was computed, not what it is.
_INCIDENTAL = ("threads", "probe")


def overlay(runs: Sequence[StoredRun]) -> bytes:
    """The figure as a PNG; the same rows give the same bytes."""
    names = labels(runs)
    with style.context():
        lines = -(-len(runs) // 2)
        high = 5.6 + 0.19 * lines
        figure = Figure(figsize=(8.6, high), dpi=150)
        for row, name in enumerate(("test_accuracy", "test_loss")):
            for column, against in enumerate(("steps", "seconds")):
                bottom = high - 0.15 - (row + 1) * 2.35 - row * 0.3
                axes = figure.add_axes(
                    ((0.62 + 4.3 * column) / 8.6, bottom / high, 3.55 / 8.6, 2.2 / high)
                )
                _draw(axes, runs, name, against)
                axes.set_xlabel(against if against == "steps" else "seconds of training")
                if row == column == 0:
                    handles = axes.get_lines()[: len(runs)]
        figure.legend(
            handles,
            names,
            loc="lower center",
            ncols=1 if max(map(len, names)) > 70 else 2,
            frameon=False,
            fontsize=7.5,
            bbox_to_anchor=(0.5, 0.0),
        )
        return style.save(figure)


def _draw(axes: Any, runs: Sequence[StoredRun], name: str, against: str) -> None:
    accuracy = name == "test_accuracy"
    every: list[float] = []
    for i, run in enumerate(runs):
        found = run.evaluations
        values = [(100 if accuracy else 1) * value for value in getattr(found, name)]
        every += values
        axes.plot(
            getattr(found, against),
            values,
            color=style.COLORS[i % len(style.COLORS)],
            marker=style.MARKERS[i % len(style.MARKERS)] if len(values) <= 40 else None,
            markersize=4,
            linewidth=1.1,
            linestyle=("-", "--", ":", "-.")[i // len(style.COLORS) % 4],
            markerfacecolor="none" if i >= len(style.COLORS) else None,
        )
    if accuracy:
        known = [value for value in every if math.isfinite(value)]
        axes.set_ylim(top=100.5 if max(known, default=100) > 95 else 100)
    elif not style.scale(axes, every, log=True):
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_ylabel("test accuracy (%)" if accuracy else "test cross-entropy (nats)")
    style.grid(axes)


def labels(runs: Sequence[StoredRun]) -> list[str]:
    """What tells the runs apart: the options in which they differ, else their folders' names."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [
        key
        for key in keys
        if key not in _INCIDENTAL and len({str(run.config.get(key)) for run in runs}) > 1
    ]
    named = [_name(run, differing) for run in runs]
    return [
        name if named.count(name) == 1 and name else f"{name} ({run.path.name})".strip()
        for name, run in zip(named, runs, strict=True)
    ]


def _name(run: StoredRun, keys: Sequence[str]) -> str:
    words = [
        style.plain(run.config[key])
        if key in ("method", "model", "data")
        else f"{key.replace('_', ' ')} {style.plain(run.config[key], 30)}"
        for key in keys
        if run.config.get(key) is not None
    ]
    return ", ".join(words) + ("" if run.finished else " [unfinished]")
