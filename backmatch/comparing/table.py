"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .summary import of

#: Columns of the notes on a terminal.
WIDTH = 100
#: A cell without a number.
_NONE = "-"


def terminal(result: Mapping[str, Any]) -> list[str]:
    """Aligned lines and the notes on them."""
    columns, rows = _columns(result), [_cells(result, row, "±") for row in result["methods"]]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in (columns, *rows)
    ]
    return [*lines, "", *(textwrap.fill(note, WIDTH) for note in notes(result))]


def markdown(result: Mapping[str, Any]) -> str:
    """``compare.md``."""
    named = [f"| {row['name']} | {row['title']} |" for row in result["methods"]]
    parts = [
        [f"# {title(result)}"],
        markdown_rows(result),
        [f"- {note}" for note in notes(result)],
        ["| method | what it is |", "|---|---|", *named],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def markdown_rows(result: Mapping[str, Any]) -> list[str]:
    """The lines of the table alone."""
    columns = _columns(result)
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    rows = [_cells(result, row, " ± ") for row in result["methods"]]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows)]


def title(result: Mapping[str, Any]) -> str:
    """``digits, mlp 128,128 relu, batch 128, 5 epochs of 11 steps``."""
    options = result["options"]
    net = options["model"]
    if options["hidden"] is not None:
        net += f" {','.join(map(str, options['hidden'])) or 'none'} {options['activation']}"
    return (
        f"{options['data']}, {net}, batch {options['batch_size']}, "
        f"{options['epochs']} epoch{'' if options['epochs'] == 1 else 's'} of "
        f"{result['steps_per_epoch']} steps"
    )


def _columns(result: Mapping[str, Any]) -> list[str]:
    goal = f"{100 * result['target']['accuracy']:g}"
    after = [f"after {epoch}" for epoch in result["options"]["report_epochs"]]
    return ["method", "lr", "tuned", *after, "best", f"steps to {goal}", f"s to {goal}", "ms/step"]


def _cells(result: Mapping[str, Any], row: Mapping[str, Any], sign: str) -> list[str]:
    found, seeds = row["summary"], len(result["options"]["seeds"])
    after = [
        _percent(found["accuracy"][str(epoch)], sign)
        for epoch in result["options"]["report_epochs"]
    ]
    if found["reached"] == seeds:
        goal = [_cell(found["target_steps"], sign, 0), significant(found["target_seconds"], sign)]
    else:
        goal = [f"{found['reached']}/{seeds}"] * 2
    return [
        row["name"],
        f"{row['lr']:g}" + ("*" if row["edge"] else ""),
        str(row["tuning_runs"]) if row["tuning_runs"] else _NONE,
        *after,
        _percent(found["best"], sign) + ("!" if found["diverged"] else ""),
        *goal,
        significant(found["step_ms"], sign),
    ]


def _percent(spread: Mapping[str, Any], sign: str) -> str:
    return _cell(spread, sign, 1, factor=100)


def _cell(spread: Mapping[str, Any], sign: str, decimals: int, factor: float = 1) -> str:
    """Mean and deviation, the mean alone of a single seed."""
    there = [factor * spread[key] for key in ("mean", "sd") if spread[key] is not None]
    return sign.join(f"{value:.{decimals}f}" for value in there) or _NONE


def significant(spread: Mapping[str, Any], sign: str) -> str:
    """Mean and deviation with as many decimals as give the mean three digits.

    >>> significant({"mean": 0.1534, "sd": 0.0123}, "±"), significant({"mean": 42.0, "sd": 3}, "±")
    ('0.153±0.012', '42.0±3.0')
    """
    mean = spread["mean"] or 0.0
    decimals = next((d for d, limit in ((0, 100), (1, 10), (2, 1)) if mean >= limit), 3)
    return _cell(spread, sign, decimals)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the numbers are, and what a reader must know before believing them."""
    options, rows = result["options"], result["methods"]
    goal = f"{100 * result['target']['accuracy']:g}"
    lines = [
        "test accuracy in %, mean ± standard deviation over seeds "
        f"{', '.join(map(str, options['seeds']))}; best: over the evaluations of a run",
        f"target {goal} %: {result['target']['source']}; steps and seconds until the first "
        "evaluation that meets it, k/n: only k of n seeds do; seconds are of steps alone",
        _tuning_note(result),
        _machine_note(result),
    ]
    edge = [row["name"] for row in rows if row["edge"]]
    if edge:
        lines.append(f"*: the best rate lies on the edge of those tried: {', '.join(edge)}")
    for row in rows:
        found = row["summary"]
        if found["diverged"]:
            lines.append(
                f"!: {row['name']} diverged with {found['diverged']} of {len(options['seeds'])} "
                f"seeds; its means leave them out ({_first_error(result, row['name'])})"
            )
        if found["unconverged_steps"]:
            lines.append(
                f"{row['name']}: in {found['unconverged_steps']} steps a conjugate gradient "
                "stopped at its cap"
            )
    return lines


def _first_error(result: Mapping[str, Any], name: str) -> str:
    found = next(run for run in of(result["runs"], name) if run["error"] is not None)
    return f"seed {found['seed']}: {found['error']}"


def _tuning_note(result: Mapping[str, Any]) -> str:
    if not any(row["tuning_runs"] for row in result["methods"]):
        return "lr: as given, nothing was tuned"
    seeds = ", ".join(map(str, result["options"]["tuning_seeds"]))
    return (
        f"lr: chosen by accuracy on {result['data']['validation']} of "
        f"{result['data']['train']} training samples held out, seeds {seeds}; tuned: runs it took"
    )


def _machine_note(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    began = datetime.datetime.fromtimestamp(result["began_unix_seconds"], datetime.timezone.utc)
    place = (
        machine["gpu"] if "gpu" in machine else f"{machine['cpu']}, threads: {machine['threads']}"
    )
    return (
        f"{began.date().isoformat()}, {place}, {result['options']['dtype']}, "
        f"torch {versions['torch']}, backmatch {versions['backmatch']}"
    )


def row_of(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The method of that name in a result."""
    rows: Sequence[Mapping[str, Any]] = result["methods"]
    return next(row for row in rows if row["name"] == name)
