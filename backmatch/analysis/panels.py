"""The panels of ``analysis.png``, one function per study.

Everywhere the condition number on a logarithmic axis: a marker or line at the median, a bar or
band from the 10 % to the 90 % quantile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)

from ..plotting.style import plain

Row = dict[str, Any]

# Okabe and Ito's palette: told apart with every common colour vision; markers differ as well.
_STYLES = (
    ("#D55E00", "s"),
    ("#0072B2", "o"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
)
_GREY = "#6E6E6E"
_KAPPA = "condition number"
_SIDES = {"input": "input side", "weight": "weight side"}


def about(study: dict[str, Any]) -> str:
    """What of a study's options belongs into its title."""
    options = study["options"]
    shown = ("size", "draws", "nets", "data")
    parts = [f"{key} {plain(options[key])}" for key in shown if key in options]
    # A file may be called $x$.
    return f" ({', '.join(parts)})".replace("$", r"\$") if parts else ""


def methods(study: dict[str, Any]) -> list[str]:
    """Of training, those that have rows."""
    return list(dict.fromkeys(row["case"]["method"] for row in study["rows"])) or ["bp"]


def init(band: Any, rows: Sequence[Row]) -> None:
    """Schemes from top to bottom, activations by colour."""
    left, right = band.subplots(1, 2, sharex=True)
    for axes, side in ((left, "input"), (right, "weight")):
        chosen = [row for row in rows if row["case"]["side"] == side]
        _dots(axes, chosen, "scheme", "activation", _SIDES[side])
    _legend(band, left, "activation ")


def skip(band: Any, rows: Sequence[Row]) -> None:
    """Lines over the branch's weight, the plain block and the limits for comparison."""
    left, right = band.subplots(1, 2, sharey=True)
    for axes, side in ((left, "input"), (right, "weight")):
        chosen = [row for row in rows if row["case"]["side"] == side]
        swept = [row for row in chosen if row["case"]["weight"] is not None]
        names = list(dict.fromkeys(row["case"]["block"] for row in swept))
        for style, name in zip(_STYLES, names, strict=False):
            own = [row for row in swept if row["case"]["block"] == name]
            _line(axes, own, "weight", style, name)
            limit = [row for row in own if "large_n" in row]
            at = [row["case"]["weight"] for row in limit]
            axes.plot(at, [r["large_n"] for r in limit], color=_GREY, linestyle="--", linewidth=1)
        for row in chosen:
            if row["case"]["weight"] is None and row["kappa"]["median"] is not None:
                axes.axhline(row["kappa"]["median"], color=_GREY, linewidth=1.2, linestyle=":")
        _log(axes, [row["case"]["weight"] for row in swept], _SIDES[side], "weight a of the branch")
    left.set_ylabel(_KAPPA)
    left.plot([], [], color=_GREY, linestyle="--", linewidth=1, label="limit for large n")
    left.plot([], [], color=_GREY, linestyle=":", linewidth=1.2, label="Wz without skip")
    _legend(band, left)


def norm(band: Any, rows: Sequence[Row]) -> None:
    """Forms from top to bottom; inputs and biases, or W, by colour."""
    left, right = band.subplots(1, 2)
    inputs = [_labelled(row, "scheme") for row in rows if row["case"]["side"] == "input"]
    weights = [row for row in rows if row["case"]["side"] == "weight"]
    told = {True: ", bias", False: ""}
    labelled = [
        {
            **row,
            "case": {
                **row["case"],
                "kind": f"{row['case']['inputs']} features{told[row['case']['bias']]}",
            },
        }
        for row in weights
    ]
    _dots(left, inputs, "form", "kind", _SIDES["input"])
    _dots(right, labelled, "form", "kind", _SIDES["weight"])
    for axes in (left, right):
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(
                frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4
            )


def _labelled(row: Row, key: str) -> Row:
    return {**row, "case": {**row["case"], "kind": f"W {row['case'][key]}"}}


def depth(band: Any, rows: Sequence[Row]) -> None:
    """Four panels, families as lines over the number of the block."""
    _families(band, rows, "block", "block, counted from the input", log=False)


def width(band: Any, rows: Sequence[Row]) -> None:
    """Four panels, families as lines over the width."""
    _families(band, rows, "width", "width n", log=True)


def _families(band: Any, rows: Sequence[Row], key: str, label: str, *, log: bool) -> None:
    grid = band.subplots(1, 4, sharey=True)
    names = list(dict.fromkeys(row["case"]["family"] for row in rows))
    panels = [(side, activation) for side in _SIDES for activation in ("tanh", "relu")]
    for axes, (side, activation) in zip(grid, panels, strict=True):
        chosen = _of(rows, side=side, activation=activation)
        for style, name in zip(_STYLES, names, strict=False):
            _line(axes, _of(chosen, family=name), key, style, name)
        title = f"{_SIDES[side]}, {activation}"
        at = sorted({row["case"][key] for row in rows})
        if log:
            _log(axes, at, title, label)
        else:
            _plain(axes, title, label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].set_ylabel(_KAPPA)
    _legend(band, grid[0])


def training(band: Any, rows: Sequence[Row]) -> None:
    """Families from left to right; methods and sides from top to bottom; blocks as lines."""
    rows = [row for row in rows if "block" in row["case"]]
    families = list(dict.fromkeys(row["case"]["family"] for row in rows))
    lanes = [(m, side) for m in methods({"rows": rows}) for side in _SIDES]
    if not families:
        return
    grid = band.subplots(len(lanes), len(families), sharex=True, sharey="row", squeeze=False)
    blocks = sorted({row["case"]["block"] for row in rows})
    for number, (lane, (method, side)) in enumerate(zip(grid, lanes, strict=True)):
        for axes, family in zip(lane, families, strict=True):
            own = _of(rows, method=method, side=side, family=family)
            for style, block in zip(_STYLES, blocks, strict=False):
                _line(axes, _of(own, block=block), "step", style, f"block {block}")
            last = number == len(lanes) - 1
            _plain(axes, "" if number else family, "step" if last else "")
            if not own:
                continue
            axes.set_xscale("symlog", linthresh=1)
            axes.xaxis.set_major_locator(FixedLocator(sorted({r["case"]["step"] for r in rows})))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        name = "back-propagation" if method == "bp" else "back-matching"
        lane[0].set_ylabel(f"{name}\n{_SIDES[side]}\n{_KAPPA}")
    _legend(band, grid[0][0])


def _of(rows: Sequence[Row], **case: object) -> list[Row]:
    return [row for row in rows if case.items() <= row["case"].items()]


def _line(axes: Any, rows: Sequence[Row], key: str, style: tuple[str, str], label: str) -> None:
    rows = [row for row in rows if row["kappa"]["median"] is not None]
    color, marker = style
    at = [row["case"][key] for row in rows]
    low, mid, high = ([row["kappa"][q] for row in rows] for q in ("q10", "median", "q90"))
    axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(at, mid, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)


def _dots(axes: Any, rows: Sequence[Row], down: str, by: str, title: str) -> None:
    """Markers with bars: values of ``down`` on lines of their own, ``by`` slightly apart."""
    rows = [row for row in rows if row["kappa"]["median"] is not None]
    if not rows:
        axes.set_axis_off()
        return
    names = list(dict.fromkeys(row["case"][down] for row in rows))
    kinds = list(dict.fromkeys(row["case"][by] for row in rows))
    for number, ((color, marker), kind) in enumerate(zip(_STYLES, kinds, strict=False)):
        own = [row for row in rows if row["case"][by] == kind]
        shift = 0.2 * (number - (len(kinds) - 1) / 2)
        at = [names.index(row["case"][down]) + shift for row in own]
        mid = [row["kappa"]["median"] for row in own]
        reach = [
            [row["kappa"]["median"] - row["kappa"]["q10"] for row in own],
            [row["kappa"]["q90"] - row["kappa"]["median"] for row in own],
        ]
        axes.errorbar(
            mid, at, xerr=reach, fmt=marker, color=color, markersize=5, linewidth=1.2, label=kind
        )
    _plain(axes, title, _KAPPA)
    axes.set_yscale("linear")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())


def _log(axes: Any, at: Sequence[float], title: str, label: str) -> None:
    _plain(axes, title, label)
    if not axes.has_data() or not at:
        return
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(at) / 1.12, max(at) * 1.12)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(at))))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _plain(axes: Any, title: str, label: str) -> None:
    if not axes.has_data():  # an interrupted study; a logarithmic axis needs a positive value
        axes.set_axis_off()
        return
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#E3E3E3", linewidth=0.6)


def _legend(band: Any, axes: Any, prefix: str = "") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        named = [prefix + label for label in labels]
        band.legend(handles, named, loc="outside right upper", frameon=False, fontsize=9)
