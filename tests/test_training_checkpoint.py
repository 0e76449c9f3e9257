"""Checkpoints: whatever happens to the bytes, it is noticed."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backmatch.training import checkpoint
from backmatch.training.failures import UsageError

PAYLOAD = {"step": 3, "model": {"w": torch.arange(64.0)}, "config": {"hidden": [4], "lr": None}}


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, {**PAYLOAD, "step": step})


def load_step(folder: Path, notes: list[str]) -> Any:
    payload = checkpoint.load(folder, notes.append)
    return None if payload is None else payload["step"]


def test_round_trip_and_plain_torch_load(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, pytest.fail) is None
    save(tmp_path, 1)
    payload = checkpoint.load(tmp_path, pytest.fail)
    assert payload is not None
    assert torch.equal(payload["model"]["w"], PAYLOAD["model"]["w"])  # type: ignore[index]
    plain = torch.load(tmp_path / checkpoint.NEWEST, weights_only=True)
    assert plain["config"] == PAYLOAD["config"]


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert {p.name for p in tmp_path.iterdir()} == {checkpoint.NEWEST, checkpoint.PREVIOUS}
    previous = checkpoint.decode((tmp_path / checkpoint.PREVIOUS).read_bytes())
    assert previous["step"] == 2


def damaged_copies(content: bytes) -> Iterator[bytes]:
    """200 flipped bytes and 50 cuts at random places; every byte of the trailer, and its ends."""
    random = np.random.default_rng(0)
    size = len(content)
    for position in [*random.integers(0, size, 200), *range(size - 90, size)]:
        copy = bytearray(content)
        copy[position] ^= 1 << int(random.integers(8))
        yield bytes(copy)
    for position in [*random.integers(0, size, 50), 0, size - 1]:
        yield content[:position]
    yield content + b"\n"


def test_200_flipped_bytes_and_50_truncations_fall_back_with_a_message(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    newest, previous = tmp_path / checkpoint.NEWEST, tmp_path / checkpoint.PREVIOUS
    good, before = newest.read_bytes(), previous.read_bytes()
    count = 0
    for damaged in damaged_copies(good):
        newest.write_bytes(damaged)
        previous.write_bytes(before)
        notes: list[str] = []
        assert load_step(tmp_path, notes) == 1
        assert len(notes) == 1
        assert "falling back to the previous checkpoint (checkpoint.pt: it" in notes[0]
        assert newest.read_bytes() == before
        count += 1
    assert count == 200 + 90 + 50 + 3


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


def test_a_sealed_pickle_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / checkpoint.NEWEST).write_bytes(checkpoint.encode({"step": Exploit()}))
    with pytest.raises(UsageError, match="no intact checkpoint"):
        checkpoint.load(tmp_path, pytest.fail)
    (tmp_path / checkpoint.NEWEST).write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(UsageError, match="no intact checkpoint"):
        checkpoint.load(tmp_path, pytest.fail)
    assert not (tmp_path / "exploited").exists()


def test_fall_back_survives_the_next_save(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / checkpoint.NEWEST).write_bytes(b"damaged")
    notes: list[str] = []
    assert load_step(tmp_path, notes) == 1
    assert notes == ["falling back to the previous checkpoint (checkpoint.pt: it is truncated)"]
    assert load_step(tmp_path, notes) == 1
    assert len(notes) == 1
    save(tmp_path, 2)
    (tmp_path / checkpoint.NEWEST).unlink()
    assert load_step(tmp_path, notes) == 1
    assert notes[1:] == ["falling back to the previous checkpoint (checkpoint.pt is missing)"]


def test_nothing_intact(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    for name in (checkpoint.NEWEST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"checkpoint.pt: .*; checkpoint.previous.pt: "):
        checkpoint.load(tmp_path, pytest.fail)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_save_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 3)
    assert load_step(tmp_path, []) == 2
