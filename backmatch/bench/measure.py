"""From a case to a row: check every answer, then time all candidates in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
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
#: Names that the rates take among the candidates.
_RATES = ("fma", "copy")


def measure(case: Case, settings: Settings) -> Row:
    """The row of one case, as :mod:`backmatch.bench` documents it.

    A peer that raises or is wrong is recorded and left out. If ours is wrong nothing is timed, and
    the row says so.
    """
    with _threads(case.threads):
        return _measure(case, settings)


def _measure(case: Case, settings: Settings) -> Row:
    row: Row = {"question": case.question, "case": dict(case.about), "ours": OURS}
    checked, failed = _check(case, settings)
    row["failed"] = failed
    if OURS in failed:
        return row | {"error": failed.pop(OURS)}
    try:
        for check in case.more_checks:
            check()
    except WrongAnswerError as wrong:
        return row | {"error": str(wrong)}
    row["worst_scaled_residual"] = {name: error for name, (error, _) in checked.items()}
    row["residual"] = case.residual
    row |= case.extra()
    estimates = {name: seconds for name, (_, seconds) in checked.items()}
    return row | _timed(case, estimates, settings)


def _check(case: Case, settings: Settings) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Candidates that are right, with error and seconds of a warm call; and those that failed."""
    checked, failed = {}, {}
    for name, run in case.candidates.items():
        settings.check_stop()
        inputs = case.inputs[0]
        try:
            with _no_native_chatter():
                began = timing.clock()
                answer = run(*inputs)
                first = timing.clock() - began
            judge = case.own_errors.get(name, case.error)
            error = require(name, judge(inputs, answer), case.bound)
            # One call is warm enough to be timed if it is long, and cheap to repeat if not.
            warm = first if first > 0.1 else timing.seconds_of(lambda: run(*inputs))  # noqa: B023
            checked[name] = (error, warm)
        except WrongAnswerError as wrong:
            failed[name] = str(wrong)
        except Exception as failure:  # a peer that cannot do the case is a result, too
            text = " ".join(str(failure).split())
            failed[name] = f"{type(failure).__name__}: {text[:200]}"
    return checked, failed


def _timed(case: Case, estimates: Mapping[str, float], settings: Settings) -> Row:
    inputs = timing.Inputs(case.inputs)
    calls: dict[str, Callable[[], object]] = {}
    counts: dict[str, int | None] = {}
    seconds, fewest = dict(estimates), {}
    for name, estimate in estimates.items():
        counts[name] = None if name == OURS else _slice(case, estimate, settings.effort)
        calls[name] = inputs.bind(case.candidates[name], counts[name], case.shared)
        fewest[name] = settings.effort.fewest
        if name != OURS:
            fewest[name] = settings.effort.fewest_of_peers
        if counts[name] is not None:
            seconds[name] = timing.seconds_of(calls[name])
    dtype = getattr(torch, case.about["dtype"])
    rates = machine.rates(settings.device, dtype)
    for name, rate in rates.items():
        rate.run()
        calls[name], fewest[name] = rate.run, settings.effort.fewest
        seconds[name] = timing.seconds_of(rate.run)
    measured = timing.interleave(calls, seconds, fewest, settings.effort, settings.check_stop)
    scales = {name: _scale(case, counts.get(name)) for name in measured}
    times = {
        name: _summary(found, scales[name], case, counts.get(name))
        for name, found in measured.items()
        if name not in _RATES
    }
    fma, copy = (rates[name].work / measured[name].median for name in _RATES)
    return {"times": times, **_compared(case, times, fma, copy)}


def _slice(case: Case, estimate: float, effort: timing.Effort) -> int | None:
    """Systems of a slow peer's slice; ``None`` if the whole batch fits into its time."""
    if case.batch is None or estimate * effort.fewest <= effort.seconds:
        return None
    count = int(case.batch * effort.seconds / (estimate * effort.fewest))
    count = max(_SMALLEST_SLICE, count)
    return count if count < case.batch else None


def _scale(case: Case, count: int | None) -> float:
    return 1.0 if count is None or case.batch is None else case.batch / count


def _summary(found: Measurement, scale: float, case: Case, count: int | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "median_seconds": found.median * scale,
        "iqr_seconds": found.iqr * scale,
        "repeats": len(found.raw_times),
        "calls_per_repeat": found.number_per_run,
    }
    if case.batch is not None:
        summary["systems_timed"] = case.batch if count is None else count
    return summary


def _compared(case: Case, times: Mapping[str, Any], fma: float, copy: float) -> Row:
    ours = times[OURS]["median_seconds"]
    medians = {name: entry["median_seconds"] for name, entry in times.items() if name != OURS}
    row: Row = {
        "ratios": {name: median / ours for name, median in medians.items()},
        "best_peer": min(medians, key=lambda name: medians[name]) if medians else None,
        "fma_gflops": fma / 1e9,
        "copy_gbytes_per_second": copy / 1e9,
    }
    if case.flops:
        rate = {name: case.flops / entry["median_seconds"] for name, entry in times.items()}
        row["flops"] = case.flops
        row["gflops"] = {name: value / 1e9 for name, value in rate.items()}
        row["fraction_of_fma"] = rate[OURS] / fma
    if case.bytes:
        row["bytes"] = case.bytes
        row["fraction_of_copy"] = case.bytes / ours / copy
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
