"""A run that is killed, interrupted or out of disk goes on to the very same bits."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_child import finish, signal_at
from run_cases import ARGUMENTS, METHODS, arguments, assert_same_run, resume, state

from backmatch.cli import main
from backmatch.training import checkpoint, run, rundir


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(method) / "whole"
    assert finish(arguments(method, path)) == 0
    return path


def test_the_same_command_twice_gives_the_same_bits(
    method: str, whole: Path, tmp_path: Path
) -> None:
    assert finish(arguments(method, tmp_path / "again")) == 0
    assert_same_run(tmp_path / "again", whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
@pytest.mark.parametrize("step", [1, 4, 6])
def test_signal_finishes_the_step_and_saves(
    method: str, whole: Path, tmp_path: Path, number: signal.Signals, code: int, step: int
) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments(method, path), step, number) == code
    assert state(path)["position"]["step"] == step
    assert not (path / "summary.json").exists()
    assert finish(resume(path)) == 0
    assert_same_run(path, whole)


def test_second_interrupt_leaves_at_once(method: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    ended = signal_at(arguments(method, path), 5, signal.SIGINT, signal.SIGINT)
    assert ended == -signal.SIGINT
    assert state(path)["position"]["step"] == 4


def test_rows_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert main(arguments("bp-adam", whole)) == 0
    assert signal_at(arguments("bp-adam", path), 5, signal.SIGINT) == 130
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 6}\n{"kind": "st')
    assert main(resume(path)) == 0
    assert_same_run(path, whole)


def test_lost_rows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 5, signal.SIGINT) == 130
    (path / "metrics.jsonl").write_text("")
    assert main(resume(path)) == 2
    assert "metrics.jsonl has lost rows" in capsys.readouterr().err


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten flipped bytes and ten cuts, the message, and the bits of the whole run."""
    monkeypatch.setattr(run, "_draw_curves", lambda *_: False)  # pictures only cost time here
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments("bp-adam", whole)) == 0
    assert signal_at(arguments("bp-adam", stopped), 10, signal.SIGINT) == 130
    content = (stopped / checkpoint.NEWEST).read_bytes()
    random = np.random.default_rng(0)
    for number, place in enumerate(random.integers(0, len(content), 20)):
        path = tmp_path / str(number)
        shutil.copytree(stopped, path)
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        (path / checkpoint.NEWEST).write_bytes(damaged if number % 2 else content[:place])
        assert main(["train", "--resume", str(path)]) == 0
        assert "falling back to the previous checkpoint" in capsys.readouterr().out
        assert_same_run(path, whole)


def test_no_intact_checkpoint_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 10, signal.SIGINT) == 130
    for name in (checkpoint.NEWEST, checkpoint.PREVIOUS):
        (path / name).write_bytes(b"")
    before = (path / "metrics.jsonl").read_bytes()
    assert main(resume(path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no intact checkpoint" in error
    assert (path / "metrics.jsonl").read_bytes() == before


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert main(arguments("bp-adam", path)) == 0
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()}
    assert main(resume(path)) == 0
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()} == before


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--lr", "0.5"], "lr: the run has 0.001, asked for 0.5"),
        (["--epochs", "9", "--seed", "1"], "epochs: the run has 3, asked for 9; seed"),
        (["--out", "elsewhere"], "drop --out"),
        (["--dry-run"], "drop --dry-run"),
    ],
)
def test_resume_with_other_options_is_refused(
    extra: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 2, signal.SIGINT) == 130
    assert main([*resume(path), *extra]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_resume_with_the_same_options_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 2, signal.SIGINT) == 130
    assert main([*ARGUMENTS, *METHODS["bp-adam"], "--resume", str(path)]) == 0


@pytest.mark.parametrize("changed", ["config", "version", "data"])
def test_resume_after_a_change_is_refused(
    changed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 2, signal.SIGINT) == 130
    if changed == "config":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "epochs": 9}))
        told = "epochs: the run has 3, now 9"
    elif changed == "version":
        monkeypatch.setattr("backmatch.training.loop.versions", lambda: {"torch": "0.1"})
        told = f"torch: the run has {torch.__version__}, now 0.1"
    else:
        monkeypatch.setattr("backmatch.training.data.Dataset.digest", lambda self: "other")
        told = "data: the values are not those the run began with"
    assert main(resume(path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error


def test_a_run_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options were fewer: nothing that the user could undo."""
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 2, signal.SIGINT) == 130
    old = state(path)
    del old["schedule"], old["config"]["schedule"], old["config"]["weight_decay"]
    checkpoint.save(path, old)
    config = json.loads((path / "config.json").read_text())
    del config["schedule"], config["weight_decay"]
    (path / "config.json").write_text(json.dumps(config))
    assert main(resume(path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "an earlier version of backmatch began this run" in error
    assert "without --weight-decay, --schedule; finish it with that one" in error


def test_one_process_writes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 2, signal.SIGINT) == 130
    with rundir.RunFolder.reopen(path):
        assert main(resume(path)) == 2
    assert "another process is writing this run" in capsys.readouterr().err


def test_a_checkpoint_of_another_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert signal_at(arguments("bp-adam", path), 2, signal.SIGINT) == 130
    good = state(path)
    for alien in ({}, {**good, "config": 3}, {**good, "model": {}}, {**good, "position": {"a": 1}}):
        checkpoint.save(path, alien)
        assert main(resume(path)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "none of this program" in error
