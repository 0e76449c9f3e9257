"""``backmatch plot``: pages of stored runs, and what becomes of folders that are not quite runs."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure

from backmatch.cli import main
from backmatch.plotting import block_panels, overlay, png, run_page, stored_run, style
from backmatch.plotting.labels import moved_apart

CONFIG = {
    **{"data": "digits", "model": "mlp", "hidden": [8], "method": "backmatch", "seed": 0},
    **{"weights": "auto", "inputs": "auto", "optimizer": "sgd", "lr": 1.0, "epochs": 2},
}
#: What every problem of a figure warns of, such as a glyph that no font has.
pytestmark = pytest.mark.filterwarnings("error")


def spread(value: float) -> dict[str, float]:
    return {"min": value / 2, "median": value, "max": 2 * value}


def side(value: float) -> dict[str, Any]:
    names = ("gradient", "scalar", "local_gradient", "local_scalar", "adam")
    return {
        **{"solver": "cholesky", "iterations": 0, "residual": 1e-6, "damping": spread(value)},
        "cosine": dict.fromkeys(names, 0.5 / value),
        "ratio": dict.fromkeys(names, value),
        "spectrum": {
            **{"exact": value < 3, "condition": spread(10 * value)},
            "condition_damped": spread(5 * value),
        },
    }


def report(b: int, step: int) -> dict[str, Any]:
    value = 1.0 + b + step / 10
    move = {"ratio": value / 20, "cosine": 0.5}
    return {
        **{"block": str(b), "requested": value, "local": move, "joint": move, "propagated": move},
        "loss": {"before": value, "after_weights": value / 2, "after_both": None},
        **{"weight": side(value), "input": side(value) if b else None},
    }


def run_rows(blocks: int = 3, epochs: int = 2, steps: int = 4) -> list[dict[str, Any]]:
    found = []
    for epoch in range(1, epochs + 1):
        for i in range(1, steps + 1):
            step = (epoch - 1) * steps + i
            found.append({"kind": "step", "step": step, "epoch": epoch, "train_loss": 2 / step})
            if blocks and step % 2 == 0:
                reports = [report(b, step) for b in range(blocks)]
                found.append({"kind": "probe", "step": step, "epoch": epoch, "blocks": reports})
        end = {"step": epoch * steps, "epoch": epoch, "elapsed_seconds": 0.5 * epoch}
        scores = {"test_loss": 1 / epoch, "train_accuracy": 0.8, "test_accuracy": 0.9}
        found.append({"kind": "evaluation", **end, **scores, "train_loss": 1.0})
    return found


def store(
    path: Path, rows: list[Any] | None = None, *, finished: bool = True, **config: Any
) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    lines = [json.dumps(row) + "\n" for row in (run_rows() if rows is None else rows)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if finished:
        (path / "summary.json").write_text("{}")
    return path


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def words_of(figure: Figure) -> list[str]:
    texts = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in texts if text.get_text()]


def page_of(path: Path) -> Figure:
    run = stored_run.read(path)
    with style.context():
        return run_page._probed(run) if run.probed else run_page._plain(run)


def told(capsys: pytest.CaptureFixture[str], *folders: Path, code: int = 2) -> str:
    """What a command that fails says: one line, and no figure."""
    assert main(["plot", *map(str, folders)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("backmatch: ")
    assert captured.err.count("\n") == 1
    assert not (folders[0] / "plot.png").exists()
    return captured.err


@pytest.mark.parametrize("blocks", [0, 1, 13])
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


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    first, second = (store(tmp_path / name, run_rows(2)) for name in "12")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "savefig.dpi": 30}):
        assert main(["plot", str(first), "--quiet"]) == 0
    assert main(["plot", str(second), "--quiet"]) == 0
    assert (first / "plot.png").read_bytes() == (second / "plot.png").read_bytes()


def test_it_draws_again_over_its_own_figure(tmp_path: Path) -> None:
    path = store(tmp_path / "run", run_rows(0, epochs=1))
    assert main(["plot", str(path), "--quiet"]) == 0
    before = (path / "plot.png").read_bytes()
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run_rows(0)))
    assert main(["plot", str(path), "--quiet"]) == 0
    assert (path / "plot.png").read_bytes() != before
    assert not list(path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["plot.png", "other.png"])
def test_nobody_elses_file_is_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(tmp_path / "run", run_rows(0))
    figure = path / name
    for content in (b"", b"mine", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + b"\0" * 200):
        figure.write_bytes(content)
        assert main(["plot", str(path), "--out", str(figure)]) == 2
        assert "was not drawn by backmatch plot" in capsys.readouterr().err
        assert figure.read_bytes() == content


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("figure.pdf", "ends in .png"),
        ("", "expected a path"),
        ("nowhere/figure.png", "no folder"),
        ("folder.png", "was not drawn by"),
        ("file/figure.png", "no folder"),
        ("a\nb.png", "control characters"),
        ("x" * 300 + ".png", "File name too long"),
    ],
)
def test_unusable_out(
    out: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(tmp_path / "run", run_rows(0))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    assert main(["plot", str(path), "--out", str(tmp_path / out) if out else ""]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_disk_that_takes_no_more(
    number: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = store(tmp_path / "run", run_rows(0))
    assert main(["plot", str(path), "--quiet"]) == 0
    before = (path / "plot.png").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    assert main(["plot", str(path)]) == code
    assert os.strerror(number) in capsys.readouterr().err
    assert (path / "plot.png").read_bytes() == before
    assert not list(path.glob(".*.tmp"))


def test_a_live_run(tmp_path: Path) -> None:
    path = store(tmp_path / "run", run_rows(2)[:5], finished=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4, "tra')
    words = " ".join(words_of(page_of(path)))
    assert "unfinished: 4 steps so far" in words
    assert "no evaluation yet" in words
    assert main(["plot", str(path), "--quiet"]) == 0


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


def test_hostile_names_and_values_are_drawn(tmp_path: Path) -> None:
    rows = run_rows(2)
    for row in rows:
        for block in row.get("blocks", []):
            block["block"] = f"$\\frac{{{block['block']}\u202e\U0001f600" + "x" * 500
    path = store(tmp_path / "run", rows, data="$\\x$\n\u4e2d", lr="\x00", model=None)
    assert main(["plot", str(path), "--quiet"]) == 0


def test_values_without_meaning_are_gaps(tmp_path: Path) -> None:
    rows = run_rows(2)
    for row in rows:
        row.update(
            {"test_loss": None, "test_accuracy": None} if row["kind"] == "evaluation" else {}
        )
    rows[0]["train_loss"] = None
    assert main(["plot", str(store(tmp_path / "run", rows)), "--quiet"]) == 0


HOSTILE: dict[str, tuple[Any, str]] = {
    "not json": ("{", "line 1: "),
    "nan": ('{"kind": "step", "step": 1, "train_loss": NaN}', "NaN is no JSON number"),
    "infinite": ('{"kind": "step", "step": 1, "train_loss": 1e999}', "finite number"),
    "huge": ('{"kind": "step", "step": 1, "train_loss": 1' + "0" * 400 + "}", "finite number"),
    "digits": ('{"kind": "step", "step": 1' + "0" * 5000 + "}", "line 1: "),
    "text": ('{"kind": "step", "step": 1, "train_loss": "1"}', "train_loss must be a number"),
    "yes": ('{"kind": "step", "step": true, "train_loss": 1}', "step must be a whole number"),
    "list": ("[1]", "expected a JSON object"),
    "deep": ("[" * 100000, "line 1: "),
    "no rows": (None, "holds no step yet"),
    "other rows": ('{"kind": "later"}', "holds no step yet"),
    "blocks": ('{"kind": "probe", "step": 1, "blocks": 3}', "blocks must be a list"),
    "block": ('{"kind": "probe", "step": 1, "blocks": [3]}', "a report with its name"),
    "binary": ("\0\1\2", "line 1: "),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = HOSTILE[name]
    path = store(tmp_path / "run", [])
    (path / "metrics.jsonl").write_text("" if text is None else text + "\n")
    assert words in told(capsys, path)


@pytest.mark.parametrize("value", ["1", [1], {"median": "x"}, True])
def test_damaged_numbers_of_a_block(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_rows(2)
    rows[2]["blocks"][1]["weight"]["damping"] = value
    error = told(capsys, store(tmp_path / "run", rows))
    assert "probe at step 2" in error


def test_blocks_that_change_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_rows(2)
    rows[2]["blocks"].pop()
    assert "not those of the probes before" in told(capsys, store(tmp_path / "run", rows))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100000, "not valid JSON"),
        (b" " * (2**20 + 1), "larger than 1 MiB"),
    ],
)
def test_damaged_config(
    content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(tmp_path / "run")
    (path / "config.json").write_bytes(content)
    assert words in told(capsys, path)


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds nothing to draw" in told(capsys, empty)
    assert "no such folder" in told(capsys, tmp_path / "nowhere")
    lost = store(tmp_path / "lost")
    (lost / "metrics.jsonl").unlink()
    assert "No such file" in told(capsys, lost)
    assert main(["plot", ""]) == 2
    assert "expected a path" in capsys.readouterr().err
    assert main(["plot"]) == 2
    assert "DIR" in capsys.readouterr().err


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
    import io

    opened = image.open(io.BytesIO(found))
    opened.load()
    assert opened.info["Source"] == "backmatch plot"


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(tmp_path / "run")
    for name in [n for n in sys.modules if n.startswith("backmatch.plotting.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("overlay", "run_page", "style", "block_panels"):
        monkeypatch.delattr(f"backmatch.plotting.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in told(capsys, path)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    path = store(tmp_path / "run", run_rows(0))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from backmatch.cli import main\n"
        f"sys.exit(main(['plot', {str(path)!r}, '--quiet']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (path / "plot.png").exists()


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
