"""Whole comparisons: what they leave behind, the same bits again, and after every interruption."""

from __future__ import annotations

import errno
import json
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_child import finish, kill_at, stages

from backmatch.cli import main
from backmatch.comparing import summary, table, trial
from backmatch.training import run as training

METHODS = ("bp-sgd", "bp-adam", "exact", "cg-2")
ARGUMENTS = [
    *("compare", "--data", "synthetic", "--hidden", "8", "--batch-size", "512", "--epochs", "2"),
    *("--methods", ",".join(METHODS), "--seeds", "2", "--tuning-seeds", "1", "--quiet"),
    *("--rates", "bp-sgd=0.3,1", "--rates", "bp-adam=0.03", "--rates", "cg-2=0.5"),
    *("--device", "cpu", "--threads", "1", "--evaluate-every", "3"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "whole"
    assert finish([*ARGUMENTS, "--out", str(path)]) == 0
    return path


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "compare.json").read_text()))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "runs.jsonl").read_text().splitlines()]


def timeless(value: Any) -> Any:
    """Without the wall-clock fields."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.endswith(("_ms", "_seconds"))}
        return {key: timeless(inner) for key, inner in kept.items()}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def assert_same(path: Path, whole: Path) -> None:
    assert timeless(read(path)) == timeless(read(whole))
    assert timeless(lines(path)) == timeless(lines(whole))
    assert not list(path.glob(".*.tmp"))


def test_what_is_left_behind(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {"compare.json", "compare.md", "runs.jsonl"}  # the child has no matplotlib
    result = read(whole)
    head, *runs = lines(whole)
    assert head["kind"] == "comparison"
    assert runs == result["runs"]
    assert {row["name"]: row["tuning_runs"] for row in result["methods"]} == {
        "bp-sgd": 2,
        "bp-adam": 0,
        "exact": len(result["methods"][2]["tuning"]),
        "cg-2": 0,
    }
    assert sum(run["kind"] == "final" for run in runs) == 8
    assert result["data"]["train"] == 2048
    assert result["data"]["validation"] == 410
    assert result["data"]["test"] == 512
    assert result["total_steps"] == 8


def test_same_weights_same_start_for_all_methods(whole: Path) -> None:
    runs = read(whole)["runs"]
    for seed in (0, 1):
        of_seed = [run for run in runs if run["seed"] == seed]
        assert len(of_seed) == 4
        assert len({run["weights_sha256"] for run in of_seed}) == 1
        assert len({run["accuracy"][0] for run in of_seed}) == 1
        for run in of_seed:
            # the first batch's loss is taken before any step
            assert run["train_loss"][0] == pytest.approx(of_seed[0]["train_loss"][0], rel=1e-6)
    assert len({run["weights_sha256"] for run in runs}) == 3  # two seeds and a tuning seed


def test_methods_take_turns(whole: Path) -> None:
    order = [(run["seed"], run["method"]) for run in read(whole)["runs"] if run["kind"] == "final"]
    assert order[:4] == [(0, name) for name in METHODS]
    assert order[4:] == [(1, name) for name in (*METHODS[1:], METHODS[0])]


def test_every_run_is_evaluated_where_it_should(whole: Path) -> None:
    for run in read(whole)["runs"]:
        assert run["error"] is None
        # every 3 steps, and at the ends of epochs of 4 (3 where samples are held out)
        assert run["steps"] == ([0, 3, 4, 6, 8] if run["kind"] == "final" else [6])
        assert len(run["step_ms"]) == len(run["train_loss"]) == (8 if run["kind"] == "final" else 6)
        spent = [sum(run["step_ms"][:step]) / 1e3 for step in run["steps"]]
        assert run["training_seconds"] == pytest.approx(spent, abs=1e-5)


def test_the_test_set_takes_no_part_in_tuning(whole: Path, tmp_path: Path) -> None:
    """Other test samples change nothing about the tuning runs and the chosen rates."""
    import numpy as np

    config = training.settle(_config())
    data = training.load_data(config)
    arrays = {name: getattr(data, name).numpy() for name in ("x_train", "y_train")}
    np.savez(tmp_path / "d.npz", **arrays, x_test=arrays["x_train"][:5], y_test=np.zeros(5, int))
    arguments = [str(tmp_path / "d.npz") if word == "synthetic" else word for word in ARGUMENTS]
    assert finish([*arguments, "--out", str(tmp_path / "c")]) == 0
    found, usual = read(tmp_path / "c"), read(whole)
    assert [row["tuning"] for row in found["methods"]] == [
        row["tuning"] for row in usual["methods"]
    ]
    assert [row["lr"] for row in found["methods"]] == [row["lr"] for row in usual["methods"]]
    assert found["methods"] != usual["methods"]


def _config() -> Any:
    from backmatch.comparing.options import settle

    return settle({"data": "synthetic"}).config("exact")


def test_the_table_is_the_runs(whole: Path) -> None:
    """Every number again, from runs.jsonl alone and with other code."""
    result, runs = read(whole), lines(whole)[1:]
    ends = {}
    for name in METHODS:
        mine = {run["seed"]: run for run in runs if (run["kind"], run["method"]) == ("final", name)}
        ends[name] = [mine[seed]["accuracy"][-1] for seed in (0, 1)]
    best = max((statistics.mean(ends[name]), name) for name in ("bp-sgd", "bp-adam"))
    goal = result["target"]["accuracy"]
    assert goal == pytest.approx(int(100 * best[0] + 1e-9) / 100)
    assert best[1] in result["target"]["source"]
    for row in result["methods"]:
        found = row["summary"]
        mine = [r for r in runs if (r["kind"], r["method"]) == ("final", row["name"])]
        mine.sort(key=lambda run: int(run["seed"]))
        assert {run["lr"] for run in mine} == {row["lr"]}
        for epoch, at in (("1", 2), ("2", 4)):
            values = [run["accuracy"][at] for run in mine]
            assert found["accuracy"][epoch]["seeds"] == values
            assert found["accuracy"][epoch]["mean"] == pytest.approx(statistics.mean(values))
            assert found["accuracy"][epoch]["sd"] == pytest.approx(statistics.stdev(values))
        assert found["best"]["seeds"] == [max(run["accuracy"]) for run in mine]
        for place, run in enumerate(mine):
            met = [i for i, accuracy in enumerate(run["accuracy"]) if accuracy >= goal]
            step = run["steps"][met[0]] if met else None
            seconds = run["training_seconds"][met[0]] if met else None
            assert found["target_steps"]["seeds"][place] == step
            assert found["target_seconds"]["seeds"][place] == seconds
        times = [sum(run["step_ms"]) / len(run["step_ms"]) for run in mine]
        assert found["step_ms"]["seeds"] == pytest.approx(times)
        tuned = [r for r in runs if (r["kind"], r["method"]) == ("tuning", row["name"])]
        assert {r["lr"]: r["accuracy"] for r in tuned} == {
            t["lr"]: t["accuracy"] for t in row["tuning"]
        }
        if tuned:
            top = max(tuned, key=lambda r: (r["accuracy"][-1], -r["loss"][-1]))
            assert row["lr"] == top["lr"]


def test_the_markdown_shows_these_numbers(whole: Path) -> None:
    result, text = read(whole), (whole / "compare.md").read_text()
    assert text == table.markdown(result)
    for row in result["methods"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {row['name']} | "))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        last = row["summary"]["accuracy"]["2"]
        assert cells[4] == f"{100 * last['mean']:.1f} ± {100 * last['sd']:.1f}"
        assert cells[1].rstrip("*") == f"{row['lr']:g}"
        assert cells[1].endswith("*") == row["edge"]
    assert "bp-sgd: back-propagation" not in text
    assert max(len(line) for text in table.terminal(result) for line in text.split("\n")) <= 100


def test_the_same_command_twice_gives_the_same(whole: Path, tmp_path: Path) -> None:
    assert finish([*ARGUMENTS, "--out", str(tmp_path / "again")]) == 0
    assert_same(tmp_path / "again", whole)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> int:
    return len(stages([*ARGUMENTS, "--out", str(tmp_path_factory.mktemp("counted"))]))


@pytest.mark.parametrize("point", range(4))
def test_kill_and_resume(whole: Path, calls: int, tmp_path: Path, point: int) -> None:
    path = tmp_path / "killed"
    # The first calls write the first line; before it there is nothing to resume.
    call = 5 + point * (calls - 5) // 3
    assert kill_at([*ARGUMENTS, "--out", str(path)], None, call) == -signal.SIGKILL
    before = (path / "runs.jsonl").read_bytes()
    assert finish(["compare", "--resume", str(path), "--quiet"]) == 0
    assert (path / "runs.jsonl").read_bytes().startswith(before)
    assert_same(path, whole)


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_a_truncated_last_line_is_dropped(whole: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut"
    path.mkdir()
    rows = (whole / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (path / "runs.jsonl").write_bytes(b"".join(rows[:4]) + rows[4][:cut])
    assert finish(["compare", "--resume", str(path), "--quiet"]) == 0
    assert (path / "runs.jsonl").read_bytes().startswith(b"".join(rows[:4]))
    assert_same(path, whole)


def test_a_damaged_line_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged"
    path.mkdir()
    rows = (whole / "runs.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join([*rows[:3], b"{}\n", *rows[4:]])
    (path / "runs.jsonl").write_bytes(content)
    assert main(["compare", "--resume", str(path), "--quiet"]) == 2
    assert "runs.jsonl, line 4: not what was written there" in capsys.readouterr().err
    assert (path / "runs.jsonl").read_bytes() == content


def test_a_finished_comparison_is_left_alone(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.iterdir()}
    assert main(["compare", "--resume", str(whole)]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert main(["compare", "--out", str(whole)]) == 2
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in whole.iterdir()}
    assert after == before


def test_resume_with_other_options_is_refused(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("--epochs 3", "--seeds 3", "--methods exact", "--rates 1"):
        assert main(["compare", "--resume", str(whole), *words.split()]) == 2
        assert "a comparison goes on with its own options" in capsys.readouterr().err
    assert main(["compare", "--resume", str(whole), "--epochs", "2", "--quiet"]) == 0


def test_resume_with_another_torch_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other"
    path.mkdir()
    head, *rows = lines(whole)
    head["versions"]["torch"] = "1.0"
    head["data"]["sha256"] = "0"
    text = "".join(json.dumps(row) + "\n" for row in [head, *rows[:1]])
    (path / "runs.jsonl").write_text(text)
    assert main(["compare", "--resume", str(path), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "torch: the comparison has 1.0, now" in told
    assert "the values are not those it began with" in told
    assert (path / "runs.jsonl").read_text() == text


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)
@pytest.mark.usefixtures("two_threads")
def test_a_signal_loses_the_run_in_progress_alone(
    whole: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, left, original = tmp_path / "run", [20], trial._step

    def step(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        original(*arguments)

    monkeypatch.setattr(trial, "_step", step)
    loud = [word for word in ARGUMENTS if word != "--quiet"]
    assert main([*loud, "--out", str(path)]) == code
    # 20 steps are 3 tuning runs of 6 and the beginning of the next
    assert "stopped with 3 runs done; continue with --resume" in capsys.readouterr().out
    assert len(lines(path)) == 4
    assert main(["compare", "--resume", str(path), "--quiet"]) == 0
    assert_same(path, whole)


@pytest.mark.usefixtures("two_threads")
def test_disk_full(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, original, left = tmp_path / "full", os.write, [5]

    def write(descriptor: int, content: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            return original(descriptor, content[:40])
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert main([*ARGUMENTS, "--out", str(path)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No space left on device; the runs that are done are intact" in told
    assert main(["compare", "--resume", str(path), "--quiet"]) == 0
    assert_same(path, whole)


@pytest.mark.usefixtures("two_threads")
def test_diverged_methods_are_told_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in ARGUMENTS if word != "--quiet"]
    words[words.index("bp-adam=0.03")] = "bp-adam=1e30"
    words[words.index("bp-sgd=0.3,1")] = "bp-sgd=1e30,1e35"
    assert main([*words, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bp-sgd diverged" in out
    assert "!: bp-sgd diverged with 2 of 2 seeds; its means leave them out (seed 0: after" in out
    result = read(tmp_path)
    row = table.row_of(result, "bp-sgd")
    assert row["summary"]["diverged"] == 2
    assert row["summary"]["best"]["mean"] is None
    assert row["lr"] == 1e30
    assert [score["accuracy"] for score in row["tuning"]] == [[0.0], [0.0]]
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_a_second_process_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    from backmatch.comparing.folder import CompareFolder
    from backmatch.training.failures import UsageError

    with (whole / "runs.jsonl").open("rb+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing there"):
            CompareFolder.reopen(whole)


def test_without_a_bp_method_the_median_method_sets_the_target() -> None:
    runs = [
        {"kind": "final", "method": name, "error": None, "steps": [2], "accuracy": [value]}
        for name, value in (("a", 0.9), ("b", 0.977), ("c", 0.99))
    ]
    options = {"methods": ["a", "b", "c"], "target": None}
    assert summary.target(options, runs, 2)["accuracy"] == 0.97
    assert "b, the median method" in summary.target(options, runs, 2)["source"]
    assert summary.target({**options, "target": 0.5}, runs, 2) == {
        "accuracy": 0.5,
        "source": "given",
    }


def test_a_comparison_in_float64(tmp_path: Path, two_threads: None) -> None:
    words = "compare --data synthetic --hidden none --batch-size 1000 --epochs 1 --dtype float64"
    words += " --methods exact,layer-inverse --activation tanh --seeds 7,3 --rates 1 --quiet"
    assert main([*words.split(), "--threads", "1", "--out", str(tmp_path)]) == 0
    result = read(tmp_path)
    assert [row["tuning_runs"] for row in result["methods"]] == [0, 0]
    assert result["methods"][0]["options"]["dtype"] == "float64"
    assert result["options"]["seeds"] == [7, 3]
    # one block has no input problem: both are the same
    assert result["methods"][0]["summary"]["best"] == result["methods"][1]["summary"]["best"]
    assert "nothing was tuned" in (tmp_path / "compare.md").read_text()
    assert torch.get_num_threads() == 1
