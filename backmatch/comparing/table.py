"""The table of a comparison, for the terminal and as Markdown."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .summary import of

#: Columns of the notes on a terminal.
WIDTH = 100
#: Of the column that the terminal has no room for.
TUNED = "tuned: runs that the choice of the rate took"
#: A cell without a number.
_NONE = "-"
#: Left out on a terminal, where the lines above the table say it.
_TUNED = "tuned"


def terminal(result: Mapping[str, Any]) -> list[str]:
    """Aligned lines, those of ``compare.md`` less the column ``tuned``, and the notes on them."""
    lines = [_columns(result), *(_cells(result, row, "±") for row in result["methods"])]
    columns = [column for column in zip(*lines, strict=True) if column[0] != _TUNED]
    found = [line for part in _parts(columns) for line in (*part, "")]
    return [*found, *(textwrap.fill(note, WIDTH) for note in notes(result))]


def _parts(columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tables of at most :data:`WIDTH` columns one below the other, each with the methods' names."""
    names, *others = columns
    parts: list[list[str]] = []
    for column in others:
        width = max(map(len, column)) + 2
        if not parts or len(parts[-1][0]) + width > WIDTH:
            longest = max(map(len, names))
            parts.append([name.ljust(longest) for name in names])
        parts[-1] = [line + cell.rjust(width) for line, cell in zip(parts[-1], column, strict=True)]
    return parts


def markdown(result: Mapping[str, Any]) -> str:
    """``compare.md``."""
    named = [f"| {row['name']} | {row['title']} |" for row in result["methods"]]
    parts = [
        [f"# {title(result)}"],
        markdown_rows(result),
        [f"- {note}" for note in (*notes(result), TUNED)],
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
    data = "".join(c if c.isprintable() else "?" for c in options["data"])
    net = options["model"]
    if options["hidden"] is not None:
        net += f" {','.join(map(str, options['hidden'])) or 'none'} {options['activation']}"
    return (
        f"{data}, {net}, batch {options['batch_size']}, "
        f"{options['epochs']} epoch{'' if options['epochs'] == 1 else 's'} of "
        f"{result['steps_per_epoch']} steps"
    )


def _columns(result: Mapping[str, Any]) -> list[str]:
    goal = f"{100 * result['target']['accuracy']:g}"
    after = [f"after {epoch}" for epoch in result["options"]["report_epochs"]]
    return ["method", "lr", _TUNED, *after, "best", f"steps to {goal}", f"s to {goal}", "ms/step"]


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
    """Mean and deviation with as many decimals as give the mean three digits, four at most.

    >>> significant({"mean": 0.1534, "sd": 0.0123}, "±"), significant({"mean": 42.0, "sd": 3}, "±")
    ('0.153±0.012', '42.0±3.0')
    >>> significant({"mean": 0.00123, "sd": 0.0004}, "±")
    '0.0012±0.0004'
    """
    mean = spread["mean"] or 0.0
    limits = ((0, 100), (1, 10), (2, 1), (3, 0.01))
    decimals = next((d for d, limit in limits if mean >= limit), 4)
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
        f"{result['data']['train']} training samples held out, seeds {seeds}"
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
