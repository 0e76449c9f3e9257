"""All that needs a CUDA device, in one command: build, tests, sanitizers, and times against torch.

    python benchmarks/gpu.py                              # everything; results/gpu.json
    python benchmarks/gpu.py --stages build,kernels --limits kernels=400 --out FILE
    python benchmarks/gpu.py --readme                     # the stored tables into README.md

Works without a network. A stage that fails or runs out of time leaves what it has, and the next one
goes on. The file is written after every row and is valid JSON at any moment, also after SIGTERM.
The exit code is 0 if all stages passed, 1 if one failed or is incomplete, 2 where there is no GPU.

- build: ``pip install --no-build-isolation --no-deps --editable .`` unless the loaded build has
  CUDA kernels that are newer than their sources;
- tests: those with a part for the GPU (files that name ``needs_gpu``), without the slow ones;
- sanitizer: memcheck, racecheck, initcheck and synccheck of ``compute-sanitizer`` over all kernels
  at awkward sizes. torch's cache of memory blocks is off there, for it would hide accesses beyond a
  tensor; the workload itself needs below 1 GiB of device memory, the tools some times that;
- kernels: every operator against torch on CUDA (CuPy and Warp where importable), both dtypes, the
  cost of one system, and neighbouring orders; up to 60 GiB of device memory, and a peer that does
  not fit is listed as failed;
- steps: the exact step of two MLPs and of VGG-13 with batch norm (CIFAR shapes, CG at rtol 1e-2)
  against back-propagation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = ("spd_solve", "scaled_gram", "weighted_gram", "cg", "conv_cg", "overhead", "cliffs")
STEPS = ("step", "vgg")
#: Seconds that a stage may take; --limits overrides. Ten minutes without the build.
LIMITS = {"build": 900, "tests": 150, "sanitizer": 150, "kernels": 200, "steps": 60}
#: compute-sanitizer's exit code where it found something.
FOUND = 99

Stage = dict[str, Any]


class Skipped(Exception):  # noqa: N818 - no error: the reason why a stage does not apply
    """A stage that cannot run here, with the reason."""


class Terminated(BaseException):
    """SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Context:
    """How a stage runs.

    Attributes:
        quick: small cases, few repeats.
        device: ``"cuda"``, or ``"cpu"`` in the tests of this file.
        seconds: what the stage may take.
        keep: called with what the stage has so far.
        head: fields of the result itself, which a stage may add to.
        scratch: a file that a child process may write.
    """

    quick: bool
    device: str = "cuda"
    seconds: float = 600.0
    keep: Callable[[Stage], None] = lambda stage: None
    head: dict[str, Any] = dataclasses.field(default_factory=dict)
    scratch: Path = ROOT / "gpu.part.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument(
        "--limits",
        default="",
        metavar="STAGE=SECONDS,...",
        help="default: " + ",".join(f"{name}={seconds}" for name, seconds in LIMITS.items()),
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="default: results/gpu.json")
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument(
        "--readme", action="store_true", help="put the stored tables into README.md, run nothing"
    )
    for hidden in ("--workload", "--child", "--device", "--seconds"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    stages = parsed.stages.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"--stages: expected names out of {', '.join(STAGES)}, got {unknown[0]!r}")
    limits = read_limits(parsed.limits, parser)
    sys.path.insert(0, str(ROOT))  # a build in place need not be installed
    if parsed.readme:
        return readme(parsed.out)
    if parsed.workload:
        import gpu_workload

        gpu_workload.run(parsed.workload)
        return 0
    if parsed.child:
        import gpu_groups

        names, seconds = parsed.child.split(","), float(parsed.seconds)
        how = {"quick": parsed.quick, "device": parsed.device, "seconds": seconds}
        return gpu_groups.child(names, parsed.out, **how)
    if reason := no_gpu():
        print(f"gpu.py: {reason}; nothing was run", file=sys.stderr)
        return 2
    return run(stages, parsed.out, quick=parsed.quick, limits=limits)


def read_limits(text: str, parser: argparse.ArgumentParser) -> dict[str, float]:
    """Stage -> seconds."""
    limits: dict[str, float] = dict(LIMITS)
    for part in filter(None, text.split(",")):
        name, _, seconds = part.partition("=")
        if name not in LIMITS or not seconds.isdecimal():
            parser.error(f"--limits: expected STAGE=SECONDS with commas between, got {part!r}")
        limits[name] = float(seconds)
    return limits


def no_gpu() -> str | None:
    """Why nothing can run here, or ``None``."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    return "no CUDA device" if built else "no CUDA device, and torch is a CPU build"


def readme(path: Path) -> int:
    """The generated section of README.md, from the result or without one."""
    import gpu_tables
    import stored

    result = json.loads(path.read_text()) if path.exists() else None
    stored.insert(gpu_tables.gpu(result), "gpu")
    return 0


def run(
    stages: list[str],
    out: Path,
    *,
    quick: bool,
    device: str = "cuda",
    limits: dict[str, float] | None = None,
) -> int:
    """All stages, one after the other."""
    from gpu_json import write_json

    result: dict[str, Any] = {"command": sys.argv, "quick": quick, "stages": {}}
    began = 0.0

    def keep(name: str, stage: Stage) -> None:
        elapsed = {"elapsed_seconds": round(time.perf_counter() - began, 1)}
        result["stages"][name] = stage | elapsed
        write_json(out, result)

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        for name in stages:
            print(f"== {name}", flush=True)
            began = time.perf_counter()
            context = Context(
                quick,
                device,
                (limits or LIMITS)[name],
                lambda stage, name=name: keep(name, {"status": "running"} | stage),
                result,
                out.with_suffix(".part.json"),
            )
            context.keep({})
            keep(name, stage := outcome(STAGES[name], context))
            reason = f": {stage['reason'].splitlines()[-1]}" if stage.get("reason") else ""
            print(f"== {name} {stage['status']}{reason}", flush=True)
    except (Terminated, KeyboardInterrupt):
        begun = result["stages"].get(name, {})
        keep(name, begun | {"status": "incomplete", "reason": "terminated"})
        print(f"terminated; what was measured is in {out}", file=sys.stderr)
        return 143
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"result {out}")
    bad = ("failed", "incomplete")
    return int(any(stage["status"] in bad for stage in result["stages"].values()))


def outcome(stage: Callable[[Context], Stage], context: Context) -> Stage:
    """What a stage returns, or why it did not."""
    try:
        return {"status": "passed"} | stage(context)
    except Skipped as skipped:
        return {"status": "skipped", "reason": str(skipped)}
    except Exception as error:  # the next stage must go on
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[-4000:]}


def build(context: Context) -> Stage:
    """A build with CUDA kernels, made if there is none or the sources are newer."""
    if context.device == "cuda" and not is_current():
        command = ["pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
        call([sys.executable, "-m", *command], context.seconds, {"BACKMATCH_CUDA": "1"})
    code = "import json; from backmatch import _C; print(json.dumps(_C.build_info()))"
    info = json.loads(call([sys.executable, "-c", code], context.seconds).splitlines()[-1])
    if context.device == "cuda" and not info["cuda"]:
        raise RuntimeError("the build that Python finds has no CUDA kernels")
    return {"build": info}


def is_current() -> bool:
    """Whether the module that Python finds has CUDA kernels and is newer than csrc/."""
    code = "from backmatch import _C; print(_C.__file__ if _C.build_info()['cuda'] else '')"
    try:
        path = call([sys.executable, "-c", code], 120).strip().splitlines()[-1]
    except (RuntimeError, IndexError):
        return False
    newest = max(file.stat().st_mtime for file in (ROOT / "csrc").rglob("*") if file.is_file())
    return bool(path) and Path(path).stat().st_mtime >= newest


def tests(context: Context) -> Stage:
    """pytest over the files with tests for the GPU; the last line is the summary."""
    files = [
        str(path)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "needs_gpu" in path.read_text()
    ]
    chosen = ["-k", "gpu or cuda"] if context.quick else []
    command = [sys.executable, "-m", "pytest", "-rs", "-m", "not slow", *chosen, *files]
    output = call(command, context.seconds)
    return {"summary": output.strip().splitlines()[-1], "output_tail": output[-3000:]}


def sanitizer(context: Context) -> Stage:
    """Each tool over the workload; a tool that finds something in our kernels fails the stage.

    Findings in the kernels of other libraries are counted, not judged.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not on PATH")
    outcomes = dict[str, str]()
    failed, late = list[str](), list[str]()
    tools = TOOLS[:1] if context.quick else TOOLS
    ends = time.monotonic() + context.seconds
    for number, tool in enumerate(tools):
        seconds = max(1.0, (ends - time.monotonic()) / (len(tools) - number))
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable]
        command += [__file__, "--workload", context.device]
        try:
            code, output = finished(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        except TimeoutError as over:
            code, output = 0, str(over)
            late.append(tool)
        ours = "backmatch::cuda::" in output
        outcomes[tool] = (output.strip().splitlines() or ["no output"])[-1]
        if code == FOUND and not ours and " SUMMARY: " in output:  # racecheck has its own
            outcomes[tool] += " (none in a kernel of ours)"
        elif code != 0 or ours:
            failed.append(tool)
            outcomes[tool] = f"exit code {code}: {output[:1500]} .. {output[-1500:]}"
        context.keep({"tools": outcomes})
    found: Stage = {"tools": outcomes}
    if late:
        found |= {"status": "incomplete", "reason": f"{', '.join(late)} ran out of time"}
    if failed:
        found |= {"status": "failed", "reason": f"{', '.join(failed)} failed"}
    return found


def kernels(context: Context) -> Stage:
    """Every operator on the device."""
    return groups(KERNELS, context)


def steps(context: Context) -> Stage:
    """The exact step of the MLPs by direct solves and of VGG-13 by CG."""
    return groups(STEPS, context)


def groups(names: tuple[str, ...], context: Context) -> Stage:
    """Rows of all groups; in child processes on CUDA, where a kernel may take its process along."""
    import gpu_groups
    from gpu_cases import ratios

    from backmatch.bench.run import rates_of

    def stage_of(parts: dict[str, Stage]) -> Stage:
        about = {name: {k: v for k, v in p.items() if k != "rows"} for name, p in parts.items()}
        rows = [row for part in parts.values() for row in part["rows"]]
        found = {"groups": about, "rates": rates_of(rows), "rows": rows}
        if cliffs := ratios([row for row in rows if row["question"] == "cliffs"]):
            found["cliffs"] = cliffs
        return found

    def keep(parts: dict[str, Stage], machine: Stage) -> None:
        context.head.update(machine=machine)
        context.keep(stage_of(parts))

    if context.device == "cuda":
        parts = gpu_groups.isolated(
            names,
            context.scratch,
            quick=context.quick,
            device=context.device,
            seconds=context.seconds,
            keep=keep,
        )
    else:
        parts = gpu_groups.in_process(names, context.quick, context.device, context.seconds, keep)
    found = stage_of(parts)
    for status in ("failed", "incomplete"):
        if bad := {name: p for name, p in parts.items() if p["status"] == status}:
            reasons = "; ".join(f"{name}: {part['reason']}" for name, part in bad.items())
            return {"status": status, "reason": reasons, **found}
    return found


def call(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    """Run in the repository; returns what it printed.

    Raises:
        RuntimeError: it failed or took too long; the text is the end of its output.
    """
    try:
        code, output = finished(command, seconds, environment)
    except TimeoutError as late:
        raise RuntimeError(str(late)) from None
    if code != 0:
        raise RuntimeError(f"exit code {code}:\n{output[-3000:]}")
    return output


def finished(
    command: list[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code and output of a program run in the repository, which ends with all it started.

    Raises:
        TimeoutError: it took longer; the text ends with what it printed until then.
    """
    from gpu_json import kill

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        output = kill(process)
        text = output.decode(errors="replace")[-3000:]
        raise TimeoutError(f"{command[:6]} took more than {seconds:.0f} s:\n{text}") from None
    finally:
        kill(process)
    return process.returncode, output.decode(errors="replace")


STAGES: dict[str, Callable[[Context], Stage]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "kernels": kernels,
    "steps": steps,
}

if __name__ == "__main__":
    sys.exit(main())
