"""What each problem of a step costs: solvers that tell when they begin and end."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..problems import LeastSquares
from ..solvers import Resolved, Solution, Solver
from .peak_memory import PeakMemory

#: Block and side, ``"weights"`` or ``"inputs"``.
Problem = tuple[str, str]


class Watch:
    """Times the problems of a matcher, and their memory while one is measured.

    Attributes:
        seconds: time of each problem, one entry per step.
        memory: where a measurement of memory runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[Problem, list[float]] = defaultdict(list)
        self.memory: PeakMemory | None = None
        self._device = device

    def choice(self, side: str, solver: Solver) -> Callable[[str, nn.Module], Solver]:
        """The solver of all blocks, under this watch."""
        return lambda name, block: _Watched(solver, self, (name, side))

    def begin_step(self) -> None:
        """The next times belong to another step."""
        for times in self.seconds.values():
            times.append(0.0)

    def synchronize(self) -> None:
        """Wait for the device: what was asked of it belongs to who asked."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextmanager
    def work(self, problem: Problem) -> Iterator[None]:
        """A part of the work on one problem."""
        self.synchronize()
        began = time.perf_counter()
        if self.memory is None:
            yield
        else:
            with self.memory.span(span_name(problem)):
                yield
        self.synchronize()
        times = self.seconds[problem]
        if not times:
            times.append(0.0)
        times[-1] += time.perf_counter() - began


def span_name(problem: Problem) -> str:
    """The name of a problem's span in :class:`PeakMemory`."""
    return " ".join(problem)


class _Watched(Solver):
    """A solver under watch; takes every decision as the solver itself does."""

    def __init__(self, inner: Solver, watch: Watch, problem: Problem) -> None:
        self.solves_least_squares = inner.solves_least_squares
        self._inner, self._watch, self._problem = inner, watch, problem

    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        with self._watch.work(self._problem):
            return self._inner.damping_for(problem)

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        with self._watch.work(self._problem):
            return self._inner.solve(problem, damping)
