"""The page of one run: loss and accuracy, and small multiples of what its probes saw."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from . import style
from .block_panels import LOSSES, SECTIONS, colors, draw
from .stored_run import StoredRun

#: Inches: a panel, what stands left of it and right of it, between rows, and the two headings.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _GAP, _HEADING, _TOP = 1.85, 1.2, 0.62, 0.36, 0.45, 0.3, 0.62
_COLUMNS = 5
_DPI = 120


def page(run: StoredRun) -> bytes:
    """The figure as a PNG; the same rows give the same bytes."""
    with style.context():
        return style.save(_probed(run) if run.probed else _plain(run))


def _probed(run: StoredRun) -> Figure:
    rows = 1 + len(SECTIONS)
    high = _TOP + rows * (_HEADING + _HEIGHT + _GAP)
    wide = _COLUMNS * (_LEFT + _WIDTH + _RIGHT)
    figure = Figure(figsize=(wide, high), dpi=_DPI)

    def axes_at(row: int, column: int) -> Any:
        left = column * (_LEFT + _WIDTH + _RIGHT) + _LEFT
        bottom = high - _TOP - (row + 1) * (_HEADING + _HEIGHT) - row * _GAP
        box = (left / wide, bottom / high, _WIDTH / wide, _HEIGHT / high)
        return figure.add_axes(box)

    def heading(row: int, text: str) -> None:
        y = 1 - (_TOP + row * (_HEADING + _HEIGHT + _GAP) - 0.02) / high
        figure.text(0.14 / wide, y, text, fontsize=9, fontweight="bold", va="top")

    _title(figure, run, wide, high)
    heading(0, "the run, and every block's own loss")
    _draw_loss(axes_at(0, 0), run)
    _draw_accuracy(axes_at(0, 1), run)
    for column, panel in enumerate(LOSSES, 2):
        draw(axes_at(0, column), run, panel, 72 * _HEIGHT)
    for row, (text, panels) in enumerate(SECTIONS, 1):
        heading(row, text)
        for column, panel in enumerate(panels):
            axes = axes_at(row, column)
            draw(axes, run, panel, 72 * _HEIGHT)
            if row == rows - 1 and axes.has_data():
                axes.set_xlabel("step")
    return figure


def _plain(run: StoredRun) -> Figure:
    wide, high = 8.0, 3.6
    figure = Figure(figsize=(wide, high), dpi=150)
    for column, draw_it in enumerate((_draw_loss, _draw_accuracy)):
        axes = figure.add_axes((0.075 + 0.5 * column, 0.13, 0.41, 0.66))
        draw_it(axes, run)
        axes.set_xlabel("step")
    _title(figure, run, wide, high)
    return figure


def _draw_loss(axes: Any, run: StoredRun) -> None:
    axes.set_title("cross-entropy (nats)", loc="left", pad=4)
    # A step's loss is taken before its update, so step k stands at k - 1.
    steps, losses = style.thin([step - 1 for step in run.steps], style.drawable(run.losses))
    axes.plot(steps, losses, color=style.GREY, linewidth=0.9, label="batch")
    found = run.evaluations
    marker = "s" if len(found.steps) <= 40 else None
    tested = style.drawable(found.test_loss)
    axes.plot(found.steps, tested, color=style.ORANGE, marker=marker, markersize=3, label="test")
    logarithmic = style.scale(axes, [*losses, *tested], log=True)
    if not logarithmic:
        axes.set_ylim(bottom=0)
    _finish(axes, run)
    _name_lines(axes)


def _draw_accuracy(axes: Any, run: StoredRun) -> None:
    axes.set_title("accuracy (%)", loc="left", pad=4)
    found = run.evaluations
    if not found.steps:
        axes.text(
            *(0.5, 0.5, "no evaluation yet"),
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=style.GREY,
        )
    for values, color, marker, label in (
        (found.train_accuracy, style.BLUE, "o", "training"),
        (found.test_accuracy, style.ORANGE, "s", "test"),
    ):
        axes.plot(
            found.steps,
            style.drawable([100 * value for value in values]),
            color=color,
            marker=marker if len(found.steps) <= 40 else None,
            markersize=3,
            clip_on=False,
            label=label,
        )
    axes.set_ylim(top=100)
    _finish(axes, run)
    if found.steps:
        _name_lines(axes)


def _name_lines(axes: Any) -> None:
    """In their colours beside the title: a legend would cover lines in a panel that small."""
    offset = 0.0
    for line in reversed(axes.get_lines()):
        label = str(line.get_label())
        axes.annotate(
            label,
            (1, 1),
            xytext=(-offset, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            color=line.get_color(),
            fontsize=7,
            ha="right",
        )
        offset += 4.0 * len(label) + 5


def _finish(axes: Any, run: StoredRun) -> None:
    axes.set_xlim(0, max(run.steps[-1], 1))
    style.step_axis(axes, 5)
    style.grid(axes)


def _title(figure: Figure, run: StoredRun, wide: float, high: float) -> None:
    figure.text(0.14 / wide, 1 - 0.1 / high, _headline(run), fontsize=11, va="top")
    figure.text(
        *(0.14 / wide, 1 - 0.33 / high, _second_line(run)),
        fontsize=8,
        color="#505050",
        va="top",
    )
    if run.probed:
        _key(figure, run, wide, high)


def _headline(run: StoredRun) -> str:
    config = run.config
    method = "back-propagation"
    if config.get("method") == "backmatch":
        method = f"back-matching (weights {config.get('weights')}, inputs {config.get('inputs')})"
    end = ""
    if run.evaluations.steps and math.isfinite(run.evaluations.test_accuracy[-1]):
        end = f": test accuracy {100 * run.evaluations.test_accuracy[-1]:.1f} %"
    parts = [config.get("data"), config.get("model"), method]
    parts.append(f"{config.get('optimizer')} lr {config.get('lr')}")
    return ", ".join(style.plain(part) for part in parts) + end


def _second_line(run: StoredRun) -> str:
    state = f"{run.steps[-1]} steps"
    if not run.finished:
        state = f"unfinished: {run.steps[-1]} steps so far"
    words = [f"seed {style.plain(run.config.get('seed'))}", state]
    if run.probed:
        words.append(f"{len(run.probed)} probes")
        if run.config.get("method") == "bp":
            words.append("the step probed is the exact one, which this run does not take")
    if run.failures:
        step, reason = run.failures[0]
        words.append(f"{len(run.failures)} probes failed, at step {step}: {style.plain(reason)}")
    return ", ".join(words)


def _key(figure: Figure, run: StoredRun, wide: float, high: float) -> None:
    """The colour scale of the blocks, at the top right."""
    hues, width = colors(len(run.blocks)), min(0.2, 2.6 / len(run.blocks))
    right = wide - 0.3
    left = right - width * len(hues) - 0.32
    axes = figure.add_axes(
        (left / wide, 1 - 0.3 / high, width * len(hues) / wide, 0.14 / high), frameon=False
    )
    axes.imshow([hues], aspect="auto", extent=(0, len(hues), 0, 1))
    axes.set_xticks([])
    axes.set_yticks([])
    for x, side, text in (
        (left - 0.05, "right", f"block {style.plain(run.blocks[0], 12)} (bottom)"),
        (left + width * len(hues) + 0.05, "left", f"{style.plain(run.blocks[-1], 4)} (top)"),
    ):
        figure.text(x / wide, 1 - 0.23 / high, text, ha=side, va="center", fontsize=7.5)
