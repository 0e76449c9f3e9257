"""The tables that ``backmatch analyze`` prints: at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from ..training.progress import say

WIDTH = 100
Row = dict[str, Any]

#: Study -> what its table has and what a reader should see in it.
_NOTES = {
    "init": "kappa: largest over smallest nonzero eigenvalue of one system, median and 10 % .. 90 "
    "%; input side: one sample; weight side: one output unit; draws: how many matrices",
    "skip": "a: weight of the branch; limit: of kappa for large n, derived; W Gaussian with "
    "entries of variance 1/n, Q orthonormal",
    "norm": "inputs uniform on [0.5, 1.5], or the same with every feature scaled by 0.1 .. 10; "
    "the input side asks for W alone",
    "depth": "median kappa of single systems at the block of that number, counted from the input",
    "width": "median kappa of single systems over the four blocks, by width",
    "training": "median kappa of single systems after so many steps; the last block is the Linear "
    "on top",
}


def show(study: dict[str, Any]) -> None:
    """Print one study: claim, tables, notes, time."""
    name, rows = study["name"], study["rows"]
    say("")
    say(name + _about(study["options"]))
    for line in textwrap.wrap("claim: " + study["claim"], WIDTH - 2):
        say("  " + line)
    for lines in tables(name, rows):
        say("")
        for line in aligned(lines):
            say("  " + line)
    say("")
    for line in textwrap.wrap(_NOTES[name], WIDTH - 2):
        say("  " + line)
    undefined = sum(row.get("kappa", {}).get("undefined", 0) for row in rows)
    if undefined:
        total = sum(row.get("count", 0) for row in rows)
        say(f"  {undefined} of {total} systems are zero (units that no sample activates)")
    say(f"  {study['elapsed_seconds']:.1f} s")


def _about(options: dict[str, Any]) -> str:
    shown = []
    for key, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        shown.append(f"{key} {text}")
    return f" ({', '.join(shown)})"


def tables(name: str, rows: Sequence[Row]) -> list[list[list[str]]]:
    """The tables of a study, each a list of lines of cells, its heading first."""
    if name == "depth":
        return [_pivot(rows, ("side", "activation", "family"), "block", _few(rows, "block", 7))]
    if name == "width":
        return [_pivot(rows, ("side", "activation", "family"), "width", _few(rows, "width", 7))]
    if name == "training":
        return _training(rows)
    return [_plain([row for row in rows if row["case"]["side"] == side]) for side in _sides(rows)]


def _sides(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["case"]["side"] for row in rows))


def _plain(rows: Sequence[Row]) -> list[list[str]]:
    """One line per row; a case's field that is the same in all of them only if it is the side."""
    keys = list(dict.fromkeys(key for row in rows for key in row["case"]))
    keys = [
        key for key in keys if key == "side" or len({str(row["case"].get(key)) for row in rows}) > 1
    ]
    limit = any("large_n" in row for row in rows)
    heading = [*keys, "kappa", "10 %", "90 %", "norm", "trace mean", "rank", "draws"]
    lines = [heading + ["limit"] * limit]
    for row in rows:
        kappa = row["kappa"]
        cells = [_word(row["case"].get(key)) for key in keys]
        cells += [figure(kappa[mark]) for mark in ("median", "q10", "q90")]
        cells += [figure(row[what]["median"]) for what in ("spectral_norm", "trace_mean", "rank")]
        cells.append(str(row["count"]))
        lines.append(cells + [figure(row.get("large_n"))] * limit)
    return lines


def _few(rows: Sequence[Row], key: str, most: int) -> list[Any]:
    """At most so many of the values that a key has, the first and the last among them."""
    values = list(dict.fromkeys(row["case"][key] for row in rows if key in row["case"]))
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _pivot(
    rows: Sequence[Row], keys: tuple[str, ...], across: str, values: Iterable[Any]
) -> list[list[str]]:
    """Medians of kappa, a line per combination of ``keys``, a column per value of ``across``."""
    values = list(values)
    found: dict[tuple[str, ...], dict[Any, str]] = {}
    for row in sorted(rows, key=lambda row: str(row["case"]["side"])):
        case = row["case"]
        cells = found.setdefault(tuple(str(case[key]) for key in keys), {})
        cells[case[across]] = figure(row["kappa"]["median"])
    heading = [*keys, *(f"{across} {value}" for value in values)]
    return [
        heading,
        *([*key, *(cells.get(v, "-") for v in values)] for key, cells in found.items()),
    ]


def _training(rows: Sequence[Row]) -> list[list[list[str]]]:
    """Loss by step, then kappa by block and step, for each method."""
    made = []
    for method in dict.fromkeys(row["case"]["method"] for row in rows):
        own = [row for row in rows if row["case"]["method"] == method]
        steps = _few(own, "step", 6)
        losses: dict[str, dict[int, str]] = {}
        for row in own:
            if "loss" in row:
                cells = losses.setdefault(row["case"]["family"], {})
                cells[row["case"]["step"]] = figure(row["loss"]["median"])
        heading = [method, "loss (nats)", *(f"step {step}" for step in steps)]
        lines = [
            ["", family, *(each.get(s, "-") for s in steps)] for family, each in losses.items()
        ]
        made.append([heading, *lines])
        blocks = [row for row in own if "block" in row["case"]]
        if blocks:
            made.append(_pivot(blocks, ("side", "family", "block"), "step", steps))
    return made


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Words to the left, figures to the right, two spaces between columns.

    >>> aligned([["name", "kappa"], ["raw", "2833"]])
    ['name  kappa', 'raw    2833']
    """
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_figure(cell) for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("-", "")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def figure(value: float | None) -> str:
    """Three digits.

    >>> figure(54460.4), figure(1.7198), figure(64.0), figure(None)
    ('5.45e4', '1.72', '64', '-')
    """
    if value is None:
        return "-"
    if value != 0 and not 1e-2 <= abs(value) < 9999.5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
