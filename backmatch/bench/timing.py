"""Interleaved timing: all candidates in turn, each turn on the next inputs.

Clock and statistics are those of ``torch.utils.benchmark`` (its timer synchronises CUDA, its
``Measurement`` has median and interquartile range); on CUDA a sample is the time between two events
on the stream, so that waiting for the device does not count. The loop is ours: ``Timer.timeit``
measures one candidate at a time, so that a machine that changes its speed between two of them would
decide their ratio, and it warms up before every sample, which triples the cost of a slow peer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Measurement, TaskSpec
from torch.utils.benchmark.utils.timer import timer

#: A sample lasts about this long, so that clock and loop do not count.
SAMPLE_SECONDS = 2e-3
MOST_CALLS = 1000
#: Calls up to this long come after one that is not counted: what the candidate before has left in
#: caches and thread pools would weigh on them.
WARMED_SECONDS = 2e-2

Call = Callable[[], object]

#: torch's benchmark clock: seconds, with CUDA idle.
clock: Callable[[], float] = timer


class InterruptedBenchError(Exception):
    """The run was asked to stop; what was measured before is complete."""


@dataclass(frozen=True)
class Effort:
    """How much time one candidate gets.

    Attributes:
        repeats: samples, where they fit into ``seconds``.
        seconds: what all samples of one candidate may take.
        fewest: samples that are taken even if they do not fit; for peers, ``fewest_of_peers``.
        fewest_of_peers: likewise.
    """

    repeats: int = 31
    seconds: float = 1.5
    fewest: int = 20
    fewest_of_peers: int = 3


FULL = Effort()
#: A machine with a GPU is rented by the minute, and a GPU's times vary little.
CUDA = Effort(repeats=25, seconds=0.5, fewest=20, fewest_of_peers=20)
QUICK = Effort(repeats=9, seconds=0.12, fewest=5, fewest_of_peers=2)


def seconds_of(call: Call) -> float:
    """One call, with the device idle before and after."""
    began = clock()
    call()
    return clock() - began


class Inputs:
    """Input sets that are handed out in turn, whoever asks.

    One cycle for all candidates: with one each, a candidate would find in the caches what the one
    before it has just read.
    """

    def __init__(self, sets: Sequence[tuple[Any, ...]]) -> None:
        self._next = itertools.cycle(sets).__next__

    def bind(self, run: Callable[..., object], count: int | None = None, shared: int = 0) -> Call:
        """``run`` on the next set; with ``count`` on so many systems of it.

        Args:
            run: a candidate.
            count: systems taken; ``None`` for all.
            shared: leading inputs that belong to all systems and are passed whole.
        """
        step = self._next
        if count is None:
            return lambda: run(*step())

        def sliced() -> object:
            inputs = step()
            return run(*inputs[:shared], *(value[:count] for value in inputs[shared:]))

        return sliced


def interleave(
    calls: Mapping[str, Call],
    estimates: Mapping[str, float],
    fewest: Mapping[str, int],
    effort: Effort,
    check_stop: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> dict[str, Measurement]:
    """Time all calls in rounds; a slow one takes part in fewer rounds, spread over all.

    Args:
        calls: name -> what is timed.
        estimates: name -> seconds of one warm call.
        fewest: name -> samples taken in any case.
        effort: samples and time.
        check_stop: called between samples; raises to end the measurement.
        device: where the calls run; ``"cuda"`` is timed by events.

    Returns:
        One ``Measurement`` per name, whose times are seconds per call.
    """
    numbers, samples = {}, {}
    sample = _sample_by_events if device == "cuda" else _sample
    for name in calls:
        once = max(estimates[name], 1e-9)
        numbers[name] = min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / once)))
        affordable = int(effort.seconds / (once * numbers[name]))
        samples[name] = min(effort.repeats, max(fewest[name], affordable))
    rounds = max(samples.values())
    raw: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        # Another candidate begins every round, so that none always follows the same one.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            # Sample k of r comes in round k * rounds / r.
            if len(raw[name]) * rounds <= turn * samples[name]:
                check_stop()
                if estimates[name] <= WARMED_SECONDS:
                    calls[name]()
                raw[name].append(sample(calls[name], numbers[name]))
    threads = torch.get_num_threads()
    return {
        name: Measurement(
            number_per_run=numbers[name],
            raw_times=raw[name],
            task_spec=TaskSpec(stmt=name, setup="", num_threads=threads),
        )
        for name in calls
    }


def _sample(call: Call, number: int) -> float:
    """Seconds of ``number`` calls."""
    loop = itertools.repeat(None, number)
    began = clock()
    for _ in loop:
        call()
    return clock() - began


def _sample_by_events(call: Call, number: int) -> float:
    """The same by the device's own clock; calls enqueue on the current stream."""
    event: Any = torch.cuda.Event  # untyped in torch
    began, ended = event(enable_timing=True), event(enable_timing=True)
    loop = itertools.repeat(None, number)
    began.record()
    for _ in loop:
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
