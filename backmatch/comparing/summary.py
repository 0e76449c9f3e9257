"""From runs to the numbers of the table: mean and standard deviation over seeds, the target.

Nothing here imports torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]


def target(options: Mapping[str, Any], runs: Sequence[Run], total_steps: int) -> dict[str, Any]:
    """The accuracy whose steps are counted, and how it came about.

    Unless it was given: the mean over the seeds that the best of the ``bp-`` methods ends with, or
    the median method where none is compared, rounded down to a hundredth so that the method itself
    reaches it with most seeds.
    """
    if options["target"] is not None:
        return {"accuracy": options["target"], "source": "given"}
    final = {
        name: spread([accuracy_at(run, total_steps) for run in of(runs, name)])["mean"] or 0.0
        for name in options["methods"]
    }
    ends = {name: value for name, value in final.items() if name.startswith("bp-")}
    if ends:
        best = max(ends, key=lambda name: ends[name])
        source = f"the mean that {best} ends with, rounded down"
    else:
        best = sorted(final, key=lambda name: final[name])[len(final) // 2]
        source = f"the mean that {best}, the median method, ends with, rounded down"
    # A mean of 0.94 in floating point may lie just below it.
    return {"accuracy": math.floor(100 * final[best] + 1e-9) / 100, "source": source}


def summarize(
    runs: Sequence[Run], *, goal: float, epochs: Sequence[int], steps_per_epoch: int
) -> dict[str, Any]:
    """One method's final runs, in the order of the seeds, in the numbers of the table."""
    finished = [run for run in runs if run["error"] is None]
    reached = [reach(run, goal) if run["error"] is None else None for run in runs]
    return {
        "accuracy": {
            str(epoch): spread([accuracy_at(run, epoch * steps_per_epoch) for run in runs])
            for epoch in epochs
        },
        "best": spread([max(run["accuracy"]) if run["error"] is None else None for run in runs]),
        "target_steps": spread([None if at is None else at[0] for at in reached]),
        "target_seconds": spread([None if at is None else at[1] for at in reached]),
        "reached": sum(at is not None for at in reached),
        "step_ms": spread(
            # The mean: a median would hide what is done every tenth step alone.
            [statistics.fmean(run["step_ms"]) if run["error"] is None else None for run in runs]
        ),
        "diverged": len(runs) - len(finished),
        "unconverged_steps": sum(run["unconverged_steps"] for run in runs),
    }


def of(runs: Sequence[Run], method: str) -> list[Run]:
    """The final runs of a method."""
    return [run for run in runs if run["kind"] == "final" and run["method"] == method]


def accuracy_at(run: Run, step: int) -> float | None:
    """The accuracy after ``step`` steps; ``None`` for a run that diverged, wherever it did."""
    if run["error"] is not None:
        return None
    return float(run["accuracy"][run["steps"].index(step)])


def reach(run: Run, goal: float) -> tuple[int, float] | None:
    """Steps and seconds until the first evaluation that meets the goal, ``None`` if none does.

    >>> run = {"steps": [0, 2, 4], "accuracy": [0.1, 0.6, 0.5], "training_seconds": [0.0, 1.5, 3.0]}
    >>> reach(run, 0.5), reach(run, 0.7)
    ((2, 1.5), None)
    """
    rows = zip(run["steps"], run["accuracy"], run["training_seconds"], strict=True)
    return next(((step, seconds) for step, accuracy, seconds in rows if accuracy >= goal), None)


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) of the values that are there, ``None`` of too few.

    >>> spread([1.0, None, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951, 'seeds': [1.0, None, 3.0]}
    """
    there = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(there) if there else None,
        "sd": statistics.stdev(there) if len(there) > 1 else None,
        "seeds": list(values),
    }
