"""``--model``: data in the shape that each network takes, short runs, dry runs, resumption."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_child import finish, signal_at

from backmatch.cli import main
from backmatch.matching import BackMatching
from backmatch.training import checkpoint, data, dryrun, models
from backmatch.training.failures import UsageError


def images(tmp_path: Path, *shape: int) -> str:
    """A file of two classes of images that differ in brightness; 24 train, 8 test."""
    rng = np.random.default_rng(0)
    y = np.arange(32) % 2
    x = rng.standard_normal((32, *shape)).astype("f4") + 2 * y.reshape(-1, *[1] * len(shape))
    path = tmp_path / "images.npz"
    np.savez(path, x_train=x[:24], y_train=y[:24], x_test=x[24:], y_test=y[24:])
    return str(path)


def train(source: str, *words: str) -> list[str]:
    common = ("--batch-size", "8", "--epochs", "1", "--device", "cpu", "--threads", "1")
    return ["train", "--data", source, *common, *words]


RUNS: dict[str, tuple[tuple[int, ...], str]] = {
    "cnn": ((2, 6, 5), "--model cnn"),
    "cnn-sequential": ((6, 6), "--model cnn --order sequential --weights cg"),
    "cnn-layer": ((1, 4, 4), "--model cnn --blocks layer --weights scalar --inputs gradient"),
    "cnn-bp": ((8, 8), "--model cnn --method bp"),
    "resnet20": ((1, 5, 5), "--model resnet20 --weights scalar --inputs gradient --lr 0.1"),
    "vgg11": ((1, 32, 32), "--model vgg11 --weights scalar --inputs gradient --lr 0.01"),
    "vgg11_bn": ((3, 32, 33), "--model vgg11_bn --method bp"),
}


@pytest.mark.parametrize("name", RUNS)
def test_short_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape, words = RUNS[name]
    run = tmp_path / "run"
    source = images(tmp_path, *shape)
    assert main(train(source, *words.split(), "--quiet", "--out", str(run))) == 0
    assert capsys.readouterr() == ("", "")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == words.split()[1]
    assert config["hidden"] is None


def test_a_config_of_a_conv_run_repeats_it(tmp_path: Path) -> None:
    source = images(tmp_path, 1, 6, 6)
    first, second = tmp_path / "1", tmp_path / "2"
    words = ("--model", "cnn", "--method", "bp", "--quiet", "--out")
    assert main(train(source, *words, str(first))) == 0
    config = ["--config", str(first / "config.json"), "--quiet", "--out", str(second)]
    assert main(["train", *config]) == 0
    losses = [json.loads((p / "summary.json").read_text())["test_loss"] for p in (first, second)]
    assert losses[0] == losses[1]


def test_images_without_channels_are_images_of_one(tmp_path: Path) -> None:
    loaded = data.load(images(tmp_path, 6, 5), torch.float32)
    fitted = models.fitted("cnn", "images.npz", loaded)
    assert fitted.x_train.shape == (24, 1, 6, 5)
    assert fitted.x_test.shape == (8, 1, 6, 5)
    assert torch.equal(fitted.x_train[:, 0], loaded.x_train)
    assert models.fitted("mlp", "images.npz", loaded) is loaded


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("cnn", (16,), "(channels, height, width), 4 or more pixels a side, got samples of shape"),
        ("cnn", (1, 3, 8), "shape (1, 3, 8) from --data 'images.npz'; choose --model mlp, or"),
        ("cnn", (2, 2, 8, 8), "choose --model mlp, or other data"),
        ("vgg11", (1, 8, 8), "32 to 63 pixels a side, got samples of shape (1, 8, 8)"),
        ("vgg16_bn", (1, 8, 8), "choose --model mlp, cnn, resnet20, or other data"),
        ("vgg13", (3, 64, 64), "got samples of shape (3, 64, 64)"),
        ("resnet20", (4, 4), "5 or more pixels a side, got samples of shape (4, 4)"),
    ],
)
def test_data_that_does_not_fit(
    name: str, shape: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    loaded = data.load(images(tmp_path, *shape), torch.float32)
    with pytest.raises(UsageError) as caught:
        models.fitted(name, "images.npz", loaded)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("method", ["backmatch", "bp"])
def test_an_interrupted_run_with_batch_norm_ends_in_the_same_bits(
    method: str, tmp_path: Path
) -> None:
    words = ("--model", "cnn", "--method", method, "--quiet", "--out")
    arguments = train(images(tmp_path, 4, 4), *words)
    assert finish([*arguments, str(tmp_path / "whole")]) == 0
    assert signal_at([*arguments, str(tmp_path / "run")], 2, signal.SIGINT) == 130
    assert finish(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    states = [checkpoint.load(tmp_path / name, pytest.fail) for name in ("whole", "run")]
    assert states[0] is not None
    assert states[1] is not None
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key


def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*train(images(tmp_path, 6, 6), *words), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_dry_run_of_a_conv_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = dry_run(tmp_path, capsys, "--model", "cnn")
    rows = [line.split() for line in out.splitlines() if re.match(r"\d ", line)]
    assert [row[:3:2] for row in rows] == [
        ["0", "weights"],
        *[[str(b), side] for b in (1, 2, 3) for side in ("weights", "inputs")],
    ]
    assert re.search(
        r"whole step: \d+ parameters, .* \(median of 5\), .* MiB of tensors at peak", out
    )
    assert "an epoch of 3 steps: about" in out


def test_dry_run_of_a_slow_net_takes_two_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dryrun, "SLOW", 0.0)
    calls = []
    backward = BackMatching.backward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return backward(self, *arguments, **keywords)

    monkeypatch.setattr(BackMatching, "backward", counted)
    out = dry_run(tmp_path, capsys, "--model", "cnn")
    assert len(calls) == 2
    assert "one more measures its memory" in out
    assert "(timed once)" in out


@pytest.mark.slow
def test_cnn_learns_the_digits_in_one_epoch(tmp_path: Path) -> None:
    words = ["--model", "cnn", "--epochs", "1", "--device", "cpu", "--threads", "1", "--quiet"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.95
