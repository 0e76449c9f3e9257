"""A run as its folder tells it: finished, stopped, or still going on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.failures import UsageError, show
from ..training.rundir import CONFIG, METRICS, SUMMARY
from .read_json import number, parse, read_mapping, whole

#: A row with as many blocks as we draw is far below the first; a file of ours below the second.
MAX_LINE, MAX_BLOCKS = 1 << 24, 512
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
        probes: of every probe, the reports of its blocks.
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
    probes: list[list[dict[str, Any]]] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def series(self, key: Key) -> list[list[float]]:
        """Of every block, one number per probe: NaN where it is undefined.

        Raises:
            UsageError: what stands there is no number.
        """
        return [
            [self._value(step, report[b], key) for step, report in self._rows()]
            for b in range(len(self.blocks))
        ]

    def flag(self, b: int, key: Key) -> bool | None:
        """What the last probe says of a block, ``None`` if that is no yes or no."""
        value: Any = self.probes[-1][b]
        for name in key:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, bool) else None

    def _rows(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        return zip(self.probed, self.probes, strict=True)

    def _value(self, step: int, block: dict[str, Any], key: Key) -> float:
        value: Any = block
        for name in key:
            if value is None:
                return math.nan
            if not isinstance(value, dict):
                raise _damaged(self.path, f"probe at step {step}: {'.'.join(key)} is no number")
            value = value.get(name)
        try:
            return number(value, ".".join(key))
        except ValueError as error:
            raise _damaged(self.path, f"probe at step {step}: {error}") from None


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
    run.blocks = [str(name) for name in names]
    run.probed.append(step)
    run.probes.append(blocks)
