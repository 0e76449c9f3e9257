"""The folder of one run: options, log, summary, and whatever else a run leaves there.

One process owns it: ``metrics.jsonl`` is locked while a run writes. Nothing here imports torch,
so that a wrong ``--out`` or ``--resume`` is told at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

from .config import TrainConfig, read_config_file, resolve, to_json
from .failures import RunError, UsageError, show
from .files import write_atomic, write_fully

CONFIG, METRICS, SUMMARY, CURVES = "config.json", "metrics.jsonl", "summary.json", "curves.png"

#: Files of an earlier run; where its config.json is gone they would be mistaken for the new one's.
_STALE = (SUMMARY, CURVES, "checkpoint.pt", "checkpoint.previous.pt")


def default_folder(config: TrainConfig) -> Path:
    """``runs/digits-mlp-backmatch-seed0``; with -2, -3, .. where that is taken."""
    return free_folder(config.data, f"{config.model}-{config.method}-seed{config.seed}")


def free_folder(data: str, *rest: str, before: str = "") -> Path:
    """A folder in ``runs`` that is named after the data and is not there yet."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(data).stem)[:60]
    name = before + "-".join([stem, *rest])
    path, count = Path("runs") / name, 1
    while path.exists():
        count += 1
        path = path.with_name(f"{name}-{count}")
    return path


def check_new(path: Path) -> None:
    """Refuse an ``--out`` folder that holds a run or cannot be written; changes nothing."""
    where = f"--out {show(str(path), 200)}"
    check_writable(path, where)
    if (path / CONFIG).exists():
        raise UsageError(
            f"{where}: holds a run already; continue it with --resume {path}, "
            "or choose another folder"
        )


def check_writable(path: Path, where: str) -> None:
    """Refuse a folder that cannot be made or written; ``where`` begins the sentence."""
    if not str(path).isprintable():
        raise UsageError(f"{where}: the path holds control characters; choose another folder")
    try:
        existing = path
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}; choose another folder") from None
    if not existing.is_dir():
        raise UsageError(f"{where}: {show(str(existing), 200)} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"{where}: no permission to write in {show(str(existing), 200)}; choose another folder"
        )


def saved_config(path: Path) -> TrainConfig:
    """The configuration of the run in ``path``."""
    where = f"--resume {show(str(path), 200)}"
    if not path.is_dir():
        raise UsageError(f"{where}: no such folder")
    if not (path / CONFIG).exists():
        raise UsageError(f"{where}: holds no run (no {CONFIG}); start one with --out")
    try:
        return resolve(read_config_file(path / CONFIG, flag="--resume"))
    except ValueError as error:
        raise UsageError(f"{where}: {CONFIG}: {error}") from None


def is_finished(path: Path) -> bool:
    """``summary.json`` is written last."""
    return (path / SUMMARY).exists()


class RunFolder:
    """The open folder of a run that this process writes.

    Attributes:
        path: the folder.
        size: bytes of ``metrics.jsonl`` so far.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self.path = path
        self.size = 0
        where = f"{flag} {show(str(path), 200)}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._metrics = os.open(path / METRICS, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            reason = error.strerror
            raise UsageError(f"{where}: cannot write there: {reason}") from None
        try:
            fcntl.flock(self._metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._metrics)
            raise UsageError(f"{where}: another process is writing this run") from None

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> RunFolder:
        """Start a run: an empty log, then ``config.json``, which makes the folder a run."""
        folder = cls(path, "--out")
        try:
            check_new(path)  # again, now that the lock is held
            for name in _STALE:
                (path / name).unlink(missing_ok=True)
            folder.cut(0)
            write_atomic(path / CONFIG, to_json(config).encode())
        except OSError as error:
            folder.close()
            raise RunError(f"cannot start a run in {path}: {error.strerror}") from None
        except UsageError:
            folder.close()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Take up a run; temporary files that a crash left are removed."""
        folder = cls(path, "--resume")
        for left in path.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                left.unlink()
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the run back: its lock goes with the open file."""
        os.close(self._metrics)

    def cut(self, size: int) -> None:
        """Drop the rows after byte ``size``: those that no checkpoint covers."""
        held = os.fstat(self._metrics).st_size
        if held < size:
            raise UsageError(
                f"--resume {self.path}: {METRICS} has lost rows ({held} bytes, the checkpoint "
                f"counts {size}); put the file back, or start a new run with --out"
            )
        os.ftruncate(self._metrics, size)
        os.lseek(self._metrics, size, os.SEEK_SET)
        self.size = size

    def log(self, row: dict[str, Any]) -> None:
        """Append one row; it is with the operating system when this returns."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        write_fully(self._metrics, line)
        self.size += len(line)

    def sync(self) -> None:
        """Force the rows to the disk: a checkpoint counts on them."""
        os.fsync(self._metrics)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        text = os.pread(self._metrics, self.size, 0).decode()
        return [json.loads(line) for line in text.splitlines()]

    def write_summary(self, summary: dict[str, Any]) -> None:
        """``summary.json``: from here on the run is finished."""
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        write_atomic(self.path / SUMMARY, text.encode())
