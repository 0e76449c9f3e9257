"""2,000 steps: memory, objects, hooks and logs stay where they were after the first ones."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import backmatch as bm

STEPS = 2000
#: Steps after which everything that is built once has been built.
WARM_UP = 200
MEBIBYTE = 2**20


def resident_bytes() -> int:
    """Memory of this process that is really in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def census() -> tuple[int, int]:
    """Objects and tensors that the garbage collector knows."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(thing), torch.Tensor) for thing in objects)


@pytest.mark.slow
@pytest.mark.parametrize("route", ["structured", "generic"])
def test_memory_does_not_grow_over_2000_steps(route: str, one_thread: None) -> None:
    torch.manual_seed(0)
    first: nn.Module = nn.Linear(16, 24)
    if route == "generic":
        first.register_forward_hook(lambda module, args, out: None)  # takes the general way
    model = nn.Sequential(
        nn.Sequential(first, nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Linear(24, 4), nn.Tanh()),
    ).double()
    steps = STEPS if route == "structured" else STEPS // 20
    x, y = torch.randn(32, 16).double(), torch.randn(32, 4).double()
    matcher = bm.BackMatching(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for number in range(steps):
        optimizer.zero_grad()
        matcher.backward(x, lambda out: (out - y).square().sum(1).mean())
        optimizer.step()
        if number == min(WARM_UP, steps // 2):
            before, memory = census(), resident_bytes()
    after = census()
    assert after[1] <= before[1]
    assert after[0] <= before[0] + 50
    assert resident_bytes() <= memory + 4 * MEBIBYTE
    assert len(first._forward_hooks) == (route == "generic")


@pytest.mark.slow
def test_a_log_holds_one_bounded_row_per_step(tmp_path: Path) -> None:
    """Rows do not grow with the run, and checkpoints stay at two of one size."""
    from backmatch.cli import main

    sizes = {}
    for epochs in (5, 50):
        path = tmp_path / str(epochs)
        run = ["train", "--data", "synthetic", "--hidden", "8", "--batch-size", "512", "--quiet"]
        assert main([*run, "--method", "bp", "--epochs", str(epochs), "--out", str(path)]) == 0
        rows = (path / "metrics.jsonl").read_text().splitlines()
        steps = json.loads((path / "summary.json").read_text())["steps"]
        assert len(rows) == steps + epochs
        assert max(map(len, rows)) < 400
        assert len(list(path.glob("checkpoint*"))) == 2
        sizes[epochs] = (path / "checkpoint.pt").stat().st_size
    assert sizes[50] <= sizes[5] + 200
