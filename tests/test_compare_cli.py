"""``backmatch compare``: wrong usage, and what the flags become."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli_usage import LIGHT, refused

from backmatch.cli import main
from backmatch.comparing import options
from backmatch.training.failures import UsageError
from backmatch.training.options import OPTIONS as TRAIN


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--methods fof", "--methods: unknown method 'fof', did you mean 'foof'?"),
        ("--methods cg-0", "--methods: unknown method 'cg-0', did you mean 'cg-"),
        ("--methods cg", "unknown method 'cg'"),
        ("--methods exact,exact", "--methods: expected names of methods with commas between, each"),
        ("--methods exact,", "--methods: expected names"),
        ("--method exact", "unknown argument '--method', did you mean '--methods'?"),
        ("--seeds 0", "--seeds: expected a number of seeds, or the seeds"),
        ("--seeds 1,1", "each once, got '1,1'"),
        ("--seeds -1", "--seeds"),
        ("--seeds 1.5", "--seeds"),
        ("--seeds 5000", "from 1 to 1000 of them, got '5000'"),
        ("--seeds 3,7 --tuning-seeds 9,7", "expected different ones, both hold 7"),
        ("--rates 0", "--rates: expected learning rates > 0 with commas between"),
        ("--rates nan", "--rates"),
        ("--rates exact=", "--rates"),
        ("--rates exact", "--rates: expected learning rates > 0"),
        ("--rates exat=1", "--rates: unknown method 'exat', did you mean 'exact'?"),
        ("--rates cg-3=1", "cg-3 is none of --methods; add it, or drop it"),
        ("--rates 1 --rates 2", "--rates: expected rates once for all methods"),
        ("--target 0", "--target: expected an accuracy > 0 and <= 1"),
        ("--target 95", "--target: expected an accuracy > 0 and <= 1, for example 0.95, got '95'"),
        ("--evaluate-every 0", "--evaluate-every: expected a whole number >= 1"),
        ("--report-epochs 6", "--report-epochs: expected epochs up to the last one, 5, got 6"),
        ("--report-epochs 0", "--report-epochs: expected epochs"),
        ("--epochs 0", "--epochs: expected a whole number >= 1"),
        ("--hidden x", "--hidden: expected sizes"),
        ("--lr 1", "unknown argument '--lr'"),
        ("--model cnn --hidden 3", "--hidden has no effect with --model cnn; drop it"),
        ("--model cnn --activation tanh", "--activation has no effect with --model cnn; drop it"),
        ("--methods layer-inverse", "--methods layer-inverse: --inputs layer-inverse: expected"),
        ("--methods layer-inverse --model cnn", "expected --model mlp with --activation"),
        ("--data nowhere.npz", "--data 'nowhere.npz': no such file"),
        ("--data synthetic --batch-size 5000", "larger than the 2048 training samples"),
        ("--data synthetic --batch-size 2000", "that are left when rates are chosen; lower it"),
        ("--dry-run --out somewhere", "--dry-run writes nothing; drop --out"),
        ("--resume nowhere", "--resume 'nowhere': no such folder"),
        ("--resume nowhere --quick", "takes up a stored comparison as it is; drop --quick"),
        ("--resume nowhere --dry-run", "takes up a stored comparison as it is; drop --dry-run"),
        ("--resume . --out x", "takes up a stored comparison as it is; drop --out"),
        ("--resume .", "holds no comparison (no runs.jsonl); start one with --out"),
    ],
)
def test_wrong_words(
    words: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(["compare", *words.split()], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["compare", "--help"], 0),
        (["compare", "--methods", "fof"], 2),
        (["compare", "--out", __file__], 2),
        (["compare", "--resume", str(Path(__file__).parent)], 2),
    ],
    ids=["help", "name", "out", "resume"],
)
def test_help_and_usage_errors_answer_without_torch(arguments: list[str], code: int) -> None:
    script = LIGHT.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"CODE {code} HEAVY []", done.stderr


def test_too_few_samples_to_hold_some_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import numpy as np

    x, y = np.zeros((9, 3)), np.arange(9) % 3
    np.savez(tmp_path / "few.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    told = refused(["compare", "--data", str(tmp_path / "few.npz")], capsys)
    assert "expected at least 10 training samples to hold some out, got 9" in told


def test_out_holds_a_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    told = refused(["compare", "--out", str(tmp_path)], capsys)
    assert f"continue it with --resume {tmp_path}" in told
    assert (tmp_path / "compare.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["compare.md", "compare.png"])
def test_out_holds_a_file_that_would_be_replaced(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("precious")
    assert f"holds a {name} already" in refused(["compare", "--out", str(tmp_path)], capsys)
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]\n",
        b'{"kind": "comparison"}',
        b'{"kind": "tuning"}\n',
        b'{"kind": "comparison"}\n',
        b'{"kind": "comparison", "options": []}\n',
        b'{"kind": "comparison", "options": {"lr": 1}}\n',
        b'{"kind": "comparison", "options": {"epochs": "x"}}\n',
        b'{"kind": "comparison", "options": {"methods": [1]}}\n',
        b'{"kind": "comparison", "options": {"rates": {"exact": "x"}}}\n',
        b'{"kind": "comparison", "options": {"rates": {"exact": []}}}\n',
        b"\xff\xfe\n",
    ],
)
def test_resume_with_a_broken_first_line(
    line: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "runs.jsonl").write_bytes(line)
    told = refused(["compare", "--resume", str(tmp_path)], capsys)
    assert "runs.jsonl" in told
    assert (tmp_path / "runs.jsonl").read_bytes() == line


def test_shared_options_are_those_of_train() -> None:
    """One table: the same readers, names and help texts."""
    names = {option.name for option in TRAIN if option in options.OPTIONS}
    assert {"data", "model", "hidden", "activation", "batch_size", "epochs"} < names
    assert {"device", "dtype", "threads"} < names
    assert not {"lr", "seed", "method", "optimizer"} & names


def test_settled_options_survive_a_file() -> None:
    settled = options.settle(
        {"activation": "tanh", "hidden": "7", "rates": ["0.5", "exact=0.1,1"], "seeds": "3,5"}
    )
    assert settled.methods[-1] == "layer-inverse"  # the net can be inverted
    assert settled.seeds == [3, 5]
    assert settled.grid("exact") == [0.1, 1.0]
    assert settled.grid("cg-2") == [0.5]
    assert options.settle(json.loads(json.dumps(settled.as_dict()))) == settled


def test_defaults() -> None:
    settled = options.settle({})
    assert settled.seeds == [0, 1, 2, 3, 4]
    assert len(settled.tuning_seeds) == 3
    assert settled.report_epochs == [1, 5]
    assert settled.shared["hidden"] == [128, 128]
    assert "layer-inverse" not in settled.methods
    assert all(settled.may_extend(name) for name in settled.methods)
    assert options.settle({"model": "cnn"}).shared["hidden"] is None


def test_unknown_stored_option_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown option 'lrr'"):
        options.settle({"lrr": 1})


def test_dry_run_lists_the_runs_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "compare --dry-run --data synthetic --hidden 8 --batch-size 512 --threads 1 --seeds 3"
    words += " --epochs 2 --methods bp-sgd,cg-2,exact --rates exact=1 --rates cg-2=0.3,1"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    # 1638 of 2048 samples are left for tuning: 3 steps an epoch, 4 with all of them
    assert "3 methods, 3 seeds: 18 to 27 tuning runs of 6 steps, 9 runs of 8 steps" in out
    assert "held out for tuning: 410" in out
    rows = {line.split()[0]: line for line in out.splitlines()[1:] if line.strip()}
    assert "0.1, 0.2, 0.5, 1" in rows["bp-sgd"]
    assert "12 to 21" in rows["bp-sgd"]
    assert "0.3, 1  " in rows["cg-2"]
    assert rows["exact"].split()[1:4] == ["1", "0", "3"]
    assert not list(tmp_path.iterdir())
