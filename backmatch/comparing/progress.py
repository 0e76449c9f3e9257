"""What a comparison shows while it works: a bar on a terminal, lines in a pipe, or nothing."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..training.progress import say
from .table import WIDTH
from .tuning import Choice

try:
    import rich.console
    import rich.progress
except ImportError:  # an extra: without it a terminal gets the plain lines
    _HAS_RICH = False
else:
    _HAS_RICH = True


def create(quiet: bool) -> Progress:
    """Silent, a bar (terminal and rich there), or plain lines."""
    if quiet:
        return Progress()
    if _HAS_RICH and sys.stdout.isatty():
        return Bar()
    return Lines()


class Progress:
    """Told about a comparison as it goes; this one says nothing: ``--quiet``."""

    def start(self, tuning: int, final: int) -> None:
        """So many runs are expected; tuning may add some."""

    def begin(self, kind: str, method: str, lr: float, seed: int) -> None:
        """A run begins."""

    def done(self, kind: str) -> None:
        """A run is there, trained just now or earlier."""

    def chosen(self, method: str, choice: Choice) -> None:
        """A learning rate is chosen."""

    def seed(self, seed: int, runs: Sequence[Mapping[str, Any]]) -> None:
        """All methods are trained with a seed."""

    def note(self, text: str) -> None:
        """A line."""

    def stop(self) -> None:
        """The comparison ends."""


class Lines(Progress):
    """One line per chosen rate and per seed."""

    def __init__(self) -> None:
        self._done, self._total = {"tuning": 0, "final": 0}, {"tuning": 0, "final": 0}
        self._began = time.perf_counter()

    def start(self, tuning: int, final: int) -> None:
        self._total = {"tuning": tuning, "final": final}

    def done(self, kind: str) -> None:
        self._done[kind] += 1
        self._total[kind] = max(self._total[kind], self._done[kind])

    def chosen(self, method: str, choice: Choice) -> None:
        best = next(score for score in choice.scores if score.lr == choice.lr)
        tried = ", ".join(f"{score.lr:g}" for score in choice.scores)
        edge = " (on the edge)" if choice.edge else ""
        self.note(
            f"{self._count()}  {method:<{_WIDTH}} lr {choice.lr:<6g}{edge} of {tried}: held-out "
            f"accuracy {100 * best.mean:.1f} %"
        )

    def seed(self, seed: int, runs: Sequence[Mapping[str, Any]]) -> None:
        ends = ", ".join(f"{run['method']} {_end(run)}" for run in runs)
        text = f"{self._count()}  seed {seed}: test accuracy (%) {ends}"
        self.note(textwrap.fill(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False))

    def note(self, text: str) -> None:
        say(text)

    def _count(self) -> str:
        done, total = sum(self._done.values()), sum(self._total.values())
        return f"[{done}/{total} runs, {time.perf_counter() - self._began:.0f} s]"


class Bar(Lines):
    """A rich bar over all runs with the run in progress; the lines above it."""

    def __init__(self) -> None:
        super().__init__()
        self._console = rich.console.Console(highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("runs  ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )

    def start(self, tuning: int, final: int) -> None:
        super().start(tuning, final)
        self._task = self._bar.add_task("comparing", total=tuning + final)
        self._bar.start()

    def begin(self, kind: str, method: str, lr: float, seed: int) -> None:
        self._bar.update(self._task, description=f"{kind} {method}, lr {lr:g}, seed {seed}")

    def done(self, kind: str) -> None:
        super().done(kind)
        done, total = sum(self._done.values()), sum(self._total.values())
        self._bar.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


_WIDTH = 18


def _end(run: Mapping[str, Any]) -> str:
    return "diverged" if run["error"] else f"{100 * run['accuracy'][-1]:.1f}"
