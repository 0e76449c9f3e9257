"""``curves.png``: loss and test accuracy of one run."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from .config import TrainConfig

# Okabe and Ito's palette: told apart with every common colour vision.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"

_RC: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
#: Beyond this many epochs markers would hide the line.
MOST_MARKERS = 40


def draw(rows: list[dict[str, Any]], config: TrainConfig) -> bytes:
    """The figure as a PNG, 1200 x 525 pixels; the same rows give the same bytes.

    Args:
        rows: the rows of ``metrics.jsonl``.
        config: what the title says.
    """
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    per_epoch = len(steps) / max(len(evaluations), 1)
    with matplotlib.style.context(["default", _RC]):  # whatever the user's own file says
        figure = Figure(figsize=(8, 3.5), dpi=150, layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        _draw_loss(loss, steps, evaluations, per_epoch)
        _draw_accuracy(accuracy, evaluations)
        for axes in (loss, accuracy):
            axes.set_xlabel("epoch")
            axes.set_xlim(0, config.epochs)
            axes.locator_params(axis="x", integer=True)
            axes.grid(color="#E3E3E3", linewidth=0.6)
        figure.suptitle(_title(config, evaluations), fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_loss(
    axes: Any, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], per_epoch: float
) -> None:
    # A step's loss is taken before its update, so step k stands at (k - 1) steps.
    axes.plot(
        [(row["step"] - 1) / per_epoch for row in steps],
        [row["train_loss"] for row in steps],
        color=_GREY,
        linewidth=0.9,
        label="training, each batch",
    )
    axes.plot(
        [row["epoch"] for row in evaluations],
        [row["test_loss"] for row in evaluations],
        color=_ORANGE,
        marker="s" if len(evaluations) <= MOST_MARKERS else None,
        markersize=4,
        clip_on=False,
        label="test",
    )
    _log_scale_if_wide(axes, [row["train_loss"] for row in steps])
    axes.set_ylabel("cross-entropy (nats)")
    axes.legend(frameon=False)


def _draw_accuracy(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    epochs = [row["epoch"] for row in evaluations]
    for key, color, marker, label in (
        ("train_accuracy", _BLUE, "o", "training, mean over the epoch"),
        ("test_accuracy", _ORANGE, "s", "test"),
    ):
        axes.plot(
            epochs,
            [100 * row[key] for row in evaluations],
            color=color,
            marker=marker if len(evaluations) <= MOST_MARKERS else None,
            markersize=4,
            clip_on=False,
            label=label,
        )
    axes.set_ylim(top=100)
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, loc="best")


def _log_scale_if_wide(axes: Any, values: list[float]) -> None:
    # Over less than a decade a logarithmic axis has no readable ticks.
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def _title(config: TrainConfig, evaluations: list[dict[str, Any]]) -> str:
    method = "back-propagation"
    if config.method == "backmatch":
        method = f"back-matching (weights {config.weights}, inputs {config.inputs})"
    end = f": test accuracy {100 * evaluations[-1]['test_accuracy']:.1f} %" if evaluations else ""
    rate = f"lr {config.lr:g}" + ("" if config.schedule == "constant" else f" {config.schedule}")
    return f"{config.data}, {config.model}, {method}, {config.optimizer} {rate}{end}"
