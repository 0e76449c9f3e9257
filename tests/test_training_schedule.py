"""Learning rates over a run, and weight decay on its way to the optimizer."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backmatch.cli import main
from backmatch.training import optimizers, schedules
from backmatch.training.config import resolve

ARGUMENTS = [
    *("train", "--data", "synthetic", "--hidden", "8", "--batch-size", "512", "--epochs", "3"),
    *("--method", "bp", "--lr", "0.5", "--device", "cpu", "--threads", "1", "--quiet"),
]


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_rates_of_a_run(name: str, tmp_path: Path, one_thread: None) -> None:
    assert main([*ARGUMENTS, "--schedule", name, "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row["kind"] == "step"]
    rates = [row.get("lr", 0.0) for row in steps]
    expected = {
        "constant": [0.0] * 12,
        "cosine": [0.5 * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)],
        "step": [0.5] * 6 + [0.05] * 3 + [0.005] * 3,
    }[name]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_the_step_uses_the_rate_that_is_logged() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    schedule = schedules.create("cosine", optimizer, 5)
    for _ in range(5):
        before = weight.item()
        weight.grad = torch.ones(1)
        rate = schedule.rate()["lr"]
        optimizer.step()
        schedule.step()
        assert before - weight.item() == pytest.approx(rate, rel=1e-5)
    assert schedule.rate()["lr"] == 0.0


def test_a_schedule_taken_up_goes_on_as_if_never_left() -> None:
    def start() -> tuple[torch.optim.Optimizer, schedules.Constant | schedules.Scheduled]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, schedules.create("cosine", optimizer, 9)

    optimizer, schedule = start()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again, resumed = start()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(5):
        assert resumed.rate() == schedule.rate()
        assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for one, its in ((optimizer, schedule), (again, resumed)):
            one.step()
            its.step()


@given(st.integers(1, 10**6), st.data())
def test_factors_fall_from_one_and_stay_positive(total: int, data: st.DataObject) -> None:
    done = data.draw(st.integers(0, total - 1))
    for factor in schedules.FACTORS.values():
        assert factor(0, total) == 1
        assert 0 < factor(done, total) <= 1
        assert factor(min(done + 1, total - 1), total) <= factor(done, total)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_reaches_the_optimizer(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    for asked, expected in (({}, 0.01 if name == "adamw" else 0.0), ({"weight_decay": 0.25}, 0.25)):
        config = resolve({"method": "bp", "optimizer": name, **asked})
        optimizer = optimizers.OPTIMIZERS[name](model, config)
        assert {group["weight_decay"] for group in optimizer.param_groups} == {expected}
        assert config.weight_decay == expected
        optimizers.close(optimizer)


def test_weight_decay_changes_a_run(tmp_path: Path, one_thread: None) -> None:
    losses = []
    for i, decay in enumerate(("0", "0.1")):
        out = tmp_path / str(i)
        assert main([*ARGUMENTS, "--weight-decay", decay, "--out", str(out)]) == 0
        losses.append(json.loads((out / "summary.json").read_text())["train_loss"])
    assert losses[1] > losses[0]
