"""The folder of a comparison: its options, every finished run, and the results at the end.

``runs.jsonl`` begins with one line of options and gains one line per finished run, forced to the
disk before the next run starts. One process owns it: it is locked while a comparison works.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ..training.failures import RunError, UsageError, show
from ..training.files import fsync_folder, write_fully
from ..training.rundir import check_writable, free_folder
from .options import CompareOptions, settle

RUNS, RESULT, TABLE, FIGURE = "runs.jsonl", "compare.json", "compare.md", "compare.png"

#: What every run has, see :mod:`backmatch.comparing`.
_RUN = {
    *("kind", "method", "lr", "seed", "weights_sha256", "train_loss", "steps", "accuracy", "loss"),
    *("training_seconds", "step_ms", "unconverged_steps", "error"),
}
_READABLE = (ValueError, LookupError, TypeError, AttributeError)


def default_folder(options: CompareOptions) -> Path:
    """``runs/compare-digits-mlp``; with -2, -3, .. where that is taken."""
    return free_folder(options.shared["data"], options.shared["model"], before="compare-")


def check_new(path: Path) -> None:
    """Refuse an ``--out`` folder that holds results or cannot be written; changes nothing."""
    where = f"--out {show(str(path), 200)}"
    check_writable(path, where)
    if (path / RESULT).exists() or _head(path) is not None:
        raise UsageError(
            f"{where}: holds a comparison already; continue it with --resume {path}, "
            "or choose another folder"
        )
    for name in (TABLE, FIGURE):
        if (path / name).exists():
            raise UsageError(f"{where}: holds a {name} already; choose another folder")


def saved_head(path: Path) -> dict[str, Any]:
    """The first line of the comparison in ``path``."""
    where = f"--resume {show(str(path), 200)}"
    if not path.is_dir():
        raise UsageError(f"{where}: no such folder")
    head = _head(path)
    if head is None:
        raise UsageError(f"{where}: holds no comparison (no {RUNS}); start one with --out")
    return head


def saved_options(path: Path) -> CompareOptions:
    """The options of the comparison in ``path``."""
    options = saved_head(path).get("options")
    where = f"--resume {show(str(path), 200)}: {RUNS}"
    if not isinstance(options, dict):
        raise UsageError(f"{where}: the first line holds no options; start anew with --out")
    try:
        return settle(options)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except _READABLE as error:
        raise UsageError(f"{where}: the first line is no options of ours ({error})") from None


def is_finished(path: Path) -> bool:
    """``compare.json`` is written last."""
    return (path / RESULT).exists()


def _head(path: Path) -> dict[str, Any] | None:
    """The first line, ``None`` where there is none or it was cut short."""
    try:
        with (path / RUNS).open("rb") as file:
            line = file.readline()
    except OSError:
        return None
    head = _row(line)
    return head if head is not None and head.get("kind") == "comparison" else None


def _row(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class CompareFolder:
    """The open folder of a comparison that this process writes.

    Attributes:
        path: the folder.
        head: the first line.
        runs: every finished run.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self.path = path
        self.head: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []
        where = f"{flag} {show(str(path), 200)}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path / RUNS, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"{where}: cannot write there: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UsageError(f"{where}: another process is writing there") from None

    @classmethod
    def create(cls, path: Path, head: dict[str, Any]) -> CompareFolder:
        """Start a comparison."""
        folder = cls(path, "--out")
        try:
            check_new(path)  # again, now that the lock is held
            os.ftruncate(folder._file, 0)
            folder._append({"kind": "comparison", **head})
            fsync_folder(path)
        except OSError as error:
            os.close(folder._file)
            raise RunError(f"cannot start a comparison in {path}: {error.strerror}") from None
        except UsageError:
            os.close(folder._file)
            raise
        folder.head = {"kind": "comparison", **head}
        return folder

    @classmethod
    def reopen(cls, path: Path) -> CompareFolder:
        """Take up a comparison; a last line that was cut short is dropped."""
        folder = cls(path, "--resume")
        try:
            folder._load()
        except BaseException:
            os.close(folder._file)
            raise
        for left in path.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                left.unlink()
        return folder

    def _load(self) -> None:
        content = (self.path / RUNS).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = [_row(line + b"\n") for line in whole.split(b"\n")[:-1]]
        for number, row in enumerate(rows, 1):
            if row is None or (number > 1 and not row.keys() >= _RUN):
                raise UsageError(
                    f"--resume {self.path}: {RUNS}, line {number}: not what was written there; "
                    "put the file back, or start anew with --out"
                )
        self.head, *self.runs = [row for row in rows if row is not None]
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, len(whole), os.SEEK_SET)

    def __enter__(self) -> CompareFolder:
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._file)

    def add(self, run: dict[str, Any]) -> None:
        """Append a finished run; it is on the disk when this returns."""
        self._append(run)
        self.runs.append(run)

    def _append(self, row: dict[str, Any]) -> None:
        write_fully(self._file, (json.dumps(row, allow_nan=False) + "\n").encode())
        os.fsync(self._file)
