"""``backmatch compare``: train everything, print the table, leave results in a folder."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..bench.machine import describe
from ..training import run as training
from ..training.data import Dataset
from ..training.failures import RunError, UsageError
from ..training.files import write_atomic
from ..training.interrupts import Interrupts
from ..training.loop import versions
from . import dryrun, progress, schedule, table, trial
from .folder import FIGURE, RESULT, TABLE, CompareFolder, default_folder
from .options import CompareOptions

#: Of the machine: what cannot change while a comparison goes on, or does not matter.
_NOT_OF_THE_MACHINE = ("date", "backmatch", "torch", "numpy")


def start(options: CompareOptions, out: Path | None, *, quiet: bool) -> int:
    """Compare from the beginning in ``out`` (``None``: a new one in ``runs``); the exit code."""
    with Interrupts() as interrupts:
        options, data = prepare(options)
        path = default_folder(options) if out is None else out
        with CompareFolder.create(path, _head(options, data)) as folder:
            return _run(options, data, folder, progress.create(quiet), interrupts)


def resume(options: CompareOptions, path: Path, *, quiet: bool) -> int:
    """Go on with the comparison in ``path``; returns the exit code."""
    with Interrupts() as interrupts:
        options, data = prepare(options)
        with CompareFolder.reopen(path) as folder:
            shown = progress.create(quiet)
            _require_same(folder, _head(options, data), shown)
            return _run(options, data, folder, shown, interrupts)


def show_plan(options: CompareOptions) -> int:
    """``--dry-run``: what would run and for how long; writes nothing."""
    return dryrun.show(*prepare(options))


def prepare(options: CompareOptions) -> tuple[CompareOptions, Dataset]:
    """Settle device and threads, load the data, and try every method on it.

    Raises:
        UsageError: no CUDA device, unusable data, or too few samples.
    """
    config = training.settle(options.config(options.methods[0]))
    shared = {**options.shared, "device": config.device, "threads": config.threads}
    options = dataclasses.replace(options, shared=shared)
    data = training.load_data(config)
    if len(data.x_train) < 2 * trial.HELD_OUT:
        raise UsageError(
            f"--data: expected at least {2 * trial.HELD_OUT} training samples to hold some out, "
            f"got {len(data.x_train)}"
        )
    _require_batches(options, data)
    for name in options.methods:
        with trial.assembled(options.config(name), data):
            pass
    return options, data


def _require_batches(options: CompareOptions, data: Dataset) -> None:
    size = options.shared["batch_size"]
    tuned = any(len(options.grid(name)) > 1 for name in options.methods)
    rest = len(trial.held_out(data).x_train)
    if tuned and rest < size <= len(data.x_train):
        raise UsageError(
            f"--batch-size {size} is larger than the {rest} training samples that are left when "
            "rates are chosen; lower it, or give one rate with --rates"
        )


def _head(options: CompareOptions, data: Dataset) -> dict[str, Any]:
    about = describe(torch.device(options.shared["device"]))
    return {
        "options": options.as_dict(),
        "versions": versions(),
        "machine": {key: about[key] for key in about if key not in _NOT_OF_THE_MACHINE},
        "began_unix_seconds": round(time.time()),
        "data": {
            "train": len(data.x_train),
            "validation": len(trial.held_out(data).x_test),
            "test": len(data.x_test),
            "classes": data.classes,
            "sha256": data.digest(),
        },
    }


def _require_same(folder: CompareFolder, now: dict[str, Any], shown: progress.Progress) -> None:
    """Refuse what would mix runs that cannot be compared."""
    held = folder.head
    try:
        changed = [
            f"{name}: the comparison has {held[part].get(name)}, now {value}"
            for part in ("options", "versions")
            for name, value in now[part].items()
            if held[part].get(name) != value
        ]
        if held["data"] != now["data"]:
            changed.append("data: the values are not those it began with")
        before = held["machine"].get("cpu"), now["machine"]["cpu"]
    except (LookupError, AttributeError):
        changed, before = ["its first line lacks what this program writes"], ("", "")
    if changed:
        raise UsageError(
            f"--resume {folder.path}: cannot go on exactly ({'; '.join(changed)}); "
            "undo the change, or start anew with --out"
        )
    if before[0] != before[1]:
        shown.note(f"note: earlier runs were timed on another machine ({before[0]})")


def _run(
    options: CompareOptions,
    data: Dataset,
    folder: CompareFolder,
    shown: progress.Progress,
    interrupts: Interrupts,
) -> int:
    tuning, _, final = schedule.count(options)
    shown.note(f"compare in {folder.path}: {schedule.plan(options, data)}")
    shown.start(tuning, final)
    data = data.to(torch.device(options.shared["device"]))
    comparison = schedule.Comparison(options, data, folder, shown, _stop_check(interrupts))
    try:
        choices = comparison.run()
    except trial.StoppedError:
        shown.stop()
        shown.note(
            f"stopped with {len(folder.runs)} runs done; continue with --resume {folder.path}"
        )
        return interrupts.exit_code
    except OSError as error:
        raise _disk_error(folder.path, error) from None
    finally:
        shown.stop()
    result = schedule.collect(comparison, choices)
    _store(result, folder.path, shown)
    return 0


def _stop_check(interrupts: Interrupts) -> Callable[[], None]:
    def check() -> None:
        if interrupts.received is not None:
            raise trial.StoppedError

    return check


def _disk_error(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write in {path}: {error.strerror}; the runs that are done are intact, make room "
        f"and continue with --resume {path}"
    )


def _store(result: dict[str, Any], path: Path, shown: progress.Progress) -> None:
    """Write the results, ``compare.json`` last, and show them."""
    try:
        write_atomic(path / TABLE, table.markdown(result).encode())
        missing = _draw(result, path / FIGURE)
        write_atomic(path / RESULT, to_json(result))
    except OSError as error:
        raise _disk_error(path, error) from None
    for line in ["", *table.terminal(result), ""]:
        shown.note(line)
    shown.note(f"table   {path / TABLE}")
    shown.note(f"figure  {missing or path / FIGURE}")
    shown.note(f"runs    {path / RESULT}")


def _draw(result: dict[str, Any], path: Path) -> str | None:
    """Why there is no figure, or ``None`` once it is written."""
    try:
        from . import figure
    except ImportError:
        return "none: matplotlib is not installed"
    write_atomic(path, figure.draw(result))
    return None


def to_json(result: dict[str, Any]) -> bytes:
    """The file's content: one line per field, method and run; refuses NaN and infinity."""
    parts = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in value)
            parts.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()
