"""The short run of benchmarks/fuzz.py, and that it notices wrong answers."""

from __future__ import annotations

import fuzz
import pytest
import torch

from backmatch import linalg


@pytest.mark.slow
def test_five_seconds_of_random_calls_agree_with_float64() -> None:
    done = fuzz.run(seed=20261123, seconds=5.0)
    assert set(done) == set(fuzz.TARGETS)
    assert done.total() >= len(fuzz.TARGETS)


def test_a_case_is_the_same_every_time() -> None:
    drawn = [fuzz.Draw(3, 4).spd(2, 5) for _ in range(2)]
    assert torch.equal(*drawn)
    assert fuzz.main(["--seed", "3", "--only", "4"]) == 0


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("spd_solve_ex", lambda found: (found[0] * (1 + 1e-3), found[1])),
        ("weighted_gram", lambda found: found + 1e-2),
        ("scaled_gram_solve_ex", lambda found: (found[0].flip(-1), found[1])),
        ("ridge", lambda found: 0.5 * found),
    ],
)
def test_wrong_answers_are_noticed(name: str, spoil, monkeypatch, capsys) -> None:
    original = getattr(linalg, name)
    monkeypatch.setattr(linalg, name, lambda *a, **k: spoil(original(*a, **k)))
    with pytest.raises(fuzz.MismatchError, match="of seed 0"):
        fuzz.run(seed=0, seconds=20.0)
    assert fuzz.main(["--seconds", "20"]) == 1
    assert "case " in capsys.readouterr().err
