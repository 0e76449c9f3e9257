"""``backmatch train --optimizer scale-amended | layerwise-adaptive``."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from cli_child import finish, kill_at, signal_at
from optim_cases import hook_tables
from run_cases import assert_same_run, resume, state

from backmatch.cli import main
from backmatch.training.config import read_config_file, resolve, to_json
from backmatch.training.options import SCALED_OPTIMIZERS

SMALL = [
    *("train", "--method", "bp", "--data", "synthetic", "--hidden", "16", "--batch-size", "512"),
    *("--epochs", "3", "--device", "cpu", "--threads", "1", "--quiet"),
]
RUNS = {
    "scale-amended": [
        "--scale-every",
        "3",
        "--scale-estimate",
        "hutchinson",
        "--scale-average",
        "0.7",
        "--momentum",
        "0.5",
    ],
    "layerwise-adaptive": ["--scale-kind", "rayleigh", "--normalize", "off", "--lr", "0.1"],
}


def arguments(name: str, out: Path) -> list[str]:
    return [*SMALL, "--optimizer", name, *RUNS[name], "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_exactly(name: str, tmp_path: Path) -> None:
    """Stopped and killed between two measurements of the scales."""
    whole, path, killed = (tmp_path / each for each in ("whole", "run", "killed"))
    assert finish(arguments(name, whole)) == 0
    assert signal_at(arguments(name, path), 4, signal.SIGINT) == 130
    assert finish(resume(path)) == 0
    assert_same_run(path, whole)
    assert kill_at(arguments(name, killed), None, 14) == -signal.SIGKILL
    assert finish(resume(killed)) == 0
    assert_same_run(killed, whole)
    saved = state(path)["optimizer"]["scales"]
    assert saved["steps"] == json.loads((path / "summary.json").read_text())["steps"]
    assert all(c > 0 for _, _, c in saved["values"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_leaves_no_hook(name: str, tmp_path: Path) -> None:
    assert main(arguments(name, tmp_path / "run")) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row["train_loss"] for row in rows if row["kind"] == "step"]
    assert steps[-1] < 0.95 * steps[0]
    assert hook_tables(torch.nn.ReLU()) == ([], [])


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL[:-1], "--optimizer", "scale-amended", "--dry-run"]
    assert main(given) == 0
    assert "whole step" in capsys.readouterr().out
    assert hook_tables(torch.nn.ReLU()) == ([], [])


def test_a_step_that_fails_names_its_own_damping(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments("layerwise-adaptive", tmp_path / "run"), "--lr", "1e30"]
    assert main(given) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--scale-damping" in error or "lower --lr" in error


@pytest.mark.parametrize("name", SCALED_OPTIMIZERS)
def test_defaults(name: str, tmp_path: Path) -> None:
    config = resolve({"method": "bp", "optimizer": name})
    assert (config.lr, config.momentum, config.blocks) == (0.1, 0.9, "activation")
    assert (config.scale_kind, config.scale_damping, config.scale_every) == ("trace", 0.0, 10)
    assert (config.scale_estimate, config.scale_probes) == ("exact", None)
    few = resolve({"method": "bp", "optimizer": name, "scale_estimate": "hutchinson"})
    assert few.scale_probes == 8
    assert (config.scale_average, config.normalize) == (0.0, True)
    bare = resolve({"method": "bp", "optimizer": name, "normalize": False, "blocks": "layer"})
    assert (bare.lr, bare.momentum, bare.blocks, bare.normalize) == (1.0, 0.0, "layer", False)
    for each in (config, bare, few):
        path = tmp_path / "config.json"
        path.write_text(to_json(each))
        assert resolve(read_config_file(path)) == each
    path.write_text("normalize: off\nmethod: bp\noptimizer: " + name)
    assert resolve(read_config_file(path)).normalize is False


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--optimizer scale-amended", "--optimizer scale-amended divides the gradients of "
         "back-propagation; add --method bp"),
        ("--scale-kind trace", "--scale-kind has no effect with --optimizer sgd; drop it"),
        ("--method bp --normalize off", "--normalize has no effect with --optimizer sgd; drop it"),
        ("--method bp --blocks layer", "--blocks has no effect with --method bp; drop it"),
        ("--method bp --optimizer scale-amended --damping 1", "--damping has no effect"),
        ("--method bp --optimizer scale-amended --scale-damping rel:0.1", "a number >= 0"),
        ("--method bp --optimizer scale-amended --scale-average 1", "a number >= 0 and < 1"),
        ("--method bp --optimizer scale-amended --scale-estimate power",
         "--scale-estimate power needs --scale-kind spectral, got trace"),
        ("--method bp --optimizer scale-amended --scale-probes 2", "--scale-probes has no effect"),
        ("--method bp --optimizer scale-amended --scale-every 0", "a whole number >= 1"),
        ("--method bp --optimizer scale-amended --normalize maybe", "expected on or off"),
        ("--method bp --optimizer scale-amended --scale-kind norm", "one of trace, spectral"),
    ],
)  # fmt: skip
def test_wrong_usage(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *given.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
