"""A run as its folder tells it: finished, stopped, or still going on."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.failures import UsageError, show
from ..training.rundir import CONFIG, METRICS, SUMMARY
from .read_json import number, parse, read_mapping, require_file, whole

#: A row with as many blocks as we draw is far below the first; a file of ours below the second.
MAX_LINE, MAX_BLOCKS = 1 << 24, 512
#: Names from a report down to a number: ("weight", "spectrum", "condition", "median").
DEEPEST = 4
_MAX_CONFIG = 1 << 20

#: Where a number stands in a block of a probe, such as ("weight", "cosine", "gradient").
Key = tuple[str, ...]


@dataclass
class Evaluations:
    """One number per evaluation in every list; NaN where it is not known."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)


@dataclass
class StoredRun:
    """What is drawn of a run.

    Attributes:
        path: its folder.
        config: its options that are plain values.
        finished: whether it came to its end.
        steps, losses: of every training step.
        evaluations: one per epoch.
        probed: steps of the probes.
        blocks: names of the probed blocks, bottom first.
        numbers: of every block, where a number stands -> its values, one per probe.
        flags: of every block, where a yes or no stands -> that of the last probe.
        odd: where something else stands -> the step of the probe.
        failures: step and reason of the probes that failed.
    """

    path: Path
    config: dict[str, Any]
    finished: bool
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: Evaluations = field(default_factory=Evaluations)
    probed: list[int] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    numbers: list[dict[Key, array[float]]] = field(default_factory=list)
    flags: list[dict[Key, bool]] = field(default_factory=list)
    odd: dict[Key, int] = field(default_factory=dict)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def series(self, key: Key) -> list[list[float]]:
        """Of every block, one number per probe: NaN where it is undefined.

        Raises:
            UsageError: what stands there is no number.
        """
        for end in range(1, len(key) + 1):
            step = self.odd.get(key[:end])
            if step is not None:
                raise _damaged(self.path, f"probe at step {step}: {'.'.join(key)} is no number")
            if end < len(key) and any(key[:end] in found for found in self.numbers):
                raise _damaged(self.path, f"{'.'.join(key[:end])} of a probe is a lone number")
        if any(other[: len(key)] == key != other for found in self.numbers for other in found):
            raise _damaged(self.path, f"{'.'.join(key)} of a probe is no number")
        missing = [math.nan] * len(self.probed)
        return [
            [*found[key], *missing[len(found[key]) :]] if key in found else missing
            for found in self.numbers
        ]

    def flag(self, b: int, key: Key) -> bool | None:
        """What the last probe says of a block, ``None`` if that is no yes or no."""
        return self.flags[b].get(key)


def read(path: Path) -> StoredRun:
    """Read a run's folder; a last line that is still being written is left out.

    Raises:
        UsageError: there is no run, nothing to draw yet, or its files are damaged.
    """
    config = read_mapping(path / CONFIG, _MAX_CONFIG)
    plain = {key: value for key, value in config.items() if _is_plain(value)}
    run = StoredRun(path, plain, (path / SUMMARY).exists())
    take = {"step": _take_step, "evaluation": _take_evaluation, "probe": _take_probe}
    for count, line in enumerate(_lines(path / METRICS), 1):
        try:
            row = parse(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {show(row)}")
            kind = row.get("kind")
            if isinstance(kind, str) and kind in take:  # rows of a later version are left out
                take[kind](run, row)
        except ValueError as error:
            raise _damaged(path, f"line {count}: {error}") from None
    if not run.steps:
        raise UsageError(f"{show(str(path), 200)}: {METRICS} holds no step yet; draw it later")
    return run


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(isinstance(item, (int, str)) for item in value)
    return value is None or isinstance(value, (str, int, float))


def _lines(path: Path) -> Iterator[str]:
    """The complete lines of a file that another process may be writing."""
    require_file(path)
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if not line.endswith(b"\n"):
                    if len(line) == MAX_LINE:
                        raise _damaged(path.parent, f"a line longer than {MAX_LINE >> 20} MiB")
                    return
                yield line.decode("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{show(str(path), 200)}: cannot read it: {error.strerror}") from None


def _damaged(path: Path, what: str) -> UsageError:
    return UsageError(f"{show(str(path / METRICS), 200)}: damaged, {what}")


def _take_step(run: StoredRun, row: dict[str, Any]) -> None:
    run.steps.append(whole(row.get("step"), "step"))
    run.losses.append(number(row.get("train_loss"), "train_loss"))


def _take_evaluation(run: StoredRun, row: dict[str, Any]) -> None:
    found = run.evaluations
    found.steps.append(whole(row.get("step"), "step"))
    found.seconds.append(number(row.get("elapsed_seconds"), "elapsed_seconds"))
    for name in ("train_accuracy", "test_loss", "test_accuracy"):
        getattr(found, name).append(number(row.get(name), name))


def _take_probe(run: StoredRun, row: dict[str, Any]) -> None:
    step, blocks = whole(row.get("step"), "step"), row.get("blocks")
    if "error" in row:
        run.failures.append((step, str(row["error"])))
        return
    if not isinstance(blocks, list) or not 0 < len(blocks) <= MAX_BLOCKS:
        raise ValueError(f"blocks must be a list of 1 to {MAX_BLOCKS} reports")
    names = [block.get("block") if isinstance(block, dict) else None for block in blocks]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("every block of a probe must be a report with its name")
    if run.blocks and names != run.blocks:
        raise ValueError("the blocks are not those of the probes before")
    if not run.blocks:
        run.blocks = [str(name) for name in names]
        run.numbers, run.flags = [{} for _ in names], [{} for _ in names]
    for b, block in enumerate(blocks):
        _take_numbers(run, b, step, block, ())
    run.probed.append(step)


def _take_numbers(run: StoredRun, b: int, step: int, part: dict[str, Any], where: Key) -> None:
    """Every number of a report by where it stands; lists of numbers need no rows of objects."""
    for name, value in part.items():
        key = (*where, name)
        if isinstance(value, dict) and len(key) < DEEPEST:
            _take_numbers(run, b, step, value, key)
        elif isinstance(value, bool):
            run.flags[b][key] = value
            run.odd.setdefault(key, step)
        elif isinstance(value, (int, float)):
            values = run.numbers[b].setdefault(key, array("d"))
            values.extend([math.nan] * (len(run.probed) - len(values)))  # where it was null before
            values.append(number(value, ".".join(key)))
        elif value is not None:
            run.odd.setdefault(key, step)
