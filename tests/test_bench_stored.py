"""``benchmarks/``: README tables from stored results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from backmatch.bench import options, run, scaling, step, timing
from backmatch.bench.case import Settings

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


def test_readme_shows_the_stored_comparisons_and_studies() -> None:
    import analysis
    import digits

    readme = (BENCHMARKS.parent / "README.md").read_text()
    for name in digits.COMPARISONS:
        assert digits.readme(json.loads(digits.path(name).read_text())) in readme, name
    assert analysis.table(json.loads(analysis.RESULTS.read_text())) in readme


def test_stored_comparisons_can_be_drawn_and_hold_no_tuning_curves() -> None:
    import digits

    from backmatch.comparing import figure

    for name in digits.COMPARISONS:
        result = json.loads(digits.path(name).read_text())
        assert {run["kind"] for run in result["runs"]} == {"final"}
    assert figure.draw(result).startswith(b"\x89PNG")
