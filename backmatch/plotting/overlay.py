"""Several runs on one page: accuracy and loss on the test data, against steps and seconds."""

from __future__ import annotations

import math
import textwrap
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
    names = [textwrap.fill(name, 110) for name in labels(runs)]
    # A legend line takes a sixth of an inch; the axes keep their size.
    wide, high = 8.8, 5.75 + 0.165 * sum(name.count("\n") + 1 for name in names)
    with style.context():
        figure = Figure(figsize=(wide, high), dpi=150)
        for row, name in enumerate(("test_accuracy", "test_loss")):
            for column, against in enumerate(("steps", "seconds")):
                left, bottom = 0.72 + 4.4 * column, high - 2.4 - 2.7 * row
                axes = figure.add_axes((left / wide, bottom / high, 3.55 / wide, 2.2 / high))
                _draw(axes, runs, name, against)
                axes.set_xlabel(against if against == "steps" else "seconds of training")
        figure.legend(
            axes.get_lines(),
            names,
            loc="lower left",
            frameon=False,
            fontsize=7.5,
            labelspacing=0.35,
            bbox_to_anchor=(0.5 / wide, 0.03 / high),
        )
        return style.save(figure)


def _draw(axes: Any, runs: Sequence[StoredRun], name: str, against: str) -> None:
    accuracy = name == "test_accuracy"
    every: list[float] = []
    for i, run in enumerate(runs):
        found = run.evaluations
        values = style.drawable([(100 if accuracy else 1) * v for v in getattr(found, name)])
        every += values
        axes.plot(
            style.drawable(getattr(found, against)),
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
        if max(known, default=0) > 95:  # room for a marker at 100, none for a tick above it
            least = min(known)
            room = max(100 - least, 1)
            axes.set_ylim(least - 0.05 * room, 100 + 0.03 * room)
        else:
            axes.set_ylim(top=100)
    elif not style.scale(axes, every, log=True):
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_ylabel("test accuracy (%)" if accuracy else "test cross-entropy (nats)")
    style.grid(axes)


def labels(runs: Sequence[StoredRun]) -> list[str]:
    """What tells the runs apart: the options in which they differ, else their folders' names.

    An option that only some runs read, all with one value, follows from the others.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differing = [key for key in keys if key not in _INCIDENTAL and len(_values(runs, key)) > 1]
    named = [_name(run, differing) for run in runs]
    told = [
        name if name and named.count(name) == 1 else f"{name} ({_end(str(run.path))})".strip()
        for name, run in zip(named, runs, strict=True)
    ]
    ends = ["" if run.finished else ", unfinished" for run in runs]
    return [name + end for name, end in zip(told, ends, strict=True)]


def _end(path: str, limit: int = 50) -> str:
    """The part of a long path that tells folders apart."""
    return style.plain(path if len(path) <= limit else ".." + path[2 - limit :], limit)


def _values(runs: Sequence[StoredRun], key: str) -> set[str]:
    return {str(run.config[key]) for run in runs if run.config.get(key) is not None}


def _name(run: StoredRun, keys: Sequence[str]) -> str:
    words = []
    for key in keys:
        value = run.config.get(key)
        if value is not None:
            listed = ",".join(map(str, value)) if isinstance(value, list) else value
            text = style.plain(listed, 40)
            alone = key in ("method", "model", "data", "optimizer")
            words.append(text if alone else f"{key.replace('_', ' ')} {text}")
    return style.plain(", ".join(words), 330)
