"""``backmatch doctor``: readable, honest, and its self-check can fail."""

from __future__ import annotations

import pytest

from backmatch import linalg
from backmatch.cli import main
from backmatch.linalg import _library


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "\x1b" not in captured.out
    for word in ("backmatch ", "python ", "torch ", "compiler ", "SIMD ", "CUDA", "threads "):
        assert word in captured.out
    assert captured.out.count("  OK ") >= 2
    assert captured.out.splitlines()[-1] == "all is well"


def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = linalg.spd_solve
    monkeypatch.setattr(linalg, "spd_solve", lambda A, B, damping: right(A, B) * (1 + 1e-6))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED cpu: spd_solve equals the NumPy reference" in out
    assert "OK     cpu: Gradient on both sides equals autograd" in out


def test_a_missing_extension_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_library, "_extension", None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED the compiled module backmatch._C is missing" in out
    assert "FAILED cpu: spd_solve" in out
