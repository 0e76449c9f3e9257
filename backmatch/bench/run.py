"""``backmatch bench``: measure, print, and leave ``bench.json`` and ``bench.png`` in a folder."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..linalg import _library
from ..training.failures import RunError, UsageError, show
from ..training.files import write_atomic
from ..training.interrupts import Interrupts
from ..training.progress import say
from . import (
    conjugate_gradient,
    machine,
    peers,
    report,
    scaled_gram,
    scaling,
    spd_solve,
    step,
    timing,
    weighted_gram,
)
from .case import Case, Settings
from .measure import Row, measure
from .options import FIGURE, RESULT, SIZED, BenchOptions

CASES: dict[str, Callable[[Settings], Iterator[Case]]] = {
    "spd_solve": spd_solve.cases,
    "scaled_gram": scaled_gram.cases,
    "weighted_gram": weighted_gram.cases,
    "cg": conjugate_gradient.cases,
    "step": step.cases,
    "peers": peers.cases,
    "scaling": scaling.cases,
}
#: Copies of the matrices that a case holds at most: two input sets, a peer's own, float64 checks.
_COPIES = 6


def start(options: BenchOptions, out: Path | None, *, quiet: bool) -> int:
    """Run the benchmarks; returns the exit code.

    Raises:
        UsageError: no CUDA device, a batch that cannot fit into memory, a folder that cannot be
            made.
        RunError: an answer of ours was wrong, memory ran out, or the result cannot be written.
    """
    with Interrupts() as interrupts:

        def check_stop() -> None:
            if interrupts.received is not None:
                raise timing.InterruptedBenchError

        settings = settle(options, check_stop)
        if out is not None:
            make_folder(out)
        if not quiet:
            for line in report.legend():
                say(line)
        result, failure = collect(settings, None if quiet else report.show)
        if not quiet:
            say("")
            say(report.summary(result["machine"]))
        if out is not None:
            store(result, out, quiet=quiet)
    if result["interrupted"]:
        if not quiet:
            say("interrupted: the tables hold what was measured before")
        return interrupts.exit_code
    if failure is not None:
        raise failure
    return 0


def settle(options: BenchOptions, check_stop: Callable[[], None] = lambda: None) -> Settings:
    """Choose device and threads as the machine has them.

    Raises:
        UsageError: ``--device cuda`` without a CUDA device or CUDA kernels, or more than fits into
            memory.
    """
    device = options.device
    if device != "cpu":
        lacking = _lacking_for_cuda()
        if device == "cuda" and lacking:
            raise UsageError(f"--device cuda: {lacking}; use --device cpu")
        device = "cpu" if lacking else "cuda"
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    full = timing.CUDA if device == "cuda" else timing.FULL
    effort = timing.QUICK if options.quick else full
    settings = Settings(options, torch.device(device), effort, check_stop)
    _require_memory(settings)
    return settings


def _lacking_for_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not _library.native().build_info()["cuda"]:
        return "this build has no CUDA kernels (backmatch doctor says how it was built)"
    return None


def _require_memory(settings: Settings) -> None:
    options = settings.options
    if options.sizes is None and options.batch is None:
        return
    n = max(options.sizes or (512,))
    size = n * n * max(dtype.itemsize for dtype in settings.dtypes)
    needed = _COPIES * size * settings.batch(size) / 2**30
    if settings.device.type == "cuda":
        there = torch.cuda.get_device_properties(settings.device).total_memory / 2**30
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if needed > there:
        raise UsageError(
            f"--sizes/--batch: {settings.batch(size)} systems of n = {n} need about "
            f"{needed:.0f} GiB with their copies, this machine has {there:.0f} GiB; "
            "lower --batch or --sizes"
        )


def make_folder(out: Path) -> None:
    """Make ``out`` before anything is measured, so that a failure costs no time."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"--out {show(str(out), 200)}"
        raise UsageError(f"{where}: cannot write there: {error.strerror}") from None


def collect(
    settings: Settings,
    shown: Callable[[str, Sequence[Row]], None] | None,
    extend: Callable[[Case], Case] = lambda case: case,
) -> tuple[dict[str, Any], RunError | None]:
    """Measure all questions: the content of ``bench.json``, and what went wrong.

    Args:
        settings: how.
        shown: called with every question and its rows once they are there.
        extend: adds candidates to a case.
    """
    rows: list[Row] = []
    failure, interrupted = None, False
    for question in settings.options.only:
        begun = len(rows)
        try:
            for case in CASES[question](settings):
                _status(case if shown else None)
                rows.append(measure(extend(case), settings))
        except timing.InterruptedBenchError:
            interrupted = True
        except (MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            hint = "; lower --batch or --sizes" if question in SIZED else ""
            failure = RunError(f"{question}: not enough memory{hint}")
        _status(None)
        if shown and rows[begun:]:
            shown(question, rows[begun:])
        if interrupted:
            break
    wrong = [row for row in rows if "error" in row]
    if wrong:
        first = wrong[0]
        failure = RunError(
            f"{len(wrong)} of {len(rows)} cases gave wrong answers and were not timed; the first: "
            f"{first['question']}: {first['error']}"
        )
    result = {
        "machine": machine.describe(settings.device),
        "options": settings.options.as_dict(),
        "interrupted": interrupted,
        "rates": rates_of(rows),
        "rows": rows,
    }
    return result, failure


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


def rates_of(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Medians over the rows of each dtype that ran with all threads."""
    found: dict[str, dict[str, float]] = {}
    names = ("fma_gflops", "matrix_gflops", "copy_gbytes_per_second")
    full = [row for row in rows if "fma_gflops" in row and "threads" not in row["case"]]
    for dtype in dict.fromkeys(row["case"]["dtype"] for row in full):
        same = [row for row in full if row["case"]["dtype"] == dtype]
        found[dtype] = {
            name: statistics.median(row[name] for row in same) for name in names if name in same[0]
        }
    return found


def store(result: dict[str, Any], out: Path, *, quiet: bool) -> None:
    """Write ``bench.json`` and the figure.

    Raises:
        RunError: they cannot be written.
    """
    try:
        write_atomic(out / RESULT, to_json(result))
        drawn = _draw(result["rows"], out / FIGURE)
    except OSError as error:
        raise RunError(
            f"cannot write in {out}: {error.strerror}; make room and run again"
        ) from None
    if not quiet:
        say(f"table   {out / RESULT}")
        say(f"figure  {out / FIGURE if drawn is None else drawn}")


def to_json(result: dict[str, Any]) -> bytes:
    """The file's content; refuses NaN and infinity, which JSON does not know."""
    return (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()


def _draw(rows: Sequence[Row], path: Path) -> str | None:
    """Why there is no figure, or ``None`` once it is written."""
    try:
        from . import figure
    except ImportError:
        return "none: matplotlib is not installed"
    content = figure.draw(rows)
    if content is None:
        return "none: nothing was timed"
    write_atomic(path, content)
    return None


def _status(case: Case | None) -> None:
    """One line on a terminal that says what is being measured, gone afterwards."""
    if not sys.stderr.isatty():
        return
    text = ""
    if case is not None:
        about = ", ".join(f"{key} {value}" for key, value in case.about.items())
        text = f"measuring {case.question}: {about}"[:98]
    sys.stderr.write(f"\r\x1b[K{text}")
    sys.stderr.flush()
