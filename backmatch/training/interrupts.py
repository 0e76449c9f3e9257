"""SIGINT and SIGTERM end a run after the step in progress; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

_SHOW_CURSOR = "\x1b[?25h"


class Interrupts:
    """Context in which the two signals are noted instead of ending the process.

    Attributes:
        received: the first signal that came, else ``None``.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal: 130 for SIGINT, 143 for SIGTERM."""
        return 0 if self.received is None else 128 + self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        # From here on the system's own action applies: it ends the process even inside a long
        # native call, where no Python handler would run. The bar has hidden the cursor.
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if sys.stderr.isatty():
            text = f"{_SHOW_CURSOR}\nfinishing this step; once more to leave at once\n"
            os.write(sys.stderr.fileno(), text.encode())
