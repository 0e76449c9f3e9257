"""``backmatch plot`` on folders that are damaged or hostile, and where it writes."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plot_cases import run_rows, store, told

from backmatch.cli import main
from backmatch.plotting import run_page, stored_run, style

#: What every problem of a figure warns of, such as a glyph that no font has.
pytestmark = pytest.mark.filterwarnings("error")


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


@pytest.mark.parametrize("value", ["1", [1], {"median": "x"}, {"median": {"a": 1}}, True, 3.0])
def test_damaged_numbers_of_a_block(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_rows(2)
    rows[2]["blocks"][1]["weight"]["damping"] = value
    error = told(capsys, store(tmp_path / "run", rows))
    assert "probe" in error
    assert "number" in error


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
    assert "no such file" in told(capsys, lost)
    assert main(["plot", ""]) == 2
    assert "expected a path" in capsys.readouterr().err
    assert main(["plot"]) == 2
    assert "DIR" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_pipe_is_not_waited_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store(tmp_path / "run")
    (path / name).unlink()
    os.mkfifo(path / name)
    assert "no plain file" in told(capsys, path)


@pytest.mark.parametrize("seed", range(4))
def test_any_numbers_are_drawn(seed: int, tmp_path: Path) -> None:
    """Numbers of every size in every place, steps in any order: a page, and no warning."""
    draw = random.Random(seed)
    sizes = [0, -1, 1e-300, 5e-324, 1e300, -1e300, 1.7e308, 0.5, 3, None]

    def shaken(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shaken(each) for key, each in value.items()}
        if isinstance(value, float):
            return draw.choice(sizes)
        return value

    rows = [
        {k: [shaken(b) for b in v] if k == "blocks" else shaken(v) for k, v in row.items()}
        for row in run_rows(2, epochs=1)
    ]
    draw.shuffle(rows)
    run = stored_run.read(store(tmp_path / "run", rows))
    with style.context():
        style.save(run_page._probed(run) if seed else run_page._plain(run))
