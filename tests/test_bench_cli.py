"""``backmatch bench``: what it prints and leaves, and how it refuses. No test asserts a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backmatch import linalg
from backmatch.bench import report, run
from backmatch.cli import main

SMALL = ["--quick", "--sizes", "8,17", "--batch", "24", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Puts the number of threads back; on a busy machine one is faster than waiting for two."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run, expect one line on stderr; returns it."""
    assert main(["bench", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("backmatch: ")
    return captured.err


def bench(out: Path, *arguments: str) -> Any:
    assert main(["bench", *SMALL, "--out", str(out), *arguments]) == 0
    return json.loads((out / "bench.json").read_text())


def test_json_figure_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    result = bench(out, "--only", "spd_solve,scaled_gram,cg", "--dtype", "both")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert max(map(len, captured.out.splitlines())) <= report.WIDTH + len(str(out))
    for word in ("spd_solve", "linalg.solve", "GF/s", "/FMA", "/copy", "error", "torch "):
        assert word in captured.out
    assert set(result) == {"machine", "options", "interrupted", "rates", "rows"}
    assert result["interrupted"] is False
    assert set(result["rates"]) == {"float32", "float64"}
    assert {row["question"] for row in result["rows"]} == set(result["options"]["only"])
    for row in result["rows"]:
        assert "error" not in row
        assert row["case"]["n"] in (8, 17)
        assert row["case"]["batch"] == 24
        for times in row["times"].values():
            assert times["median_seconds"] > 0
            assert times["repeats"] >= 2
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]


def test_print_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *SMALL, "--only", "weighted_gram"]) == 0
    assert "weighted_gram" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(tmp_path, "--only", "weighted_gram", "--quiet")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert result["machine"]["threads"] == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--only spd", "--only: expected names out of spd_solve, scaled_gram, "),
        ("--only spd_solv", "did you mean 'spd_solve'?"),
        ("--only spd_solve,,cg", "got ''"),
        ("--sizes 8,x", "--sizes: expected whole numbers from 1 to 4096"),
        ("--sizes 0", "for example 8,16,32, got '0'"),
        ("--sizes -8", "--sizes"),
        ("--sizes 1e3", "--sizes"),
        ("--sizes 5000", "--sizes"),
        ("--batch 0", "--batch: expected 1 to 16777216, got '0'"),
        ("--threads 0", "--threads: expected 1 to 4096"),
        ("--dtype float16", "--dtype: expected one of float32, float64, both, got 'float16'"),
        ("--device tpu", "--device: expected one of auto, cpu, cuda"),
        ("--only step --sizes 8", "--sizes has no effect with --only step; drop it"),
        ("--only peers,scaling --batch 8", "--batch has no effect with --only peers,scaling"),
        ("--quik", "unknown argument '--quik', did you mean '--quick'?"),
        ("--out", "--out: expected one argument"),
    ],
)
def test_wrong_words(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(words.split(), capsys)


def test_help_and_wrong_usage_do_not_import_torch() -> None:
    code = (
        "import sys; from backmatch.cli import main\n"
        "try: main(['bench', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    for words in (["--help"], ["--only", "nothing"], ["--out", __file__]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_out_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    assert "is not a folder" in refused(["--out", str(tmp_path / "file" / "below")], capsys)
    (tmp_path / "bench.json").write_text("{}")
    told = refused(["--out", str(tmp_path)], capsys)
    assert "holds a bench.json already; remove it, or choose another folder" in told
    assert (tmp_path / "bench.json").read_text() == "{}"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "no permission to write" in refused(["--out", str(tmp_path / "run")], capsys)


def test_cuda_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = refused(["--device", "cuda"], capsys)
    assert "torch finds no CUDA device; use --device cpu" in told
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("backmatch._C.build_info", lambda: {"cuda": False})
    assert "this build has no CUDA kernels" in refused(["--device", "cuda"], capsys)


def test_without_matplotlib_there_is_no_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "backmatch.bench.figure", raising=False)
    monkeypatch.delattr("backmatch.bench.figure", raising=False)
    bench(tmp_path, "--only", "weighted_gram")
    assert "figure  none: matplotlib is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_wrong_kernel_has_no_time_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = linalg.spd_solve
    monkeypatch.setattr(linalg, "spd_solve", lambda A, B: right(A, B) * 1.001)
    arguments = [*SMALL, "--only", "spd_solve,weighted_gram", "--out", str(tmp_path)]
    told = refused(arguments, capsys, code=1)
    assert "2 of 4 cases gave wrong answers and were not timed" in told
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert ["times" in row for row in rows] == [False, False, True, True]


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    arguments = [*SMALL, "--only", "weighted_gram", "--out", str(tmp_path)]
    assert f"cannot write in {tmp_path}: No space left" in refused(arguments, capsys, code=1)
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cases(settings: object) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        yield

    monkeypatch.setitem(run.CASES, "spd_solve", cases)
    told = refused([*SMALL, "--only", "spd_solve"], capsys, code=1)
    assert "spd_solve: not enough memory; lower --batch or --sizes" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_measured(
    number: signal.Signals,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = run.CASES["weighted_gram"]

    def cases(settings: Any) -> Any:
        first, second = original(settings)
        yield first
        os.kill(os.getpid(), number)
        yield second

    monkeypatch.setitem(run.CASES, "weighted_gram", cases)
    arguments = ["bench", *SMALL, "--only", "weighted_gram,cg", "--out", str(tmp_path)]
    assert main(arguments) == 128 + number
    assert "interrupted: the tables hold what was measured" in capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["interrupted"] is True
    assert [row["case"]["n"] for row in result["rows"]] == [8]


def test_tables_fit_whatever_the_sizes() -> None:
    """The widest cells that options and machines can give."""
    times = {"median_seconds": 123.4e-6, "iqr_seconds": 1e-6, "repeats": 31, "calls_per_repeat": 1}
    for names in (("linalg.solve", "cholesky", "scipy"), ("einsum", "bmm", "loop")):
        row = {
            "ours": "backmatch",
            "failed": {},
            "times": {name: times | {"systems_timed": 8} for name in ("backmatch", *names)},
            "ratios": dict.fromkeys(names, 0.0123),
            "gflops": {"backmatch": 12345.6},
            "fraction_of_fma": 0.123,
            "fraction_of_copy": 1.234,
            "worst_scaled_residual": {"backmatch": 1.2e-3},
        }
        about = {"n": 4096, "batch": 16777216, "slopes": "relu", "dtype": "float32"}
        other = {"n": 8, "batch": 1, "slopes": "tanh", "dtype": "float64"}
        rows = [row | {"case": about}, row | {"case": other}]
        heading, columns, lines = report.table("scaled_gram", rows)
        text = [heading, *report.aligned([columns, *lines]), *report.remarks(rows)]
        assert max(map(len, text)) <= report.WIDTH
