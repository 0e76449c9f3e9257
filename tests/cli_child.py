"""Runs of the command line in child processes that were forked with torch already imported.

A fork server imports torch once; forking the test process itself would hang in OpenMP.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# torch imports its compiler for the first optimizer: a second that no run should pay again.
_CONTEXT.set_forkserver_preload(["backmatch.training.run", "torch._dynamo"])

#: The calls between which a run's files change.
STAGES = ("write", "fsync", "replace", "ftruncate")


def finish(arguments: list[str]) -> int:
    """Run to the end; returns the exit code (negative: the signal that ended it)."""
    return _wait(_start(_main, arguments))


def kill_at(arguments: list[str], call: int) -> int:
    """SIGKILL just before the ``call``-th of the :data:`STAGES` calls."""
    return _wait(_start(_main_killed, arguments, call))


def signal_at(arguments: list[str], step: int, *numbers: signal.Signals) -> int:
    """The signals arrive while step ``step`` is computed."""
    return _wait(_start(_main_signalled, arguments, step, numbers))


def count_stages(arguments: list[str]) -> int:
    """How many of the :data:`STAGES` calls an undisturbed run makes."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _start(_main_counted, arguments, sender)
    assert receiver.poll(60), "the run has not ended"
    count = receiver.recv()
    assert _wait(process) == 0
    return int(count)


def _start(target: Callable[..., None], *arguments: Any) -> Any:
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def _wait(process: Any) -> int:
    process.join(60)
    assert process.exitcode is not None, "the run has not ended"
    return int(process.exitcode)


def _main(arguments: list[str]) -> None:
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # pictures only cost time here
    from backmatch.cli import main

    sys.exit(main(arguments))


def _wrap_stages(before: Callable[[], None]) -> None:
    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before()
            return original(*arguments, **keywords)

        return call

    for name in STAGES:
        setattr(os, name, wrapped(getattr(os, name)))


def _main_killed(arguments: list[str], call: int) -> None:
    left = [call]

    def before() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _wrap_stages(before)
    _main(arguments)


def _main_counted(arguments: list[str], sender: Any) -> None:
    count = [0]

    def before() -> None:
        count[0] += 1

    _wrap_stages(before)
    try:
        _main(arguments)
    finally:
        total, count[0] = count[0], 0
        sender.send(total)


def _main_signalled(arguments: list[str], step: int, numbers: tuple[signal.Signals, ...]) -> None:
    from backmatch.training.loop import Trainer

    original = Trainer._step

    def with_signal(self: Trainer, *batch: Any) -> Any:
        if self.position.step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *batch)

    Trainer._step = with_signal  # type: ignore[method-assign]
    _main(arguments)
