"""One small run by every method, and whether two runs left the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backmatch.training import checkpoint

ARGUMENTS = [
    *("train", "--data", "synthetic", "--hidden", "16", "--batch-size", "512"),
    *("--epochs", "3", "--device", "cpu", "--threads", "1", "--quiet"),
]
METHODS = {
    "backmatch": ["--method", "backmatch"],
    "bp-adam": ["--method", "bp", "--optimizer", "adam"],
}


def arguments(method: str, out: Path) -> list[str]:
    return [*ARGUMENTS, *METHODS[method], "--out", str(out)]


def resume(path: Path) -> list[str]:
    return ["train", "--resume", str(path), "--quiet"]


def rows(path: Path) -> list[dict[str, Any]]:
    """The log without its wall-clock fields."""
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith(("_ms", "_seconds"))}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]


def state(path: Path) -> dict[str, Any]:
    payload = checkpoint.load(path, note=pytest.fail)
    assert payload is not None
    return payload


def assert_same(got: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            if key not in ("elapsed_seconds", "metrics_bytes"):
                assert_same(got[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


def assert_same_run(path: Path, whole: Path) -> None:
    assert rows(path) == rows(whole)
    assert_same(state(path), state(whole))
    summaries = [json.loads((p / "summary.json").read_text()) for p in (path, whole)]
    for summary in summaries:
        for key in [key for key in summary if key.endswith(("_ms", "_seconds"))]:
            del summary[key]
    assert summaries[0] == summaries[1]
    assert not list(path.glob(".*.tmp"))
