"""A run that is killed, interrupted or out of disk goes on to the very same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_child import count_stages, finish, kill_at, signal_at

from backmatch.cli import main
from backmatch.training import checkpoint, files, rundir

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


@pytest.mark.parametrize("point", range(6))
def test_kill_inside_every_stage(method: str, whole: Path, tmp_path: Path, point: int) -> None:
    path = tmp_path / "run"
    total = count_stages(arguments(method, tmp_path / "counted"))
    # The first calls write config.json; before it there is no run to resume.
    call = 4 + point * (total - 4) // 5
    assert kill_at(arguments(method, path), call) == -signal.SIGKILL
    assert finish(resume(path)) == 0
    assert_same_run(path, whole)


def test_kill_again_and_again(whole: Path, method: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert kill_at(arguments(method, path), 12) == -signal.SIGKILL
    for call in (9, 8, 11):
        assert kill_at(resume(path), call) == -signal.SIGKILL
    assert finish(resume(path)) == 0
    assert_same_run(path, whole)


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


@pytest.mark.parametrize("failing", [3, 6, 9, 12, 14])
def test_disk_full(
    failing: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert main(arguments("bp-adam", whole)) == 0
    left = [failing]

    def full(original: Any) -> Any:
        def call(*values: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*values)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_fully", full(rundir.write_fully))
        patch.setattr(checkpoint, "write_temporary", full(checkpoint.write_temporary))
        assert main(arguments("bp-adam", path)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert "--resume" in error
    assert main(resume(path)) == 0
    assert_same_run(path, whole)


def test_disk_full_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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


def test_damaged_checkpoint_falls_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert main(arguments("bp-adam", whole)) == 0
    assert signal_at(arguments("bp-adam", path), 10, signal.SIGINT) == 130
    newest = path / checkpoint.NEWEST
    newest.write_bytes(newest.read_bytes()[:-200])
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
