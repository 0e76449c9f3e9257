"""``benchmarks/gpu.py`` where there is no GPU: stages, groups, children."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_cases
import gpu_groups
import gpu_peers
import gpu_tables
import gpu_vgg
import gpu_workload
import pytest
import torch

import backmatch as bm
from backmatch.bench import options, spd_solve, step, timing
from backmatch.bench.case import Settings
from backmatch.bench.measure import measure
from backmatch.linalg import _library

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TINY = timing.Effort(repeats=2, seconds=1e-3, fewest=1, fewest_of_peers=1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group with its smallest case, hardly timed."""
    monkeypatch.setattr(timing, "QUICK", TINY)
    monkeypatch.setattr(spd_solve, "QUICK_SIZES", (8,))
    monkeypatch.setattr(step, "NETS", {"small": ((5, 9, 4), 7)})
    monkeypatch.setattr(gpu_vgg, "QUICK_SHAPE", (2, 1, 8, 8))
    monkeypatch.setattr(bm.models, "vgg13_bn", bm.models.cnn)


def tiny_settings(**changes: Any) -> Settings:
    chosen = {"quick": True, "sizes": (8,), "batch": 9, "dtypes": ("float32",), "device": "cpu"}
    return Settings(options.BenchOptions(**{**chosen, **changes}), CPU, TINY)


def never() -> None:
    """Time is never up."""


# ---- stages --------------------------------------------------------------------------------------


def test_no_gpu_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gpu.py: no CUDA device")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--limits", "kernels"], ["--limits", "x=3"]])
def test_limits_are_checked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "--limits: expected STAGE=SECONDS" in capsys.readouterr().err


def test_limits_and_stages_are_handed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    for name in ("tests", "kernels"):
        stage = lambda context, name=name: seen.update({name: context.seconds}) or {}  # noqa: E731
        monkeypatch.setitem(gpu.STAGES, name, stage)
    out = str(tmp_path / "gpu.json")
    assert gpu.main(["--stages", "tests,kernels", "--limits", "kernels=7", "--out", out]) == 0
    assert seen == {"tests": gpu.LIMITS["tests"], "kernels": 7.0}
    assert sum(gpu.LIMITS.values()) - gpu.LIMITS["build"] <= 600


def test_a_stage_that_fails_is_recorded_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(context: gpu.Context) -> Any:
        raise RuntimeError("no nvcc")

    def skipped(context: gpu.Context) -> Any:
        raise gpu.Skipped("not on PATH")

    monkeypatch.setitem(gpu.STAGES, "build", failing)
    monkeypatch.setitem(gpu.STAGES, "sanitizer", skipped)
    monkeypatch.setitem(gpu.STAGES, "tests", lambda context: {"summary": "3 passed"})
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


def test_sigterm_leaves_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(context: gpu.Context) -> Any:
        context.keep({"rows": [1, float("nan")]})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("the signal was not seen")

    monkeypatch.setitem(gpu.STAGES, "kernels", interrupted)
    before, out = signal.getsignal(signal.SIGTERM), tmp_path / "gpu.json"
    assert gpu.run(["kernels", "steps"], out, quick=True) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    (stage,) = json.loads(out.read_text())["stages"].values()
    assert stage["rows"] == [1, None]
    assert (stage["status"], stage["reason"]) == ("incomplete", "terminated")
    assert list(tmp_path.iterdir()) == [out]


def test_a_program_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    command = ["/bin/sh", "-c", f"echo begun; (sleep 2; touch {mark}) & wait"]
    with pytest.raises(RuntimeError, match=r"(?s)took more than 0 s:\n.*begun"):
        gpu.call(command, 0.3)
    time.sleep(2)
    assert not mark.exists()


def test_a_sanitizer_finding_fails_its_stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        "#!/bin/sh\n"
        '[ "$2" = racecheck ] && echo "hazard at backmatch::cuda::f_kernel" && exit 99\n'
        '[ "$2" = initcheck ] && echo at cublas && echo "ERROR SUMMARY: 1 error" && exit 99\n'
        '[ "$2" = synccheck ] && echo "n = 8 done" && exec sleep 5\n'
        'echo "ERROR SUMMARY: 0 errors"'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    kept: list[Any] = []
    stage = gpu.sanitizer(gpu.Context(quick=False, seconds=2.0, keep=kept.append))
    assert stage["status"] == "failed"
    assert stage["reason"] == "racecheck failed"
    assert stage["tools"]["memcheck"] == "ERROR SUMMARY: 0 errors"
    assert stage["tools"]["initcheck"] == "ERROR SUMMARY: 1 error (none in a kernel of ours)"
    assert stage["tools"]["synccheck"] == "n = 8 done"
    assert len(kept) == len(gpu.TOOLS)
    found = "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    program.write_text(f'#!/bin/sh\necho "hazard at cublas"; echo "========= {found}"; exit 99')
    stage = gpu.sanitizer(gpu.Context(quick=True))
    assert stage == {"tools": {"memcheck": f"========= {found} (none in a kernel of ours)"}}
    program.write_text("#!/bin/sh\nsleep 5")
    stage = gpu.sanitizer(gpu.Context(quick=True, seconds=0.1))
    assert (stage["status"], stage["reason"]) == ("incomplete", "memcheck ran out of time")
    program.write_text("#!/bin/sh\necho 'ERROR SUMMARY: 0 errors'")
    stage = gpu.sanitizer(gpu.Context(quick=True))
    assert stage == {"tools": {"memcheck": "ERROR SUMMARY: 0 errors"}}
    monkeypatch.setenv("PATH", "")
    with pytest.raises(gpu.Skipped, match="compute-sanitizer is not on PATH"):
        gpu.sanitizer(gpu.Context(quick=True))


def test_the_workload_runs_and_says_what_it_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spd_solve(stream: int) -> None:
        """spd_solve(stream: int)"""

    def never_called(stream: int) -> None:
        """never_called(stream: int)"""

    launchers = SimpleNamespace(spd_solve=spd_solve, never_called=never_called)
    monkeypatch.setattr(_library.native(), "cuda", launchers, raising=False)
    monkeypatch.setattr(gpu_workload, "SIZES", (1, 9))
    right = bm.linalg.spd_solve

    def counted(*arguments: Any, **named: Any) -> torch.Tensor:
        launchers.spd_solve(stream=0)
        return right(*arguments, **named)

    monkeypatch.setattr(bm.linalg, "spd_solve", counted)
    assert gpu.main(["--workload", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["n = 1 done", "n = 9 done", "launchers not reached: never_called"]
    assert launchers.spd_solve is spd_solve


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_the_stages_run_on_the_cpu(tmp_path: Path) -> None:
    """What can be executed without a GPU: build information, and every group of both stages."""
    out = tmp_path / "gpu.json"
    assert gpu.run(["build", "kernels", "steps"], out, quick=True, device="cpu") == 0
    result = json.loads(out.read_text())
    stages = result["stages"]
    assert result["machine"].keys() >= {"date", "commit", "torch", "cpu", "tf32"}
    assert stages["build"]["build"]["simd_active"]
    assert list(stages["kernels"]["groups"]) == list(gpu.KERNELS)
    assert all(group["status"] == "passed" for group in stages["kernels"]["groups"].values())
    rows = stages["kernels"]["rows"]
    assert {row["question"] for row in rows} == set(gpu.KERNELS)
    for row in rows:
        if row["question"] in ("cg", "conv_cg"):
            assert gpu_cases.GRAPH in row["ratios"]
            assert not row["failed"]
        if row["question"] in ("spd_solve", "scaled_gram", "weighted_gram"):
            assert row["fraction_of_fma"] > 0
            assert row["fraction_of_copy"] > 0
    assert stages["kernels"]["rates"]["float32"]["fma_gflops"] > 0
    assert list(stages["kernels"]["cliffs"]["float32"]) == ["4 to 5"]
    vgg = stages["steps"]["rows"][-1]
    assert vgg["iterations"]["backmatch"] > 0
    assert "back-propagation" in vgg["ratios"]
    text = gpu_tables.gpu(result)
    assert "| kernels | passed |" in text
    assert "| `cg`, matrix-free convolution |" in text
    assert "Largest t(n + 1) / t(n) in float32, of 1: " in text
    assert f"torch {torch.__version__}, commit " in text


@pytest.mark.usefixtures("tiny")
def test_rows_of_a_group_with_a_wrong_answer_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spd_solve, "QUICK_SIZES", (8, 9))
    right = bm.linalg.spd_solve
    spoiled = lambda A, B: right(A, B) * (1.01 if A.shape[-1] == 8 else 1)  # noqa: E731
    monkeypatch.setattr(bm.linalg, "spd_solve", spoiled)
    stage = gpu.groups(("spd_solve",), gpu.Context(quick=True, device="cpu"))
    assert stage["status"] == "failed"
    assert "spd_solve: 1 wrong, the first: backmatch: error" in stage["reason"]
    assert ["times" in row for row in stage["rows"]] == [False, True]
    assert "`spd_solve` | 9 |" in gpu_tables.gpu(
        {"stages": {"kernels": stage | {"elapsed_seconds": 1.0}}}
    )


@pytest.mark.usefixtures("tiny")
def test_a_group_that_fails_does_not_end_the_others() -> None:
    def failing(settings: Settings) -> Any:
        yield {"question": "first"}
        raise RuntimeError("no memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_groups.GROUPS, "cg", gpu_groups.Group(failing, "cg"))
        parts = gpu_groups.measure_groups(
            ["cg", "cliffs"], quick=True, device="cpu", check_stop=never, keep=lambda parts: None
        )
    assert parts["cg"]["reason"] == "RuntimeError: no memory"
    assert parts["cg"]["rows"] == [{"question": "first"}]
    assert parts["cliffs"]["status"] == "passed"


@pytest.mark.usefixtures("tiny")
def test_time_that_is_up_is_told() -> None:
    stage = gpu.groups(("cliffs", "cg"), gpu.Context(quick=True, device="cpu", seconds=0.0))
    assert stage["status"] == "incomplete"
    assert stage["reason"] == "cliffs: time was up"


@pytest.mark.slow
def test_a_child_measures(tmp_path: Path) -> None:
    seen: list[tuple[gpu_groups.Parts, dict[str, Any]]] = []
    parts = gpu_groups.isolated(
        ["cliffs"],
        tmp_path / "part.json",
        quick=True,
        device="cpu",
        seconds=60,
        keep=lambda parts, about: seen.append((parts, about)),
    )
    assert parts["cliffs"]["status"] == "passed", parts
    assert len(parts["cliffs"]["rows"]) == 2
    assert seen[-1][1]["torch"] == torch.__version__
    assert not list(tmp_path.iterdir())


CHILD = """#!{python}
import json, os, sys, time
names = sys.argv[sys.argv.index("--child") + 1].split(",")
out = sys.argv[sys.argv.index("--out") + 1]
def write(status, name, **more):
    parts[name] = {{"status": status, "rows": [name], **more}}
    json.dump({{"machine": {{}}, "parts": parts}}, open(out, "w"))
parts = {{}}
for name in names:
    write("started", name)
    if name == "crash":
        print("illegal address", flush=True)
        os._exit(5)
    if name == "hang":
        time.sleep(60)
    write("passed", name)
"""


@pytest.mark.parametrize("bad", ["crash", "hang"])
def test_a_child_that_is_lost_costs_its_group_only(
    bad: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text(CHILD.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_groups.sys, "executable", str(program))
    monkeypatch.setattr(gpu_groups, "GRACE", 0.2)
    parts = gpu_groups.isolated(
        ["a", bad, "b"],
        tmp_path / "part.json",
        quick=True,
        device="cuda",
        seconds=10 if bad == "crash" else 1.5,
        keep=lambda parts, about: None,
    )
    assert parts["a"]["status"] == "passed"
    assert parts[bad]["status"] == "failed"
    assert parts[bad]["rows"] == [bad]
    if bad == "crash":
        assert parts[bad]["reason"] == "exit code 5: illegal address\n"
        assert parts["b"]["status"] == "passed"
    else:
        assert parts[bad]["reason"].startswith("hung: no end after")
        assert parts["b"] == {"status": "incomplete", "reason": "not begun", "rows": []}


def test_peers_leave_other_devices_alone() -> None:
    case = next(iter(spd_solve.cases(tiny_settings())))
    assert gpu_peers.with_peers(case) is case
    assert gpu_peers.module("no_such_module_at_all") is None
    assert "error" not in measure(case, tiny_settings())
