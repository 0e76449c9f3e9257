"""Wrong usage: one line on stderr that says what, where and what to do; exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backmatch.cli import main


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run, expect one line on stderr and nothing on stdout; returns the line."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("backmatch: ")
    assert "Traceback" not in captured.err
    assert len(captured.err) < 500
    return captured.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train --bogus 1", "unknown argument '--bogus'"),
        ("train --epoch 1", "did you mean '--epochs'?"),
        ("train extra", "unknown argument 'extra'"),
        ("train --lr", "--lr: expected one argument"),
        ("train --lr x", "--lr: expected a number > 0, got 'x'"),
        ("train --lr -1", "--lr: expected a number > 0, got '-1'"),
        ("train --lr 0", "--lr"),
        ("train --lr nan", "--lr"),
        ("train --lr inf", "--lr"),
        ("train --epochs 0", "--epochs: expected a whole number >= 1, got '0'"),
        ("train --epochs 1.5", "--epochs"),
        ("train --batch-size 0", "--batch-size: expected a whole number >= 1"),
        ("train --batch-size 99999999999999999999", "--batch-size"),
        ("train --seed -1", "--seed: expected a whole number >= 0"),
        ("train --threads 0", "--threads: expected 1 to 4096, got '0'"),
        ("train --target-step 0", "--target-step"),
        ("train --momentum 1", "--momentum: expected a number >= 0 and < 1"),
        ("train --damping rel:x", "for example rel:0.1, got 'rel:x'"),
        ("train --damping -1", "--damping: expected a number >= 0"),
        ("train --weight-damping rel:-1", "--weight-damping"),
        ("train --input-damping rel:", "--input-damping"),
        ("train --input-damping nan", "--input-damping"),
        ("train --hidden 3,0", "--hidden: expected sizes from 1 to 65536"),
        ("train --hidden 3,,4", "--hidden"),
        ("train --hidden 1e9", "--hidden"),
        (
            "train --model resnet",
            "--model: expected one of mlp, cnn, vgg11, vgg13, vgg16, vgg11_bn",
        ),
        ("train --model cnn --hidden 3", "--hidden has no effect with --model cnn; drop it"),
        ("train --model cnn --data synthetic", "4 or more pixels a side, got samples of shape (32"),
        (
            "train --model vgg11",
            "--model vgg11: expected images of shape (channels, height, width)",
        ),
        ("train --model vgg13_bn --dry-run", "choose --model mlp, cnn, resnet20, or other data"),
        ("train --method sgd", "--method: expected one of backmatch, bp"),
        ("train --blocks none", "--blocks: expected one of activation, layer"),
        ("train --weights exact", "--weights: expected one of auto, cholesky, cg, scalar"),
        ("train --order both", "--order: expected one of simultaneous, sequential"),
        ("train --optimizer lion", "--optimizer"),
        ("train --device tpu", "--device: expected one of auto, cpu, cuda"),
        ("train --dtype float16", "--dtype: expected one of float32, float64"),
        ("train --data mnist", "--data: expected one of digits, synthetic, cifar10, cifar100"),
        ("train --data cifar10", "'data': no such folder; looked for data_batch_1.bin .. test_"),
        ("train --data cifar100 --data-dir .", "'.': found none of train.bin, test.bin (or in "),
        ("train --data-dir .", "--data-dir has no effect with --data 'digits'; drop it"),
        ("train --augment standard", "a digit moved or mirrored is another one; drop it"),
        ("train --augment standard --data synthetic", "synthetic has no images; drop it"),
        ("train --augment flip", "--augment: expected one of none, standard, got 'flip'"),
        ("train --weight-decay -1", "--weight-decay: expected a number >= 0, got '-1'"),
        ("train --schedule linear", "--schedule: expected one of constant, cosine, step"),
        ("train --config recipe:vgg13-cifar1", "(did you mean vgg13-cifar10?); there are vgg13"),
        ("train --config recipe:", "--config: unknown recipe ''; there are vgg13-cifar10, "),
        ("train --config recipe:../recipes/vgg13-cifar10", "unknown recipe '../recipes/vgg13"),
        ("train --config recipe:/etc/passwd", "unknown recipe '/etc/passwd'"),
        ("train --data nowhere.npz", "--data 'nowhere.npz': no such file"),
        ("train --method bp --weights cg", "--weights has no effect with --method bp; drop it"),
        ("train --method bp --damping 1", "--damping has no effect with --method bp"),
        ("train --weights gradient --weight-damping 1", "no effect with --weights gradient"),
        ("train --weights gradient --inputs gradient --damping 1", "--damping has no effect"),
        ("train --optimizer adam --momentum 0.9", "--momentum has no effect with --optimizer adam"),
        ("train --batch-size 5000 --data synthetic", "larger than the 2048 training samples"),
        ("train --dry-run --out somewhere", "--dry-run writes nothing; drop --out"),
        ("train --resume nowhere", "--resume 'nowhere': no such folder"),
        ("train --config nowhere.yaml", "--config 'nowhere.yaml': no such file"),
        ("doctor --fast", "unknown argument '--fast'"),
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
    assert told in refused(words.split(), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--out", "--resume", "--config"])
@pytest.mark.parametrize("path", ["", "a\0b"], ids=["empty", "null"])
def test_paths_that_are_none(flag: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag}: expected a path" in refused(["train", flag, path], capsys)


def test_control_characters_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in (["train", "--data", "a\n\x1b[31m"], ["train", "--out", "a\nb"]):
        assert "\x1b" not in refused(arguments, capsys)
    assert len(refused(["train", "--data", "x" * 100_000], capsys)) < 200


def test_out_is_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in ("file", "file/below", "file/far/below"):
        told = refused(["train", "--out", str(tmp_path / out)], capsys)
        assert "is not a folder" in told
    assert (tmp_path / "file").read_text() == "precious"


def test_out_holds_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    told = refused(["train", "--out", str(tmp_path)], capsys)
    assert f"continue it with --resume {tmp_path}" in told


def test_out_cannot_be_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    told = refused(["train", "--out", str(tmp_path / "run")], capsys)
    assert "no permission to write" in told


def test_out_cannot_be_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", forbidden)
    arguments = ["train", "--data", "synthetic", "--out", str(tmp_path / "run")]
    assert "cannot write there: Permission denied" in refused(arguments, capsys)


def test_resume_of_a_folder_without_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = refused(["train", "--resume", str(tmp_path)], capsys)
    assert "holds no run (no config.json)" in told


@pytest.mark.parametrize("text", ["", "[]", "{", '{"lr": "x"}', '{"method": "bp", "order": 1}'])
def test_resume_with_a_broken_config(
    text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refused(["train", "--resume", str(tmp_path)], capsys)


def test_cuda_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = refused(["train", "--device", "cuda"], capsys)
    assert "torch finds no CUDA device; use --device cpu" in told


def test_unexpected_error_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: object, **options: object) -> int:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("backmatch.training.run.start", broken)
    told = refused(["train", "--out", str(tmp_path / "run")], capsys, code=1)
    assert "ZeroDivisionError: two lines" in told


def test_interrupted_before_the_first_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("backmatch.training.run.start", interrupted)
    assert "interrupted" in refused(["train"], capsys, code=130)


LIGHT = """
import sys
from backmatch.cli import main
try:
    code = main({arguments!r})
except SystemExit as ended:
    code = ended.code
heavy = sorted(set(sys.modules) & {{"torch", "numpy", "scipy", "matplotlib", "sklearn", "rich"}})
print("CODE", code, "HEAVY", heavy)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["doctor", "--help"], 0),
        (["train", "--lr", "x"], 2),
        (["train", "--out", __file__], 2),
        (["train", "--config", __file__], 2),
    ],
    ids=lambda value: "-".join(value).split("/")[0] if isinstance(value, list) else str(value),
)
def test_help_and_usage_errors_answer_without_torch(arguments: list[str], code: int) -> None:
    script = LIGHT.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"CODE {code} HEAVY []", done.stderr


def test_python_m_backmatch() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backmatch", "train", "--lr", "x"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "backmatch: --lr: expected a number > 0, got 'x'\n"
