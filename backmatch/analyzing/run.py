"""Run the studies, print their tables, leave ``analysis.json`` and ``analysis.png`` in a folder."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import analysis
from ..analysis import during_training
from ..analysis.result import InterruptedStudyError, Study
from ..errors import BackMatchError
from ..training.failures import RunError, UsageError, show
from ..training.files import write_atomic
from ..training.interrupts import Interrupts
from ..training.loop import versions
from ..training.progress import say
from . import report
from .options import FIGURE, RESULT, AnalyzeOptions

#: By the name that ``--study`` knows.
FUNCTIONS: dict[str, Callable[..., Study]] = {
    "init": analysis.init,
    "skip": analysis.skip,
    "norm": analysis.norm,
    "depth": analysis.depth,
    "width": analysis.width,
    "training": analysis.training,
}


def start(options: AnalyzeOptions, out: Path | None, *, quiet: bool) -> int:
    """Run the studies; returns the exit code.

    Raises:
        UsageError: the data cannot be had, or the folder cannot be made.
        RunError: a study failed, once the others are stored; or the result cannot be written.
    """
    if "training" in options.studies:
        _require_data(options.data)
    torch.set_num_threads(options.threads)
    with Interrupts() as interrupts:

        def check_stop() -> None:
            if interrupts.received is not None:
                raise InterruptedStudyError

        if out is not None:
            _make_folder(out)
        result = collect(options, check_stop, quiet=quiet)
        if out is not None:
            store(result, out, quiet=quiet)
    if result["interrupted"]:
        if not quiet:
            say("interrupted: the tables hold what was done before")
        return interrupts.exit_code
    for name, reason in result["failed"].items():
        raise RunError(f"{name} failed: {reason}")
    return 0


def _require_data(data: str) -> None:
    """Now, not after the other studies."""
    try:
        during_training.prepared(data)
    except ValueError as error:
        raise UsageError(f"--data {show(data, 200)}: {error}") from None


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"--out {show(str(out), 200)}"
        raise UsageError(f"{where}: cannot write there: {error.strerror}") from None


def collect(
    options: AnalyzeOptions, check_stop: Callable[[], None], *, quiet: bool
) -> dict[str, Any]:
    """Run all studies: the content of ``analysis.json``.

    Args:
        options: which ones, and how.
        check_stop: called now and then; raises :class:`InterruptedStudyError` to end the run.
        quiet: print nothing.
    """
    studies: dict[str, Any] = {}
    failed: dict[str, str] = {}
    interrupted = False
    for name in options.studies:
        began = time.perf_counter()
        _status(None if quiet else name)
        study: Study | None = None
        try:
            study = FUNCTIONS[name](**options.arguments(name), check_stop=check_stop)
        except InterruptedStudyError as stop:
            study, interrupted = stop.partial, True
        except (BackMatchError, MemoryError, RuntimeError) as error:
            failed[name] = _reason(error)
        finally:
            _status(None)
        if study is not None and study.rows:
            seconds = round(time.perf_counter() - began, 3)
            studies[name] = {**rounded(study.as_dict()), "elapsed_seconds": seconds}
            if not quiet:
                report.show(studies[name])
        if interrupted:
            break
    return {
        "versions": {**versions(), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "options": options.as_dict(),
        "interrupted": interrupted,
        "failed": failed,
        "studies": studies,
    }


def _reason(error: Exception) -> str:
    """What went wrong in one line; an error that nobody foresaw is raised again."""
    if isinstance(error, BackMatchError):
        return str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return "not enough memory; lower --size"
    raise error


def store(result: dict[str, Any], out: Path, *, quiet: bool) -> None:
    """Write ``analysis.json`` and the figure.

    Raises:
        RunError: they cannot be written.
    """
    try:
        write_atomic(out / RESULT, to_json(result))
        drawn = _draw(result, out / FIGURE)
    except OSError as error:
        raise RunError(
            f"cannot write in {out}: {error.strerror}; make room and run again"
        ) from None
    if not quiet:
        say("")
        say(f"table   {out / RESULT}")
        say(f"figure  {out / FIGURE if drawn is None else drawn}")


def rounded(value: Any) -> Any:
    """The same with all floats to seven digits: enough for a median, and short in a file."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def to_json(result: dict[str, Any]) -> bytes:
    """The file's content, a line per row; refuses NaN and infinity, which JSON does not know."""
    outer = {name: {**study, "rows": f"<{name}>"} for name, study in result["studies"].items()}
    text = json.dumps({**result, "studies": outer}, indent=1, allow_nan=False) + "\n"
    for name, study in result["studies"].items():
        lines = ",\n".join("    " + json.dumps(row, allow_nan=False) for row in study["rows"])
        text = text.replace(json.dumps(f"<{name}>"), f"[\n{lines}\n   ]")
    return text.encode()


def _draw(result: dict[str, Any], path: Path) -> str | None:
    """Why there is no figure, or ``None`` once it is written."""
    if not result["studies"]:
        return "none: no study got so far"
    try:
        from ..analysis import figure
    except ImportError:
        return "none: matplotlib is not installed"
    write_atomic(path, figure.draw(result))
    return None


def _status(name: str | None) -> None:
    """One line on a terminal that says what is being studied, gone afterwards."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + (f"studying {name} .." if name else ""))
        sys.stderr.flush()
