"""What a run shows while it works: a bar on a terminal, lines in a pipe, or nothing."""

from __future__ import annotations

import os
import sys
from typing import Any, Protocol

try:
    import rich.console
    import rich.progress
except ImportError:  # an extra: without it a terminal gets the plain lines
    _HAS_RICH = False
else:
    _HAS_RICH = True


class Progress(Protocol):
    """Told about a run as it goes."""

    def start(self, total: int, done: int, epochs: int) -> None: ...

    def step(self, step: int, loss: float) -> None: ...

    def evaluation(self, epoch: int, row: dict[str, Any], elapsed: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def create(quiet: bool) -> Progress:
    """Silent, a bar (terminal and rich there), or plain lines."""
    if quiet:
        return Silent()
    if _HAS_RICH and sys.stdout.isatty():
        return Bar()
    return Lines()


class Silent:
    """``--quiet``."""

    def start(self, total: int, done: int, epochs: int) -> None: ...

    def step(self, step: int, loss: float) -> None: ...

    def evaluation(self, epoch: int, row: dict[str, Any], elapsed: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class Lines:
    """One line per epoch, flushed."""

    def __init__(self) -> None:
        self._total = self._epochs = 0

    def start(self, total: int, done: int, epochs: int) -> None:
        self._total, self._epochs = total, epochs

    def step(self, step: int, loss: float) -> None: ...

    def evaluation(self, epoch: int, row: dict[str, Any], elapsed: float) -> None:
        self.note(_sentence(epoch, self._epochs, row) + _eta(row["step"], self._total, elapsed))

    def note(self, text: str) -> None:
        say(text)

    def stop(self) -> None: ...


class Bar:
    """A rich bar with loss, test accuracy and the time left; one line per epoch above it."""

    def __init__(self) -> None:
        self._console = rich.console.Console(highlight=False)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("loss {task.fields[loss]}  accuracy {task.fields[accuracy]}"),
            rich.progress.TextColumn("ETA"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._epochs = 0

    def start(self, total: int, done: int, epochs: int) -> None:
        self._epochs = epochs
        self._task = self._bar.add_task(
            "training", total=total, completed=done, loss="-", accuracy="-"
        )
        self._bar.start()

    def step(self, step: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}")

    def evaluation(self, epoch: int, row: dict[str, Any], elapsed: float) -> None:
        self._bar.update(self._task, accuracy=f"{row['test_accuracy']:.4f}")
        self.note(_sentence(epoch, self._epochs, row) + f"  {elapsed:.2f} s")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        self._bar.stop()


def say(text: str) -> None:
    """Print a line; a reader that has gone away (``| head``) does not end the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _sentence(epoch: int, epochs: int, row: dict[str, Any]) -> str:
    return (
        f"epoch {epoch}/{epochs}  train loss {row['train_loss']:.4f}  "
        f"test loss {row['test_loss']:.4f}  test accuracy {row['test_accuracy']:.4f}"
    )


def _eta(step: int, total: int, elapsed: float) -> str:
    left = elapsed / step * (total - step)
    return f"  {elapsed:.2f} s" + (f"  ETA {left:.2f} s" if left else "")
