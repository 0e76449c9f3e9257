"""``--activation``, ``--inputs layer-inverse`` and ``--cg-steps`` of ``backmatch train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_usage import refused
from torch import nn
from torch.nn.functional import cross_entropy

import backmatch as bm
from backmatch.cli import main
from backmatch.training import methods
from backmatch.training.config import resolve
from backmatch.training.options import ACTIVATIONS, INVERTIBLE
from backmatch.training.run import create_trainer, settle

SMALL = {"data": "synthetic", "hidden": [7, 6], "batch_size": 64, "device": "cpu"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--activation swish", "--activation: expected one of relu, leaky_relu, tanh, sigmoid"),
        ("--model cnn --activation tanh", "--activation has no effect with --model cnn; drop it"),
        ("--inputs layer-inverse", "with --activation leaky_relu, tanh, sigmoid, softplus, elu"),
        ("--inputs layer-inverse --activation gelu", "got --activation gelu"),
        ("--inputs layer-inverse --model cnn", "expected --model mlp with --activation"),
        (
            "--inputs layer-inverse --activation tanh --blocks layer",
            "every activation in one block with its Linear, got --blocks layer",
        ),
        ("--weights layer-inverse", "--weights: expected one of auto, cholesky, cg, scalar"),
        ("--cg-steps 2", "--cg-steps has no effect unless --weights or --inputs is cg; drop it"),
        ("--cg-steps 0 --weights cg", "--cg-steps: expected 1 to"),
        ("--method bp --cg-steps 2", "--cg-steps has no effect with --method bp; drop it"),
    ],
)
def test_wrong_words(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(["train", *words.split()], capsys)


MODULES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_the_mlp(name: str) -> None:
    kinds = [type(layer) for layer in bm.models.mlp(3, (4, 5), 2, activation=name)]
    assert kinds == [nn.Linear, MODULES[name], nn.Linear, MODULES[name], nn.Linear]
    trainer = create_trainer(settle(resolve({**SMALL, "activation": name})))
    x, y = next(trainer.batches(0))
    trainer.method(x, y)
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert [type(layer) for layer in trainer.model] == kinds


def test_unknown_activation_of_the_mlp() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of relu, .*, got 'swish'"):
        bm.models.mlp(3, activation="swish")


def test_default_activation_keeps_the_weights_of_earlier_versions() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    torch.manual_seed(0)
    made = bm.models.mlp(3, (4,), 2)
    for p, q in zip(made.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resolve({}).activation == "relu"
    assert resolve({"model": "cnn"}).activation is None


@pytest.mark.parametrize("activation", INVERTIBLE)
def test_layer_inverse_is_the_solver(activation: str) -> None:
    options: dict[str, Any] = {**SMALL, "activation": activation, "inputs": "layer-inverse"}
    trainer = create_trainer(settle(resolve({**options, "dtype": "float64"})))
    x, y = next(trainer.batches(0))
    trainer.method(x, y)
    got = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.optimizer.zero_grad()
    matcher = bm.BackMatching(
        bm.partition(trainer.model), inputs=bm.LayerInverse(bm.Relative(0.01))
    )
    matcher.backward(x, lambda out: cross_entropy(out, y))
    torch.testing.assert_close(got, [p.grad for p in trainer.model.parameters()], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["weights", "inputs"])
def test_cg_steps_reach_the_sides_that_are_cg(side: str) -> None:
    config = resolve({side: "cg", "cg_steps": 3})
    solvers = dict(zip(("weights", "inputs"), methods.solvers(config), strict=True))
    assert solvers[side].rtol == 0.0
    assert solvers[side].max_steps == 3
    other = solvers["inputs" if side == "weights" else "weights"]
    assert isinstance(other, bm.Auto)
    assert resolve({side: "cg"}).cg_steps is None


@pytest.mark.usefixtures("two_threads")
def test_a_run_keeps_them_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    words = "train --data synthetic --hidden 6 --activation tanh --weights cg --cg-steps 2"
    words += " --inputs layer-inverse --batch-size 512 --epochs 1 --threads 1 --quiet"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["activation"], saved["cg_steps"], saved["inputs"]) == ("tanh", 2, "layer-inverse")
    resume = ["train", "--resume", str(tmp_path)]
    assert "cg_steps: the run has 2, asked for 3" in refused([*resume, "--cg-steps", "3"], capsys)
    told = refused([*resume, "--activation", "elu"], capsys)
    assert "activation: the run has tanh, asked for elu" in told
    assert main([*resume, "--quiet"]) == 0
    again = ["train", "--config", str(tmp_path / "config.json"), "--dry-run"]
    assert main(again) == 0
    out = capsys.readouterr().out
    assert "layer_inverse" in out
    assert "cg (2 iterations)" in out
