"""``backmatch compare --dry-run``: the runs, their steps and about how long they take."""

from __future__ import annotations

import statistics
from typing import Any

from ..bench.report import aligned
from ..training.data import Dataset
from ..training.failures import RunError
from ..training.progress import say
from . import schedule, trial
from .options import CompareOptions
from .tuning import MOST_ADDED

#: Steps that are timed per method, after a first one that warms up.
TIMED_STEPS = 3


def show(options: CompareOptions, data: Dataset) -> int:
    """Print the plan; returns the exit code."""
    say(f"{schedule.plan(options, data)}; held out for tuning: {len(trial.held_out(data).x_test)}")
    head = ["method", "rates", "tuning runs", "final runs", "ms/step", "seconds"]
    rows, least, most = [], 0.0, 0.0
    for name in options.methods:
        row, seconds, more = _row(options, data, name)
        rows.append(row)
        least, most = least + seconds, most + more
    for line in aligned([head, *rows]):
        say(line)
    span = f"{least:.0f}" if round(most) == round(least) else f"{least:.0f} to {most:.0f}"
    say(f"about {span} seconds of steps; evaluations come on top")
    return 0


def _row(options: CompareOptions, data: Dataset, name: str) -> tuple[list[str], float, float]:
    """Cells, and seconds if the grid never grows and if it always does."""
    grid, seeds = options.grid(name), len(options.tuning_seeds)
    tuning = len(grid) * seeds if len(grid) > 1 else 0
    added = MOST_ADDED * seeds if tuning and options.may_extend(name) else 0
    final = len(options.seeds)
    seconds = time_step(options, data, name)
    in_final = schedule.steps(options, data)[1]
    in_tuning = schedule.steps(options, trial.held_out(data))[1]
    least = seconds * (tuning * in_tuning + final * in_final)
    most = least + seconds * added * in_tuning
    cells = [
        name,
        ", ".join(f"{rate:g}" for rate in grid),
        f"{tuning} to {tuning + added}" if added else str(tuning),
        str(final),
        f"{1e3 * seconds:.1f}",
        f"{least:.0f} to {most:.0f}" if round(most) > round(least) else f"{least:.0f}",
    ]
    return cells, least, most


def time_step(options: CompareOptions, data: Dataset, name: str) -> float:
    """Seconds of a step: the median of a few on the first batches, after one that warms up.

    Raises:
        RunError: the method cannot take these steps.
    """
    grid = options.grid(name)
    config = options.config(name, grid[0], options.seeds[0])
    row: dict[str, Any] = trial.run(
        config, data, evaluate_at=(), timed=True, most_steps=TIMED_STEPS
    )
    if row["error"] is not None:
        raise RunError(f"{name}, lr {grid[0]:g}: {row['error']}")
    return float(statistics.median(row["step_ms"])) / 1e3
