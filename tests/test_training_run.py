"""What a run leaves in its folder and says on the way."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import backmatch as bm
from backmatch.cli import main
from backmatch.training import checkpoint, methods, progress
from backmatch.training.config import read_config_file, resolve
from backmatch.training.rundir import default_folder

QUICK = ["train", "--data", "synthetic", "--hidden", "16", "--epochs", "2", "--device", "cpu"]
METHODS = {
    name: ["--batch-size", "512", *words.split()]
    for name, words in {
        "backmatch": "",
        "layer-cg": "--blocks layer --weights cg --inputs cg --dtype float64",
        "sequential": "--order sequential --weights cholesky",
        "scalar": "--weights scalar --inputs gradient --lr 0.1",
        "bp": "--method bp",
        "bp-rmsprop": "--method bp --optimizer rmsprop --momentum 0.5",
    }.items()
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_run_folder(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run"
    assert main([*QUICK, *METHODS[method], "--out", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "epoch 2/2" in captured.out
    assert str(path / "metrics.jsonl") in captured.out
    assert {p.name for p in path.iterdir()} == {
        *("config.json", "metrics.jsonl", "summary.json", "curves.png"),
        *(checkpoint.NEWEST, checkpoint.PREVIOUS),
    }
    rows = lines(path)
    assert [row["kind"] for row in rows] == [*["step"] * 4, "evaluation"] * 2
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [row["epoch"] for row in rows] == [1] * 5 + [2] * 5
    mean = np.mean([row["train_loss"] for row in rows[5:9]])
    assert rows[9]["train_loss"] == pytest.approx(mean)
    if not method.startswith("bp"):
        assert {"residual", "residual_block", "iterations", "converged"} <= rows[0].keys()
    summary = json.loads((path / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["seed"] == 0
    assert summary["parameters"] == 32 * 16 + 16 + 16 * 10 + 10
    for key in ("test_accuracy", "test_loss", "train_loss", "elapsed_seconds"):
        assert summary[key] == rows[9][key]
    assert set(summary["versions"]) == {"backmatch", "torch", "numpy"}
    config = read_config_file(path / "config.json")
    assert config["device"] == "cpu"
    assert config["threads"] >= 1


def test_picture_is_a_png_of_readme_size(tmp_path: Path) -> None:
    assert main([*QUICK, *METHODS["bp"], "--quiet", "--out", str(tmp_path)]) == 0
    content = (tmp_path / "curves.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 525)


def test_quiet_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *METHODS["bp"], "--quiet", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("", "")


def test_config_of_a_run_repeats_it(tmp_path: Path) -> None:
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    assert main([*QUICK, *METHODS["backmatch"], "--quiet", "--out", str(first)]) == 0
    repeat = ["train", "--config", str(first / "config.json"), "--quiet", "--out"]
    assert main([*repeat, str(second)]) == 0
    assert main([*repeat, str(third), "--seed", "1"]) == 0
    accuracies = [row["test_accuracy"] for p in (first, second, third) for row in lines(p)[-1:]]
    losses = [row["train_loss"] for p in (first, second, third) for row in lines(p)[-1:]]
    assert accuracies[0] == accuracies[1]
    assert losses[0] == losses[1] != losses[2]


def test_a_used_folder_is_told_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*QUICK, *METHODS["bp"], "--out", str(tmp_path)]
    (tmp_path / "notes.txt").write_text("mine")  # a folder without config.json is used
    (tmp_path / "summary.json").write_text("of a run that lost its config.json")
    assert main(arguments) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 8
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(arguments) == 2
    assert f"--resume {tmp_path}" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, *METHODS["bp"], "--quiet"]) == 0
    assert main([*QUICK, *METHODS["bp"], "--quiet"]) == 0
    names = ["synthetic-mlp-bp-seed0", "synthetic-mlp-bp-seed0-2"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == names
    odd = resolve({"data": "../../etc/a b\n.npz"})
    assert default_folder(odd) == Path("runs/a_b_-mlp-backmatch-seed0")


def test_training_on_a_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 2, 3)).astype("float32")
    y = (x.sum((1, 2)) > 0).astype("uint8")
    np.savez(
        tmp_path / "data.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:]
    )
    arguments = ["train", "--data", str(tmp_path / "data.npz"), "--hidden", "none", "--quiet"]
    assert main([*arguments, "--batch-size", "50", "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.9
    assert summary["parameters"] == 14


def test_bad_data_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04")
    arguments = ["train", "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["backmatch", "bp"])
def test_failed_run(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explode = [*METHODS[method], "--lr", "1e30", "--out", str(tmp_path), "--quiet"]
    assert main([*QUICK, *explode]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 2 (epoch 1) failed: " in error
    assert "non-finite" in error
    assert "lower --lr" in error
    assert not (tmp_path / "summary.json").exists()


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "backmatch.training.curves", raising=False)
    monkeypatch.delattr("backmatch.training.curves", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*QUICK, *METHODS["bp"], "--out", str(tmp_path)]) == 0
    assert "none: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()


class Terminal:
    def isatty(self) -> bool:
        return True


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(progress, "_HAS_RICH", False)
    assert isinstance(progress.create(quiet=False), progress.Lines)
    assert isinstance(progress.create(quiet=True), progress.Silent)


def test_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    bar = progress.Bar()
    row = {"step": 2, "train_loss": 1.5, "test_loss": 1.25, "test_accuracy": 0.5}
    bar.start(total=4, done=0, epochs=2)
    bar.step(2, 0.123456)
    bar.evaluation(1, row, elapsed=1.0)
    bar._bar.refresh()
    text = "".join(segment.text for segment in bar._console.render(bar._bar.get_renderable()))
    bar.stop()
    assert "2/4" in text
    assert "loss 0.1235  accuracy 0.5000" in text
    assert "ETA" in text
    assert "epoch 1/2  train loss 1.5000  test loss 1.2500" in capsys.readouterr().out


def test_plain_lines_tell_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    plain = progress.Lines()
    plain.start(total=4, done=0, epochs=2)
    row = {"step": 1, "train_loss": 1.5, "test_loss": 1.25, "test_accuracy": 0.5}
    plain.evaluation(1, row, elapsed=2.0)
    assert capsys.readouterr().out.endswith("test accuracy 0.5000  2.00 s  ETA 6.00 s\n")


@pytest.mark.parametrize("method", METHODS)
def test_dry_run(
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, *METHODS[method], "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "whole step: 698 parameters" in captured.out
    assert not list(tmp_path.iterdir())
    if not method.startswith("bp"):
        table = [line.split() for line in captured.out.splitlines()]
        assert ["block", "parameters", "side"] in [line[:3] for line in table]
        assert sum("weights" in line for line in table) == 2
        assert sum("inputs" in line for line in table) == (
            2 if "--blocks" in METHODS[method] else 1
        )


@pytest.mark.parametrize("order", [(0.5, float("nan"), 0.25), (float("nan"), 0.5, 0.25)])
def test_a_residual_that_overflowed_is_not_taken_for_a_small_one(order: tuple[float, ...]) -> None:
    records = [bm.SolveRecord("cg", "unit", 1, 1, residual=value) for value in order]
    blocks = [bm.BlockReport(str(b), 1.0, 1.0, record, None) for b, record in enumerate(records)]
    step = bm.Step(torch.zeros(()), torch.zeros(1, 1), blocks)
    found = methods.summarize(step)
    bad = next(b for b, value in enumerate(order) if value != value)
    assert (found["residual"], found["residual_block"]) == (None, f"{bad} weights")
    step = bm.Step(torch.zeros(()), torch.zeros(1, 1), [blocks[b] for b in range(3) if b != bad])
    assert methods.summarize(step)["residual"] == 0.5
