"""Runs of the command line in child processes that were forked with torch already imported.

A fork server imports torch once; forking the test process itself would hang in OpenMP.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# torch imports its compiler for the first optimizer: a second that no run should pay again.
_CONTEXT.set_forkserver_preload(["backmatch.training.run", "torch._dynamo"])

#: The calls between which a run's files change.
STAGES = ("write", "fsync", "replace", "ftruncate")

#: One of those calls: its name and the file it is about.
Stage = tuple[str, str]


def finish(arguments: list[str]) -> int:
    """Run to the end; returns the exit code (negative: the signal that ended it)."""
    return _wait(_start(_main, arguments))


def kill_at(arguments: list[str], stage: Stage | None, occurrence: int, torn: bool = False) -> int:
    """SIGKILL just before a :data:`Stage` call (``None``: any); 0 where the run ends without it.

    With ``torn`` a row is half written by then, and of a temporary file that was about to be
    forced to the disk only half is left, as after a power failure.
    """
    return _wait(_start(_main_killed, arguments, stage, occurrence, torn))


def kill_after(arguments: list[str], delay: float) -> int:
    """SIGKILL from outside, ``delay`` seconds after the command began; 0 where it was faster."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _start(_main_announced, arguments, sender)
    assert receiver.poll(60), "the run has not begun"
    process.join(delay)
    process.kill()
    return _wait(process)


def limited(arguments: list[str], size: int) -> tuple[int, str]:
    """Run where no file may grow beyond ``size`` bytes; returns the exit code and what it said."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _start(_main_limited, arguments, size, sender)
    assert receiver.poll(60), "the run has not ended"
    error: str = receiver.recv()
    return _wait(process), error


def signal_at(arguments: list[str], step: int, *numbers: signal.Signals) -> int:
    """The signals arrive while step ``step`` is computed."""
    return _wait(_start(_main_signalled, arguments, step, numbers))


def stages(arguments: list[str]) -> list[Stage]:
    """The :data:`STAGES` calls that an undisturbed run makes, in order."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _start(_main_listed, arguments, sender)
    assert receiver.poll(60), "the run has not ended"
    found: list[Stage] = receiver.recv()
    assert _wait(process) == 0
    return found


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


def wrap_stages(before: Callable[..., None]) -> dict[str, Callable[..., Any]]:
    """Have ``before(stage, *arguments)`` called ahead of every one; returns the originals."""

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before((name, _file_of(arguments)), *arguments)
            return original(*arguments, **keywords)

        return call

    originals = {name: getattr(os, name) for name in STAGES}
    for name, original in originals.items():
        setattr(os, name, wrapped(name, original))
    return originals


def _file_of(arguments: tuple[Any, ...]) -> str:
    """The name that a rename gives, or that of the open file."""
    if isinstance(arguments[0], int):
        return os.path.basename(os.readlink(f"/proc/self/fd/{arguments[0]}"))
    return os.path.basename(arguments[1])


def _main_killed(arguments: list[str], wanted: Stage | None, occurrence: int, torn: bool) -> None:
    left = [occurrence]

    def before(stage: Stage, *call: Any) -> None:
        left[0] -= wanted in (None, stage)
        if left[0] == 0:
            if torn and stage[0] == "write":
                originals["write"](call[0], bytes(call[1])[: len(call[1]) // 2])
            elif torn and stage[0] == "fsync" and stage[1].endswith(".tmp"):
                originals["ftruncate"](call[0], os.fstat(call[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    originals = wrap_stages(before)
    _main(arguments)


def _main_limited(arguments: list[str], size: int, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    sys.stderr = io.StringIO()
    try:
        _main(arguments)
    finally:
        sender.send(sys.stderr.getvalue())


def _main_announced(arguments: list[str], sender: Any) -> None:
    sender.send(True)
    _main(arguments)


def _main_listed(arguments: list[str], sender: Any) -> None:
    found: list[Stage] = []
    originals = wrap_stages(lambda stage, *call: found.append(stage))
    try:
        _main(arguments)
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
        sender.send(found)


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
