"""A full disk: one honest line, the last checkpoint intact, the same bits once there is room."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli_child import Stage, finish, limited, stages, wrap_stages
from run_cases import arguments, assert_same_run, resume

from backmatch.cli import main
from backmatch.training import checkpoint, files, run

METHOD = "bp-adam"
POINTS = 20

#: Points of a resumed run: cutting the log, then as in any other.
RESUMED_POINTS = (0, 1, 6, 7, 9)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_draw_curves", lambda *_: False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert finish(arguments(METHOD, path)) == 0
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    return stages(arguments(METHOD, tmp_path_factory.mktemp("listed") / "run"))


@contextmanager
def full_from(call: int) -> Iterator[None]:
    """From the ``call``-th of the stages on no byte fits any more; the first write is cut short."""
    left = [call]

    def before(stage: Stage, *values: Any) -> None:
        left[0] -= 1
        if left[0] == -1 and stage[0] == "write":
            originals["write"](values[0], bytes(values[1])[: len(values[1]) // 2])
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    originals = wrap_stages(before)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def check_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert str(path) in error
    assert not list(path.glob(".*.tmp"))


def go_on(path: Path) -> int:
    return main(resume(path) if (path / "config.json").exists() else arguments(METHOD, path))


@pytest.mark.parametrize("point", range(POINTS))
def test_disk_full_at_20_points(
    point: int,
    whole: Path,
    undisturbed: list[Stage],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, call = tmp_path / "run", point * (len(undisturbed) - 1) // (POINTS - 1)
    with full_from(call):
        assert main(arguments(METHOD, path)) == 1
    check_told(path, capsys)
    saves = undisturbed[:call].count(("replace", "checkpoint.pt"))
    kept = checkpoint.load(path, note=lambda text: None)
    assert (kept is None) == (saves == 0)
    assert go_on(path) == 0
    assert_same_run(path, whole)


@pytest.mark.parametrize("point", RESUMED_POINTS)
def test_disk_full_of_a_resumed_run(
    point: int,
    whole: Path,
    undisturbed: list[Stage],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run"
    middle = len(undisturbed) // 2
    with full_from(middle):
        assert main(arguments(METHOD, path)) == 1
    capsys.readouterr()
    with full_from(point):
        assert main(resume(path)) == 1
    check_told(path, capsys)
    assert main(resume(path)) == 0
    assert_same_run(path, whole)


def test_disk_full_when_the_previous_checkpoint_takes_its_place(
    whole: Path, undisturbed: list[Stage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    with full_from(len(undisturbed) - 6):
        assert main(arguments(METHOD, path)) == 1
    (path / checkpoint.NEWEST).write_bytes(b"damaged")
    capsys.readouterr()
    with full_from(0):
        assert main(resume(path)) == 1
    check_told(path, capsys)
    assert main(resume(path)) == 0
    assert_same_run(path, whole)


@pytest.mark.parametrize("size", [100, 1500, 3000, 8000])
def test_files_that_may_not_grow(size: int, whole: Path, tmp_path: Path) -> None:
    """The operating system's own limit: writes are cut short in the middle of a file."""
    path = tmp_path / "run"
    code, error = limited(arguments(METHOD, path), size)
    assert code == 1
    assert error.count("\n") == 1
    assert "File too large" in error
    assert not list(path.glob(".*.tmp"))
    assert go_on(path) == 0
    assert_same_run(path, whole)


def test_disk_full_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
