"""Peak memory of a call and of spans within it, as torch's allocators see it."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# The profiler would report its own start and end on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_MARK = "backmatch peak "


class PeakMemory:
    """Most bytes of tensors allocated at one time, beyond those before.

    Every allocation counts while it lives, on the CPU as on CUDA, whatever the process held
    before. What libraries take past torch's allocators (packed matrices, fragments) does not: the
    process's resident memory rose by a quarter to a half more in a step of VGG-13 on the CPU.

    Attributes:
        total: peak over the ``with`` block, set when it ends.
        spans: name -> peak within the :meth:`span` of that name, beyond the bytes at the
            beginning of the first one of the name. Set when the block ends.

    >>> one = torch.ones(1000)
    >>> with PeakMemory(torch.device("cpu")) as memory:
    ...     with memory.span("sum"):
    ...         two = one + 1
    ...     three = (two + 1, two + 1)
    >>> memory.spans["sum"] >= 4000, memory.total >= 12000
    (True, True)
    """

    def __init__(self, device: torch.device) -> None:
        self.total = 0
        self.spans: dict[str, int] = {}
        self._device = device
        self._bases: dict[str, int] = {}
        self._profile: Any = None
        if device.type != "cuda":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> PeakMemory:
        if self._profile is None:
            self._before = self._restarted()
        else:
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is None:
            self._note()
            return
        self._profile.__exit__(*error)
        self._read(self._profile.profiler.kineto_results.events())

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A part of the work with a peak of its own."""
        if self._profile is not None:
            with record_function(_MARK + name):
                yield
            return
        self._note()
        before = self._restarted()
        yield
        self._add(name, before, torch.cuda.max_memory_allocated(self._device))
        self._note()

    def _add(self, name: str, before: int, peak: int) -> None:
        beyond = peak - self._bases.setdefault(name, before)
        self.spans[name] = max(self.spans.get(name, 0), beyond)

    def _restarted(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def _note(self) -> None:
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        self.total = max(self.total, peak)

    def _read(self, events: list[Any]) -> None:
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        marks = [(e.start_ns(), e.end_ns(), e.name()) for e in events if _MARK in e.name()]
        changes.sort(key=lambda change: change[0])
        times, live = [], [0]
        for time, size in changes:
            times.append(time)
            live.append(live[-1] + size)
        self.total = max(live)
        for begin, end, name in sorted(marks):
            first, last = bisect_left(times, begin), bisect_right(times, end)
            self._add(name.removeprefix(_MARK), live[first], max(live[first : last + 1]))
