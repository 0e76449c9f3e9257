"""Stored runs for the tests of ``backmatch plot``."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
from matplotlib.figure import Figure

from backmatch.cli import main
from backmatch.plotting import run_page, stored_run, style

CONFIG = {
    **{"data": "digits", "model": "mlp", "hidden": [8], "method": "backmatch", "seed": 0},
    **{"weights": "auto", "inputs": "auto", "optimizer": "sgd", "lr": 1.0, "epochs": 2},
}


def spread(value: float) -> dict[str, float]:
    return {"min": value / 2, "median": value, "max": 2 * value}


def side(value: float, iterations: int = 0) -> dict[str, Any]:
    names = ("gradient", "scalar", "local_gradient", "local_scalar", "adam")
    return {
        **{
            "solver": "cg",
            "iterations": iterations,
            "residual": 1e-6,
            "damping": spread(value),
        },
        "cosine": dict.fromkeys(names, 0.5 / value),
        "ratio": dict.fromkeys(names, value),
        "spectrum": {
            **{"exact": value < 3, "condition": spread(10 * value)},
            "condition_damped": spread(5 * value),
        },
    }


def report(b: int, step: int) -> dict[str, Any]:
    value = 1.0 + b + step / 10
    move = {"ratio": value / 20, "cosine": 0.5}
    return {
        **{"block": str(b), "requested": value, "local": move, "joint": move, "propagated": move},
        "loss": {"before": value, "after_weights": value / 2, "after_both": None},
        **{"weight": side(value), "input": side(value, 7 * step) if b else None},
    }


def run_rows(blocks: int = 3, epochs: int = 2, steps: int = 4) -> list[dict[str, Any]]:
    found = []
    for epoch in range(1, epochs + 1):
        for i in range(1, steps + 1):
            step = (epoch - 1) * steps + i
            found.append({"kind": "step", "step": step, "epoch": epoch, "train_loss": 2 / step})
            if blocks and step % 2 == 0:
                reports = [report(b, step) for b in range(blocks)]
                found.append({"kind": "probe", "step": step, "epoch": epoch, "blocks": reports})
        end = {"step": epoch * steps, "epoch": epoch, "elapsed_seconds": 0.5 * epoch}
        scores = {"test_loss": 1 / epoch, "train_accuracy": 0.8, "test_accuracy": 0.9}
        found.append({"kind": "evaluation", **end, **scores, "train_loss": 1.0})
    return found


def store(
    path: Path, rows: list[Any] | None = None, *, finished: bool = True, **config: Any
) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    lines = [json.dumps(row) + "\n" for row in (run_rows() if rows is None else rows)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if finished:
        (path / "summary.json").write_text("{}")
    return path


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def words_of(figure: Figure) -> list[str]:
    texts = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in texts if text.get_text()]


def page_of(path: Path) -> Figure:
    run = stored_run.read(path)
    with style.context():
        return run_page._probed(run) if run.probed else run_page._plain(run)


def told(capsys: pytest.CaptureFixture[str], *folders: Path, code: int = 2) -> str:
    """What a command that fails says: one line, and no figure."""
    assert main(["plot", *map(str, folders)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("backmatch: ")
    assert captured.err.count("\n") == 1
    assert not (folders[0] / "plot.png").exists()
    return captured.err
