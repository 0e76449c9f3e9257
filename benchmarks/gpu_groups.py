"""The row groups of benchmarks/gpu.py: what is measured, in a process that may be lost.

A kernel that hangs or breaks the CUDA context takes its process along. So the groups of a stage run
in a child that writes what it has after every row; the parent copies that into the result, ends a
child that takes too long, and starts another one for the groups that are left.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_peers
import gpu_vgg
import torch
from gpu_json import kill, write_json

from backmatch.bench import machine, options, run, timing
from backmatch.bench.case import Case, Settings
from backmatch.bench.measure import Row, measure

#: name -> what a group left: status, rows, elapsed_seconds, reason.
Parts = dict[str, dict[str, Any]]

SPD_ORDERS = (4, 8, 16, 17, 32, 33, 64, 65, 128, 129, 256, 512)
SCALED_ORDERS = (64, 128, 256, 512)
#: A child that was told to stop gets so many seconds to come to the end of a sample.
GRACE = 15.0


@dataclass(frozen=True)
class Group:
    """Rows of one question.

    Attributes:
        rows: measures one after the other.
        question: of ``backmatch bench``, for its sizes and dtypes.
        sizes: n, where they are not the question's own.
        effort: where it is not that of all questions.
    """

    rows: Callable[[Settings], Iterator[Row]]
    question: str
    sizes: tuple[int, ...] | None = None
    effort: timing.Effort | None = None


def each(cases: Callable[[Settings], Iterator[Case]]) -> Callable[[Settings], Iterator[Row]]:
    """Cases as rows, with the peers that only a GPU has."""

    def rows(settings: Settings) -> Iterator[Row]:
        for case in cases(settings):
            yield measure(gpu_peers.with_peers(case), settings)

    return rows


def question(name: str, sizes: tuple[int, ...] | None = None) -> Group:
    """A question of ``backmatch bench`` as it stands."""
    return Group(each(lambda settings: run.CASES[name](settings)), name, sizes)


GROUPS: dict[str, Group] = {
    "spd_solve": question("spd_solve", SPD_ORDERS),
    "scaled_gram": question("scaled_gram", SCALED_ORDERS),
    "weighted_gram": question("weighted_gram"),
    "cg": Group(each(gpu_cases.cg), "cg"),
    "conv_cg": Group(each(gpu_cases.conv_cg), "cg"),
    "overhead": Group(each(gpu_cases.overhead), "spd_solve"),
    "cliffs": Group(gpu_cases.cliffs, "spd_solve"),
    "step": question("step"),
    # A step may take a second: rather fewer samples than no row.
    "vgg": Group(each(gpu_vgg.cases), "step", effort=timing.Effort(25, 10.0, 5, 20)),
    "peers": question("peers"),
}


def settings_of(
    group: Group, *, quick: bool, device: str, check_stop: Callable[[], None]
) -> Settings:
    """Both dtypes, or one with ``quick``."""
    dtypes = ("float32",) if quick else ("float32", "float64")
    sizes = None if quick else group.sizes
    chosen = options.BenchOptions(
        quick=quick, only=(group.question,), sizes=sizes, dtypes=dtypes, device=device
    )
    settings = run.settle(chosen, check_stop)
    if quick or group.effort is None:
        return settings
    return dataclasses.replace(settings, effort=group.effort)


def measure_groups(
    names: Sequence[str],
    *,
    quick: bool,
    device: str,
    check_stop: Callable[[], None],
    keep: Callable[[Parts], None],
) -> Parts:
    """All groups in this process, until time is up or the device is lost.

    Args:
        names: of :data:`GROUPS`.
        quick: small cases.
        device: ``"cpu"`` or ``"cuda"``.
        check_stop: raises :class:`timing.InterruptedBenchError` when time is up.
        keep: called with all parts after every row.
    """
    parts: Parts = {}
    for name in names:
        began = time.perf_counter()
        part = parts[name] = {"status": "started", "rows": []}
        keep(parts)
        try:
            settings = settings_of(GROUPS[name], quick=quick, device=device, check_stop=check_stop)
            for row in GROUPS[name].rows(settings):
                part["rows"].append(row)
                keep(parts)
                if "error" in row and device == "cuda":
                    torch.cuda.synchronize()  # raises where the context is lost
            part["status"] = "passed"
            if wrong := [row for row in part["rows"] if "error" in row]:
                part["status"] = "failed"
                part["reason"] = f"{len(wrong)} wrong, the first: {wrong[0]['error']}"
        except timing.InterruptedBenchError:
            part |= {"status": "incomplete", "reason": "time was up"}
        except Exception as error:  # what was measured before counts
            part |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[-2000:]}
        part["elapsed_seconds"] = round(time.perf_counter() - began, 1)
        keep(parts)
        if part["status"] == "incomplete" or "CUDA error" in part.get("reason", ""):
            break
    return parts


def in_process(
    names: Sequence[str],
    quick: bool,
    device: str,
    seconds: float,
    keep: Callable[[Parts, dict[str, Any]], None],
) -> Parts:
    """:func:`measure_groups` within so many seconds; ``keep`` gets parts and machine."""
    ends = time.monotonic() + seconds

    def check_stop() -> None:
        if time.monotonic() > ends:
            raise timing.InterruptedBenchError

    # Single precision means single precision, for all sides.
    torch.backends.cudnn.allow_tf32 = False
    about = machine.describe(torch.device(device)) | {"tf32": False}
    return measure_groups(
        names,
        quick=quick,
        device=device,
        check_stop=check_stop,
        keep=lambda parts: keep(parts, about),
    )


def child(names: Sequence[str], out: Path, *, quick: bool, device: str, seconds: float) -> int:
    """The child's side: groups into a file, within so many seconds."""
    in_process(
        names,
        quick,
        device,
        seconds,
        lambda parts, about: write_json(out, {"machine": about, "parts": parts}),
    )
    return 0


def isolated(
    names: Sequence[str],
    scratch: Path,
    *,
    quick: bool,
    device: str,
    seconds: float,
    keep: Callable[[Parts, dict[str, Any]], None],
) -> Parts:
    """All groups in children, one for as many as it survives.

    Args:
        names: of :data:`GROUPS`.
        scratch: a file for what the child has.
        quick, device: as in :func:`measure_groups`.
        seconds: what all may take.
        keep: called with all parts and the child's machine whenever there is more of them.
    """
    ends, done = time.monotonic() + seconds, dict[str, dict[str, Any]]()
    while left := [name for name in names if name not in done]:
        remaining = ends - time.monotonic()
        if remaining <= 0:
            for name in left:
                done[name] = {"status": "incomplete", "reason": "not begun", "rows": []}
            break
        scratch.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--child"]
        command += [",".join(left), "--device", device, "--out", str(scratch)]
        command += ["--seconds", str(remaining)] + (["--quick"] if quick else [])
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            before = dict(done)
            reason = _watch(
                process, scratch, remaining + GRACE, lambda p, m, done=before: keep(done | p, m)
            )
        finally:
            kill(process)
        parts, about = read_parts(scratch)
        for part in parts.values():
            if part["status"] == "started":
                part |= {"status": "failed", "reason": reason or "the process ended"}
        # A child that did not even begin will not do so the next time.
        parts = parts or {left[0]: {"status": "failed", "reason": reason, "rows": []}}
        done |= parts
        keep(done, about)
    scratch.unlink(missing_ok=True)
    return done


def _watch(
    process: subprocess.Popen[bytes],
    scratch: Path,
    seconds: float,
    keep: Callable[[Parts, dict[str, Any]], None],
) -> str:
    """Wait for the child, handing on what it writes; returns why it failed, if it did."""
    ends, seen = time.monotonic() + seconds, 0.0
    output = b""
    while True:
        try:
            output, _ = process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            if scratch.exists() and scratch.stat().st_mtime != seen:
                seen = scratch.stat().st_mtime
                keep(*read_parts(scratch))
            if time.monotonic() < ends:
                continue
            return f"hung: no end after {seconds:.0f} s"
        if process.returncode == 0:
            return ""
        return f"exit code {process.returncode}: {output.decode(errors='replace')[-2000:]}"


def read_parts(path: Path) -> tuple[Parts, dict[str, Any]]:
    """Parts and machine of a child's file; empty where it wrote none."""
    if not path.exists():
        return {}, {}
    found = json.loads(path.read_text())
    return found["parts"], found["machine"]
