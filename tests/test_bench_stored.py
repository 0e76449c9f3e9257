"""``benchmarks/``: README tables from stored results, and gpu.py where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import backmatch as bm
from backmatch.bench import options, run, scaling, spd_solve, step, timing
from backmatch.bench.case import Settings
from backmatch.bench.measure import measure

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = timing.Effort(repeats=2, seconds=1e-3, fewest=1, fewest_of_peers=1)


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def collected(*questions: str, **changes: Any) -> dict[str, Any]:
    chosen = options.BenchOptions(
        **{"quick": True, "only": questions, "device": "cpu", "sizes": (8,), "batch": 9, **changes}
    )
    settings = Settings(chosen, torch.device("cpu"), TINY)
    result, failure = run.collect(settings, None)
    assert failure is None
    return json.loads(run.to_json(result))


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_kernel_tables() -> None:
    import tables

    result = collected("spd_solve", "scaled_gram", "weighted_gram", "cg")
    header, rule, *rows = rows_of(tables.kernels(result))
    assert len({len(row) for row in (header, rule, *rows)}) == 1
    assert header[:3] == ["kernel", "n", "float32: one system"]
    assert rows[0][:2] == ["`spd_solve`", "8"]
    assert rows[0][3].endswith(" x")
    names = [row[0] for row in rows]
    assert "`scaled_gram_solve`, half active" in names
    assert "`scaled_gram_solve`, all active" in names
    assert f"torch {torch.__version__}" in tables.kernels(result)


def test_step_and_scaling_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    import tables

    monkeypatch.setattr(step, "NETS", {"small": ((5, 9, 4), 7)})
    monkeypatch.setattr(scaling, "QUICK_SIZES", (4, 5))
    result = collected("step", "peers", sizes=None, batch=None)
    lines = rows_of(tables.step(result))
    assert lines[2][0] == "5-9-4, 7"
    assert lines[5][1:3] != lines[6][1:3]
    assert "foof" in lines[3]
    text = tables.scaling(collected("scaling", sizes=None, batch=None))
    for axis in ("n", "batch", "m", "threads"):
        assert f"| kernel | {axis} | one call |" in text


def test_a_failed_peer_stands_in_the_table() -> None:
    import tables

    result = collected("spd_solve")
    row = result["rows"][0]
    for name in list(row["ratios"]):
        del row["ratios"][name], row["times"][name]
        row["failed"][name] = "RuntimeError: no"
    cells = rows_of(tables.kernels(result))[2]
    assert cells[3:5] == ["", ""]


def test_results_are_stored_with_their_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import stored

    result = collected("weighted_gram")
    stored.store(result, tmp_path / "kernels.json")
    assert json.loads((tmp_path / "kernels.json").read_text()) == result
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_tables_go_between_the_markers(tmp_path: Path) -> None:
    import stored

    document = tmp_path / "README.md"
    document.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    stored.insert("new", "x", document)
    assert document.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"
    with pytest.raises(SystemExit, match="y: begin"):
        stored.insert("new", "y", document)


@pytest.mark.parametrize("name", ["kernels", "digits", "gpu"])
def test_every_benchmark_has_help(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--help"]
    if name == "digits":
        pytest.importorskip("sklearn")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")


# ---- gpu.py --------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> ModuleType:
    import gpu

    return gpu


def test_no_gpu_is_said_in_one_line(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gpu.py: no CUDA device")
    assert captured.err.count("\n") == 1


def test_a_stage_that_fails_is_recorded_and_the_next_goes_on(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(quick: bool, device: str) -> Any:
        raise RuntimeError("no nvcc")

    def skipped(quick: bool, device: str) -> Any:
        raise gpu.Skipped("not on PATH")

    monkeypatch.setitem(gpu.STAGES, "build", failing)
    monkeypatch.setitem(gpu.STAGES, "sanitizer", skipped)
    monkeypatch.setitem(gpu.STAGES, "tests", lambda quick, device: {"summary": "3 passed"})
    out = tmp_path / "new" / "gpu.json"
    assert gpu.run(["build", "sanitizer", "tests"], out, quick=True) == 1
    stages = json.loads(out.read_text())["stages"]
    assert stages["build"]["status"] == "failed"
    assert stages["build"]["reason"] == "RuntimeError: no nvcc"
    assert stages["sanitizer"]["status"] == "skipped"
    assert stages["tests"] == {
        "status": "passed",
        "summary": "3 passed",
        "elapsed_seconds": stages["tests"]["elapsed_seconds"],
    }


def test_its_stages_run_on_the_cpu(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What can be executed without a GPU: build information, kernels, steps, the workload."""
    import gpu_vgg

    monkeypatch.setattr(timing, "QUICK", TINY)
    monkeypatch.setattr(spd_solve, "QUICK_SIZES", (8,))
    monkeypatch.setattr(gpu, "KERNELS", ("spd_solve",))
    monkeypatch.setattr(step, "NETS", {"small": ((5, 9, 4), 7)})
    monkeypatch.setattr(gpu_vgg, "QUICK_SHAPE", (2, 1, 8, 8))
    monkeypatch.setattr(bm.models, "vgg13_bn", bm.models.cnn)
    out = tmp_path / "gpu.json"
    assert gpu.run(["build", "kernels", "steps"], out, quick=True, device="cpu") == 0
    stages = json.loads(out.read_text())["stages"]
    assert stages["build"]["build"]["simd_active"]
    assert [row["question"] for row in stages["kernels"]["rows"]] == ["spd_solve"]
    vgg = stages["steps"]["rows"][-1]
    assert vgg["iterations"]["backmatch"] > 0
    assert "back-propagation" in vgg["ratios"]
    gpu.workload("cpu")


def test_rows_of_a_stage_with_a_wrong_answer_are_kept(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "QUICK", TINY)
    monkeypatch.setattr(spd_solve, "QUICK_SIZES", (8, 9))
    right = bm.linalg.spd_solve
    spoiled = lambda A, B: right(A, B) * (1.01 if A.shape[-1] == 8 else 1)  # noqa: E731
    monkeypatch.setattr(bm.linalg, "spd_solve", spoiled)
    stage = gpu.bench(("spd_solve",), True, "cpu")
    assert stage["status"] == "failed"
    assert "1 of 2 cases gave wrong answers" in stage["reason"]
    assert ["times" in row for row in stage["rows"]] == [False, True]


def test_a_sanitizer_finding_fails_its_stage(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\n[ "$2" = racecheck ] && exit 99\necho "ERROR SUMMARY: 0 errors"')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="racecheck failed"):
        gpu.sanitizer(False, "cuda")
    assert gpu.sanitizer(True, "cuda")["tools"] == {"memcheck": "ERROR SUMMARY: 0 errors"}
    monkeypatch.setenv("PATH", "")
    with pytest.raises(gpu.Skipped, match="compute-sanitizer is not on PATH"):
        gpu.sanitizer(True, "cuda")


def test_gpu_peers_leave_other_devices_alone() -> None:
    import gpu_peers

    settings = Settings(
        options.BenchOptions(quick=True, sizes=(8,), batch=3), torch.device("cpu"), TINY
    )
    case = next(iter(spd_solve.cases(settings)))
    assert gpu_peers.with_peers(case) is case
    assert gpu_peers.module("no_such_module_at_all") is None
    assert "error" not in measure(case, settings)
