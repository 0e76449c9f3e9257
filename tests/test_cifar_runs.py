"""Runs on a tiny CIFAR from the command line: results, resume to the bit, dry runs, recipes."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import fake_cifar
import numpy as np
import pytest
import torch
from cli_child import finish, kill_at, signal_at
from run_cases import assert_same_run, rows, state

from backmatch.cli import main
from backmatch.training import run
from backmatch.training.config import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cifar") / "data"
    fake_cifar.write(path, "cifar10", "python", per_file=24, form="archive")
    fake_cifar.write(path, "cifar100", "binary", per_file=100)
    return path


def arguments(folder: Path, *more: str, data: str = "cifar10") -> list[str]:
    return [
        *("train", "--data", data, "--data-dir", str(folder), "--model", "cnn"),
        *("--batch-size", "32", "--epochs", "2", "--device", "cpu", "--threads", "1", *more),
    ]


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_a_run(data: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--weights", "auto", "--inputs", "gradient", "--out", str(tmp_path / "run")]
    assert main(arguments(folder, *words, data=data)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"note: {data} here is a stand-in with" in captured.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"], config["data_dir"], config["augment"]) == (
        data,
        str(folder),
        "standard",
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 * (5 * 24 // 32 if data == "cifar10" else 100 // 32)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


def test_a_net_learns_the_patterns(folder: Path, tmp_path: Path) -> None:
    """Labels and images belong together, and the test images are prepared as the others are."""
    words = ["--model", "mlp", "--hidden", "none", "--augment", "none", "--quiet"]
    assert finish(arguments(folder, *words, "--out", str(tmp_path))) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] > 0.9


def test_default_folder_and_mlp(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(folder)  # the default of --data-dir
    words = ["train", "--data", "cifar10", "--hidden", "8", "--method", "bp", "--batch-size", "60"]
    assert main([*words, "--epochs", "1", "--quiet", "--threads", "1"]) == 0
    assert (tmp_path / "runs" / "cifar10-mlp-bp-seed0" / "summary.json").exists()


SCHEDULED = {
    "cosine": ["--method", "bp", "--schedule", "cosine", "--weight-decay", "5e-4"],
    "step": ["--method", "bp", "--schedule", "step", "--optimizer", "adam"],
    "scale-amended": [
        *("--method", "bp", "--optimizer", "scale-amended", "--scale-every", "2"),
        *("--schedule", "cosine", "--weight-decay", "5e-4"),
    ],
    "exact": ["--model", "mlp", "--hidden", "12", "--schedule", "cosine"],
}


@pytest.mark.parametrize("kind", SCHEDULED)
def test_resume_is_bit_exact_with_augmentation_and_schedule(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    words = arguments(folder, *SCHEDULED[kind], "--quiet")
    assert finish([*words, "--out", str(tmp_path / "whole")]) == 0
    path = tmp_path / "run"
    assert kill_at([*words, "--out", str(path)], None, 12) == -signal.SIGKILL
    assert finish(["train", "--resume", str(path), "--quiet"]) == 0
    assert_same_run(path, tmp_path / "whole")
    assert len(rows(path)) == 8


def test_interrupted_within_an_epoch(folder: Path, tmp_path: Path) -> None:
    words = arguments(folder, *SCHEDULED["cosine"], "--quiet")
    assert finish([*words, "--out", str(tmp_path / "whole")]) == 0
    path = tmp_path / "run"
    assert signal_at([*words, "--out", str(path)], 2, signal.SIGINT) == 130
    assert state(path)["position"]["step"] == 2
    assert finish(["train", "--resume", str(path), "--quiet"]) == 0
    assert_same_run(path, tmp_path / "whole")


def test_other_images_are_not_continued(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, path = tmp_path / "data", tmp_path / "run"
    fake_cifar.write(data, "cifar10", "binary", per_file=24)
    words = arguments(data, *SCHEDULED["cosine"], "--quiet", "--out", str(path))
    assert kill_at(words, None, 12) == -signal.SIGKILL
    one = data / "cifar-10-batches-bin" / "test_batch.bin"
    one.write_bytes(one.read_bytes()[:-1] + b"\0")
    assert main(["train", "--resume", str(path), "--quiet"]) == 2
    assert "data: the values are not those the run began with" in capsys.readouterr().err


def test_augmentation_changes_the_run_and_not_dropout(folder: Path) -> None:
    """The global generator gives the same with and without."""
    given: dict[str, Any] = {"data": "cifar10", "data_dir": str(folder), "model": "cnn"}
    given |= {"device": "cpu", "threads": 1, "batch_size": 32, "method": "bp"}
    threads = torch.get_num_threads()
    try:
        drawn = []
        batches = []
        for augment in ("none", "standard"):
            trainer = run.create_trainer(run.settle(resolve(given, {"augment": augment})))
            batches.append(list(trainer.batches(0)))
            drawn.append(torch.rand(3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)
    for (x, y), (moved, labels) in zip(*batches, strict=True):
        assert torch.equal(y, labels)
        assert not torch.equal(x, moved)


def test_augmentation_needs_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    y = np.zeros(4, int)
    for shape, code in (((4, 6), 2), ((4, 6, 6), 2), ((4, 2, 6, 6), 0)):
        x = np.random.default_rng(0).random(shape)
        np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        words = ["--batch-size", "2", "--epochs", "1", "--augment", "standard", "--hidden", "3"]
        out = tmp_path / f"run{len(shape)}"
        assert main(["train", "--data", str(tmp_path / "x.npz"), *words, "--out", str(out)]) == code
        told = capsys.readouterr().err
        assert ("expected images of shape (channels, height, width)" in told) == (code == 2)


@pytest.mark.parametrize("method", ["bp", "backmatch"])
def test_dry_run(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", method, "--dry-run"]
    if method == "backmatch":
        words += ["--inputs", "gradient"]
    assert main(arguments(folder, *words)) == 0
    out = capsys.readouterr().out
    assert "cnn on cifar10: batch 32, 3 steps an epoch" in out
    assert "stand-in" in out
