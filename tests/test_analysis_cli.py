"""``backmatch analyze``: what it prints and leaves, and how it refuses. No test asserts a time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backmatch import analysis
from backmatch.analyzing import report, run
from backmatch.analyzing.options import REACH, STUDIES, AnalyzeOptions
from backmatch.cli import main
from backmatch.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("two_threads")  # puts the number back

SMALL = ["--draws", "4", "--size", "6"]
MATRICES = ["--study", "init,skip,norm", *SMALL]
NETS = ["--study", "depth,width,training", "--quick", "--size", "6", "--data", "synthetic"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run, expect one line on stderr; returns it."""
    assert main(["analyze", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("backmatch: ")
    return captured.err


def stored(out: Path) -> Any:
    return json.loads((out / "analysis.json").read_text())


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.endswith("_seconds")}
    return [timeless(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("words", [MATRICES, NETS], ids=["matrices", "nets"])
def test_files_and_tables(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    assert main(["analyze", *words, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    assert max(map(len, captured.out.splitlines())) <= report.WIDTH + len(str(out))
    result = stored(out)
    names = words[1].split(",")
    assert list(result["studies"]) == names
    assert set(result) == {
        "versions",
        "threads",
        "options",
        "interrupted",
        "failed",
        "studies",
    }
    assert result["interrupted"] is False
    assert result["threads"] == 1
    for name in names:
        study = result["studies"][name]
        assert f"\n{name} (" in captured.out
        assert " ".join(study["claim"].split())[:60] in " ".join(captured.out.split())
        if name != "training":  # takes long; test_analysis_nets.py has it
            # The stored options make the same rows again.
            again = getattr(analysis, name)(**study["options"])
            assert run.rounded(again.rows) == study["rows"]
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "analysis.png"]


def test_same_command_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main(["analyze", *MATRICES, "--quiet", "--out", str(tmp_path / name)]) == 0
    assert timeless(stored(tmp_path / "a")) == timeless(stored(tmp_path / "b"))
    first, second = (tmp_path / name / "analysis.png" for name in ("a", "b"))
    assert first.exists() == second.exists()
    if first.exists():
        assert first.read_bytes() == second.read_bytes()


def test_print_only_and_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "--study", "skip", *SMALL]) == 0
    assert "z + aWz" in capsys.readouterr().out
    assert main(["analyze", "--study", "skip", *SMALL, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--study init,skp", "--study: expected all or names out of init, skip, "),
        ("--study skp", "did you mean 'skip'?"),
        ("--study init,,skip", "got ''"),
        ("--study init,all", "got 'all'"),
        ("--draws 0", "--draws: expected 1 to 1000000, got '0'"),
        ("--draws 1e3", "--draws"),
        ("--size 1", "--size: expected 2 to 1024, got '1'"),
        ("--seed -1", "--seed: expected a whole number >= 0, got '-1'"),
        ("--nets 0", "--nets: expected 1 to 1000"),
        ("--threads 0", "--threads: expected 1 to 4096"),
        ("--method adam", "--method: expected one of bp, backmatch, both, got 'adam'"),
        ("--data mnist", "--data: expected digits, synthetic or the path of an .npz file"),
        ("--data nowhere.npz", "nowhere.npz"),
        ("--study depth --draws 5", "--draws has no effect with --study depth; drop it"),
        ("--study width --size 5", "--size has no effect with --study width; drop it"),
        ("--study init,skip --nets 5", "--nets has no effect with --study init,skip; drop it"),
        ("--study depth --method bp", "--method has no effect with --study depth; drop it"),
        ("--quik", "unknown argument '--quik', did you mean '--quick'?"),
        ("--out", "--out: expected one argument"),
    ],
)
def test_wrong_words(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in refused(words.split(), capsys)


def test_help_and_wrong_usage_do_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "analysis.json").write_text("{}")
    code = (
        "import sys; from backmatch.cli import main\n"
        "try: main(['analyze', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    for words in (["--help"], ["--study", "nothing"], ["--out", str(tmp_path)]):
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_help_names_all_studies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", "--help"])
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in STUDIES)
    assert set(STUDIES) == set(run.FUNCTIONS)
    assert {name for names in REACH.values() for name in names} <= set(STUDIES)


def test_out_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    assert "is not a folder" in refused(["--out", str(tmp_path / "file" / "below")], capsys)
    (tmp_path / "analysis.json").write_text("{}")
    told = refused(["--out", str(tmp_path)], capsys)
    assert "holds a analysis.json already" not in told
    assert "holds an analysis.json already; remove it, or choose another folder" in told
    assert (tmp_path / "analysis.json").read_text() == "{}"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "no permission to write" in refused(["--out", str(tmp_path / "run")], capsys)


def test_disk_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "write_atomic", full)
    told = refused([*MATRICES, "--quiet", "--out", str(tmp_path)], capsys, code=1)
    assert "No space left on device; make room and run again" in told


def test_few_samples_are_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"x": np.ones((9, 4)), "y": np.arange(9) % 3}
    named = {f"{key}_{part}": value for key, value in few.items() for part in ("train", "test")}
    np.savez(tmp_path / "few.npz", **named)
    words = ["--data", str(tmp_path / "few.npz"), "--out", str(tmp_path / "out")]
    assert "must have at least 128 samples, got 9" in refused(words, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [NonFiniteError("loss", 1, 1), MemoryError()])
def test_one_study_fails_and_the_others_stay(
    error: Exception,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**arguments: Any) -> Any:
        raise error

    monkeypatch.setitem(run.FUNCTIONS, "skip", fail)
    words = [*MATRICES, "--quiet", "--out", str(tmp_path)]
    assert refused(words, capsys, code=1).startswith("backmatch: skip failed: ")
    result = stored(tmp_path)
    assert list(result["studies"]) == ["init", "norm"]
    assert list(result["failed"]) == ["skip"]


def test_unforeseen_errors_are_not_swallowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**arguments: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setitem(run.FUNCTIONS, "init", fail)
    assert "RuntimeError: a mistake of ours" in refused([*MATRICES], capsys, code=1)


def signalled(name: str, number: signal.Signals, after: int) -> Callable[..., Any]:
    """The study, with a signal at its ``after``-th look for one."""
    original = run.FUNCTIONS[name]

    def call(**arguments: Any) -> Any:
        check_stop, seen = arguments.pop("check_stop"), [0]

        def check() -> None:
            seen[0] += 1
            if seen[0] == after:
                os.kill(os.getpid(), number)
            check_stop()

        return original(**arguments, check_stop=check)

    return call


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_interrupted(
    number: signal.Signals,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was done stays, also of the study in progress; the handlers are put back."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setitem(run.FUNCTIONS, "skip", signalled("skip", number, after=8))
    assert main(["analyze", *MATRICES, "--out", str(tmp_path)]) == code
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted: the tables hold what was done before" in capsys.readouterr().out
    result = stored(tmp_path)
    assert result["interrupted"] is True
    assert list(result["studies"]) == ["init", "skip"]
    whole = analysis.skip(size=6, draws=4)
    rows = result["studies"]["skip"]["rows"]
    assert 0 < len(rows) < len(whole.rows)
    assert rows == run.rounded(whole.rows[: len(rows)])


def test_interrupted_before_the_first_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(run.FUNCTIONS, "init", signalled("init", signal.SIGINT, after=1))
    assert main(["analyze", *MATRICES, "--out", str(tmp_path)]) == 130
    assert stored(tmp_path)["studies"] == {}
    assert "figure  none" in capsys.readouterr().out


def test_interrupted_nets_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some families, sides and activations are there."""
    figure = pytest.importorskip("backmatch.analysis.figure")
    for name, after in (("depth", 2), ("width", 2), ("training", 30)):
        with monkeypatch.context() as patch:
            patch.setitem(run.FUNCTIONS, name, signalled(name, signal.SIGINT, after))
            out = tmp_path / name
            words = ["--study", name, "--quick", "--quiet", "--out", str(out)]
            words += ["--data", "synthetic"] if name == "training" else []
            assert main(["analyze", *words]) == 130
        result = stored(out)
        assert result["studies"][name]["rows"]
        assert (out / "analysis.png").read_bytes() == figure.draw(result)


def test_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("figure", "panels"):
        monkeypatch.delitem(sys.modules, f"backmatch.analysis.{name}", raising=False)
        monkeypatch.delattr(analysis, name, raising=False)
    assert main(["analyze", "--study", "skip", *SMALL, "--out", str(tmp_path)]) == 0
    assert "none: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "analysis.png").exists()


def test_quick_and_given_values() -> None:
    quick = AnalyzeOptions(quick=True)
    assert quick.arguments("init") == {"seed": 0, "draws": 100}
    assert quick.arguments("depth") == {"seed": 0, "nets": 1, "size": 32, "blocks": 6}
    given = AnalyzeOptions(quick=True, draws=7, nets=2, size=9, seed=3)
    assert given.arguments("norm") == {"seed": 3, "draws": 7, "size": 9}
    assert given.arguments("width") == {"seed": 3, "nets": 2, "widths": (8, 16, 32)}
    assert AnalyzeOptions().arguments("depth") == {"seed": 0}


def test_figure_needs_a_study() -> None:
    figure = pytest.importorskip("backmatch.analysis.figure")
    with pytest.raises(ValueError, match="at least one study"):
        figure.draw({"studies": {}})


def test_figures_of_the_tables() -> None:
    shown = {
        54460.4: "5.45e4", 9999.4: "9999", 9999.6: "1.00e4", 1.0: "1", 0.0: "0", 0.001: "1.00e-3"
    }  # fmt: skip
    assert {value: report.figure(value) for value in shown} == shown
