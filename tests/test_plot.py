"""``backmatch plot``: pages of stored runs, overlays, and the figures of other results."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from plot_cases import page_of, run_rows, size, store, told, words_of

from backmatch.cli import main
from backmatch.plotting import block_panels, overlay, png, stored_run, style
from backmatch.plotting.labels import moved_apart

#: What every problem of a figure warns of, such as a glyph that no font has.
pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("blocks", [0, 13])
def test_page(blocks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(tmp_path / "run", run_rows(blocks))
    assert main(["plot", str(path)]) == 0
    assert capsys.readouterr().out == f"figure  {path / 'plot.png'}\n"
    width, height = size(path / "plot.png")
    assert (width, height) == ((1200, 540) if blocks == 0 else (1698, 1478))
    words = words_of(page_of(path))
    assert "digits, mlp, back-matching (weights auto, inputs auto), sgd lr 1.0" in " ".join(words)
    if blocks:
        assert {title for _, panels in block_panels.SECTIONS for title in [panels[0].title]} <= set(
            words
        )
        assert "none: solved directly" in words


def test_every_line_shows_the_stored_numbers(tmp_path: Path) -> None:
    figure = page_of(store(tmp_path / "run"))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    lines = panels["damping"].get_lines()  # the last panel of that name: the input side
    assert list(lines[1].get_ydata()) == [2.2, 2.4, 2.6, 2.8]
    losses = panels["local loss before the step"].get_lines()
    assert list(losses[2].get_xdata()) == [2, 4, 6, 8]
    assert list(losses[2].get_ydata()) == [3.2, 3.4, 3.6, 3.8]
    assert "not known" in words_of(panels["share left: weights and input"].figure)
    (training, test) = panels["cross-entropy (nats)"].get_lines()
    assert list(training.get_xdata()) == list(range(8))
    assert list(test.get_ydata()) == [1.0, 0.5]
    bounds = [line.get_linestyle() for line in panels["condition as solved"].get_lines()]
    assert "--" in bounds
    assert "-" in bounds


@pytest.mark.parametrize("blocks", [0, 3])
def test_nothing_lies_outside_its_axes(blocks: int, tmp_path: Path) -> None:
    for axes in page_of(store(tmp_path / "run", run_rows(blocks))).axes:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        for line in axes.get_lines():
            if line.get_transform() == axes.transData:
                for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                    assert left <= x <= right, axes.get_title(loc="left")
                    assert low <= y <= high or y != y, axes.get_title(loc="left")


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    first, second = (store(tmp_path / name, run_rows(2)) for name in "12")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 30}):
        assert main(["plot", str(first), "--quiet"]) == 0
    assert main(["plot", str(second), "--quiet"]) == 0
    assert (first / "plot.png").read_bytes() == (second / "plot.png").read_bytes()


def test_a_live_run(tmp_path: Path) -> None:
    path = store(tmp_path / "run", run_rows(2)[:5], finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4, "tra')
    words = " ".join(words_of(page_of(path)))
    assert "unfinished: 4 steps so far" in words
    assert "no evaluation yet" in words


def test_a_real_run_with_probes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train = ["train", "--data", "synthetic", "--hidden", "16", "--batch-size", "512", "--quiet"]
    assert main([*train, "--epochs", "1", "--probe", "2", "--out", str(path)]) == 0
    assert main(["plot", str(path), "--quiet"]) == 0
    assert size(path / "plot.png") == (1698, 1478)
    assert "not known" not in words_of(page_of(path))


def test_failed_probes_are_told(tmp_path: Path) -> None:
    failed = {"kind": "probe", "step": 2, "epoch": 1, "error": "overflow $\\frac$", "blocks": []}
    path = store(tmp_path / "run", [*run_rows(2), failed])
    assert "1 probes failed, at step 2: overflow $\\frac$" in " ".join(words_of(page_of(path)))
    only = store(tmp_path / "only", [*run_rows(0), failed])
    assert "1 probes failed" in " ".join(words_of(page_of(only)))


def test_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [store(tmp_path / f"run{i}", run_rows(0), seed=i) for i in range(3)]
    assert main(["plot", *map(str, runs)]) == 0
    assert capsys.readouterr().out == f"figure  {runs[0] / 'overlay.png'}\n"
    assert size(runs[0] / "overlay.png")[0] == 1320
    many = [store(tmp_path / f"many{i}", run_rows(0), seed=i) for i in range(33)]
    assert len(set(overlay.labels([stored_run.read(path) for path in many]))) == 33
    assert main(["plot", *map(str, many)]) == 2
    assert "at most 32 runs" in capsys.readouterr().err


def test_a_legend_says_what_differs(tmp_path: Path) -> None:
    base = store(tmp_path / "a", run_rows(0), blocks="activation")
    bp = store(
        tmp_path / "b",
        run_rows(0, epochs=1),
        finished=False,
        **{"method": "bp", "weights": None, "inputs": None, "lr": 0.1, "probe": 5},
    )
    twin = store(tmp_path / "c", run_rows(0), blocks="activation")
    runs = [stored_run.read(path) for path in (base, bp)]
    assert overlay.labels(runs) == ["backmatch, lr 1.0", "bp, lr 0.1, unfinished"]
    runs = [stored_run.read(path) for path in (base, twin)]
    assert overlay.labels(runs) == [f"(..{str(path)[-48:]})" for path in (base, twin)]


def test_runs_and_results_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = store(tmp_path / "run"), tmp_path / "other"
    other.mkdir()
    (other / "compare.json").write_text("{}")
    assert "draw this one alone" in told(capsys, path, other)


@pytest.fixture(params=["compare", "analysis"])
def result(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a comparison or of an analysis."""
    (tmp_path / f"{request.param}.json").write_text('{"rows": [1, 2]}')
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, draw: Any) -> None:
    package = "comparing" if (folder / "compare.json").exists() else "analysis"
    module = types.ModuleType(f"backmatch.{package}.figure")
    module.draw = draw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"backmatch.{package}", types.ModuleType(package))
    monkeypatch.setitem(sys.modules, f"backmatch.{package}.figure", module)


def drawing(result: dict[str, Any]) -> bytes:
    figure = Figure()
    figure.text(0.5, 0.5, str(result["rows"]))
    return style.save(figure)


def test_results_are_drawn_by_their_own(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, result, drawing)
    assert main(["plot", str(result), "--quiet"]) == 0
    first = (result / "plot.png").read_bytes()
    assert main(["plot", str(result), "--quiet"]) == 0
    assert (result / "plot.png").read_bytes() == first == png.marked(drawing({"rows": [1, 2]}))


@pytest.mark.parametrize(
    "draw",
    [
        lambda result: drawing({}),
        lambda result: drawing([]),
        lambda result: b"not a PNG",
        lambda result: None,
        lambda result: 1 / 0,
    ],
)
def test_damaged_results(
    draw: Any, result: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, result, draw)
    assert "damaged, or of another version" in told(capsys, result)


def test_a_mark_leaves_a_png_that_readers_accept() -> None:
    content = drawing({"rows": 1})
    found = png.marked(content)
    assert png.marked(found) == found
    image = pytest.importorskip("PIL.Image")
    opened = image.open(io.BytesIO(found))
    opened.load()
    assert opened.info["Source"] == "backmatch plot"


def test_labels_move_apart() -> None:
    assert moved_apart([], 0.1, 0, 1) == []
    found = moved_apart([0.9, 0.9, 0.9, 0.0], 0.2, 0.0, 1.0)
    assert found[3] == 0.0
    assert sorted(found[:3]) == pytest.approx([0.6, 0.8, 1.0])
    crowded = moved_apart([0.5] * 11, 0.3, 0.0, 1.0)
    assert sorted(crowded) == pytest.approx([k / 10 for k in range(11)])


def test_long_runs_are_thinned() -> None:
    steps, values = style.thin(range(10**5), [float(k) for k in range(10**5)])
    assert len(steps) == len(values) <= 4000
    assert steps == values
    assert values[0] == 12.0


def test_no_accuracy_above_100_is_on_an_axis(tmp_path: Path) -> None:
    rows = run_rows()
    for row in rows:
        if row["kind"] == "evaluation":
            row["test_accuracy"] = 1.0 if row["step"] > 4 else 0.996
    run = stored_run.read(store(tmp_path / "run", rows))
    axes = Figure().subplots()
    overlay._draw(axes, [run], "test_accuracy", "steps")
    low, high = axes.get_ylim()
    assert low < 99.6
    assert high > 100
    assert max(at for at in axes.get_yticks() if at <= high) <= 100


def test_names_of_the_curves_cover_no_line(tmp_path: Path) -> None:
    page = page_of(store(tmp_path / "run"))
    assert not any(axes.get_legend() for axes in page.axes)
    accuracy = next(a for a in page.axes if a.get_title(loc="left") == "accuracy (%)")
    assert [text.get_text() for text in accuracy.texts] == ["test", "training"]
    assert all(text.xy[1] == 1 and text.xyann[1] > 0 for text in accuracy.texts)
