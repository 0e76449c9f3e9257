"""From a case to a row: check every answer, then time all candidates in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.benchmark import Measurement

from . import machine, timing
from .accuracy import WrongAnswerError, require
from .case import OURS, Case, Settings

Row = dict[str, Any]

#: A peer works on a slice of the batch if its fewest samples would take longer than this share of
#: its time; the slice is never smaller than this.
_SMALLEST_SLICE = 8
#: Calls shorter than this are checked once more after they were timed.
_CHECK_AGAIN_SECONDS = 0.5


def measure(case: Case, settings: Settings) -> Row:
    """The row of one case, as :mod:`backmatch.bench` documents it.

    A peer that raises or is wrong, now or while it is timed, is recorded and left out. If ours is
    wrong nothing is reported but that.
    """
    with _threads(case.threads), _no_native_chatter():
        return _Contest(case, settings).row()


class _Contest:
    """One case in progress.

    Attributes:
        failed: name -> why it has no time.
        errors: name -> worst error of its answers.
        seconds: name -> one warm call.
    """

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.failed: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def row(self) -> Row:
        case = self.case
        row: Row = {"question": case.question, "case": dict(case.about), "ours": OURS}
        self._check_all()
        found = {} if OURS in self.failed else self._timed()
        # Some failures come and go: a library that is called wrongly from several threads.
        for name, seconds in self.seconds.items():
            if seconds < _CHECK_AGAIN_SECONDS:
                self._check(name)
        row["failed"] = self.failed
        if OURS in self.failed:
            return row | {"error": self.failed.pop(OURS)}
        row["residual"] = case.residual
        row["worst_scaled_residual"] = self._without_failed(self.errors)
        row["times"] = self._without_failed(found.pop("times"))
        return row | found | _compared(case, row["times"], found)

    def _without_failed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in self.failed}

    def _check_all(self) -> None:
        for name, run in self.case.candidates.items():
            self.settings.check_stop()
            self._check(name)
            # One call is warm enough to be timed if it is long, and cheap to repeat if not.
            if self.seconds.get(name, 1.0) < 0.1 and name not in self.failed:
                self.seconds[name] = timing.seconds_of(lambda: run(*self.case.inputs[0]))  # noqa: B023
        try:
            for check in self.case.more_checks if OURS not in self.failed else ():
                check()
        except WrongAnswerError as wrong:
            self.failed[OURS] = _reason(wrong)

    def _check(self, name: str) -> None:
        """Call a candidate once and judge its answer."""
        inputs = self.case.inputs[0]
        judge = self.case.own_errors.get(name, self.case.error)
        try:
            began = timing.clock()
            answer = self.case.candidates[name](*inputs)
            self.seconds.setdefault(name, timing.clock() - began)
            error = require(name, judge(inputs, answer), self.case.bound)
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        except Exception as failure:  # a peer that cannot do the case is a result, too
            self.failed[name] = _reason(failure)

    def _timed(self) -> Row:
        """``times`` of all that have not failed, both rates, and the case's extra fields."""
        case, effort = self.case, self.settings.effort
        row: Row = dict(case.extra([name for name in self.errors if name not in self.failed]))
        inputs = timing.Inputs(case.inputs)
        calls: dict[str, timing.Call] = {}
        counts: dict[str, int | None] = {}
        for name in self._without_failed(self.errors):
            counts[name] = None if name == OURS else _slice(case, self.seconds[name], effort)
            call = inputs.bind(case.candidates[name], counts[name], case.shared)
            calls[name] = call if name == OURS else self._guarded(name, call)
            if counts[name] is not None:
                self.seconds[name] = timing.seconds_of(calls[name])
        rates = machine.rates(self.settings.device, getattr(torch, case.about["dtype"]))
        for name, rate in rates.items():
            rate.run()
            calls[name] = rate.run
        seconds = self.seconds | {name: timing.seconds_of(rate.run) for name, rate in rates.items()}
        peers = effort.fewest_of_peers
        fewest = {
            name: peers if name in counts and name != OURS else effort.fewest for name in calls
        }
        measured = timing.interleave(
            calls, seconds, fewest, effort, self.settings.check_stop, self.settings.device.type
        )
        # A limit is what the machine can do: the fastest sample, which another process that takes a
        # core away for a while does not lower.
        rate_of = {name: rate.work / min(measured.pop(name).times) for name, rate in rates.items()}
        times = {name: _summary(one, case, counts[name]) for name, one in measured.items()}
        row["fma_gflops"] = rate_of["fma"] / 1e9
        if "matrix" in rate_of:
            row["matrix_gflops"] = rate_of["matrix"] / 1e9
        row["copy_gbytes_per_second"] = rate_of["copy"] / 1e9
        return row | {"times": times}

    def _guarded(self, name: str, call: timing.Call) -> timing.Call:
        """``call``, which after a failure does nothing but stand in the list of failures."""

        def run() -> None:
            if name not in self.failed:
                try:
                    call()
                except Exception as failure:
                    self.failed[name] = _reason(failure)

        return run


def _reason(failure: Exception) -> str:
    text = " ".join(str(failure).split())[:200]
    return text if isinstance(failure, WrongAnswerError) else f"{type(failure).__name__}: {text}"


def _slice(case: Case, estimate: float, effort: timing.Effort) -> int | None:
    """Systems of a slow peer's slice; ``None`` if the whole batch fits into its time."""
    if case.batch is None or estimate * effort.fewest <= effort.seconds:
        return None
    count = int(case.batch * effort.seconds / (estimate * effort.fewest))
    count = max(_SMALLEST_SLICE, count)
    return count if count < case.batch else None


def _summary(found: Measurement, case: Case, count: int | None) -> dict[str, Any]:
    scale = 1.0 if count is None or case.batch is None else case.batch / count
    summary: dict[str, Any] = {
        "median_seconds": found.median * scale,
        "iqr_seconds": found.iqr * scale,
        "repeats": len(found.raw_times),
        "calls_per_repeat": found.number_per_run,
    }
    if case.batch is not None:
        summary["systems_timed"] = case.batch if count is None else count
    return summary


def _compared(case: Case, times: Mapping[str, Any], rates: Row) -> Row:
    medians = {name: entry["median_seconds"] for name, entry in times.items()}
    ours = medians.pop(OURS)
    row: Row = {
        "ratios": {name: median / ours for name, median in medians.items()},
        "best_peer": min(medians, key=lambda name: medians[name]) if medians else None,
    }
    if case.flops:
        row["flops"] = case.flops
        row["gflops"] = {
            name: case.flops / entry["median_seconds"] / 1e9 for name, entry in times.items()
        }
        row["fraction_of_fma"] = row["gflops"][OURS] / rates["fma_gflops"]
    if case.bytes:
        row["bytes"] = case.bytes
        row["fraction_of_copy"] = case.bytes / 1e9 / ours / rates["copy_gbytes_per_second"]
    return row


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_native_chatter() -> Iterator[None]:
    """LAPACK libraries print parameter errors to the process's own stdout and stderr.

    They come back as exceptions too, which is where they are recorded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
