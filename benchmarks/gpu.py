"""All that needs a CUDA device, in one command: build, tests, sanitizers, and times against torch.

    python benchmarks/gpu.py                    # everything; results/gpu.json
    python benchmarks/gpu.py --stages build,kernels --out FILE

Works without a network. Every stage writes its outcome into the file, failed or not, and the next
one goes on; the exit code is 0 if none failed, 1 if one did, 2 where there is no GPU.

- build: ``pip install --no-build-isolation --no-deps --editable .`` unless the loaded build has
  CUDA kernels that are newer than their sources;
- tests: those of the CUDA kernels on the device;
- sanitizer: memcheck, racecheck, initcheck and synccheck of ``compute-sanitizer`` over all kernels;
- kernels: every operator against torch on CUDA (CuPy and Warp where importable), both dtypes;
- steps: the exact step of two MLPs and of VGG-13 with batch norm (CIFAR shapes, CG at rtol 1e-2)
  against back-propagation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
KERNELS = ("spd_solve", "scaled_gram", "weighted_gram", "cg")
#: Seconds that a subprocess may take; a tool that hangs must not cost the other stages.
LIMIT = 1200
WORKLOAD_SIZES = (1, 7, 8, 17, 33, 65, 129, 257)

Stage = dict[str, Any]


class Skipped(Exception):  # noqa: N818 - no error: the reason why a stage does not apply
    """A stage that cannot run here, with the reason."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: results/gpu.json")
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument("--workload", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    stages = parsed.stages.split(",")
    if unknown := [name for name in stages if name not in STAGES]:
        parser.error(f"--stages: expected names out of {', '.join(STAGES)}, got {unknown[0]!r}")
    if reason := no_gpu():
        print(f"gpu.py: {reason}; nothing was run", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))  # a build in place need not be installed
    if parsed.workload:
        workload("cuda")
        return 0
    return run(stages, parsed.out, quick=parsed.quick)


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


def run(stages: list[str], out: Path, *, quick: bool, device: str = "cuda") -> int:
    """All stages; the file is written after each."""
    result: dict[str, Any] = {"command": sys.argv, "quick": quick, "stages": {}}
    for name in stages:
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        try:
            stage = {"status": "passed"} | STAGES[name](quick, device)
        except Skipped as skipped:
            stage = {"status": "skipped", "reason": str(skipped)}
        except Exception as error:  # the next stage must go on
            stage = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[-4000:]}
        stage["elapsed_seconds"] = round(time.perf_counter() - began, 1)
        result["stages"][name] = stage
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        reason = f": {stage['reason'].splitlines()[-1]}" if "reason" in stage else ""
        print(f"== {name} {stage['status']}{reason}", flush=True)
    print(f"result {out}")
    return int(any(stage["status"] == "failed" for stage in result["stages"].values()))


def build(quick: bool, device: str) -> Stage:
    """A build with CUDA kernels, made if there is none or the sources are newer."""
    if device == "cuda" and not is_current():
        environment = {"BACKMATCH_CUDA": "1"}
        command = ["pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
        call([sys.executable, "-m", *command], environment)
    code = "import json; from backmatch import _C; print(json.dumps(_C.build_info()))"
    info = json.loads(call([sys.executable, "-c", code]).splitlines()[-1])
    if device == "cuda" and not info["cuda"]:
        raise RuntimeError("the build that Python finds has no CUDA kernels")
    return {"build": info}


def is_current() -> bool:
    """Whether the module that Python finds has CUDA kernels and is newer than csrc/."""
    code = "from backmatch import _C; print(_C.__file__ if _C.build_info()['cuda'] else '')"
    try:
        path = call([sys.executable, "-c", code]).strip().splitlines()[-1]
    except (RuntimeError, IndexError):
        return False
    newest = max(file.stat().st_mtime for file in (ROOT / "csrc").rglob("*") if file.is_file())
    return bool(path) and Path(path).stat().st_mtime >= newest


def tests(quick: bool, device: str) -> Stage:
    """pytest over the CUDA kernels and their paths; the last line is the summary."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*cuda*.py"))]
    output = call([sys.executable, "-m", "pytest", "-rs", *files])
    return {"summary": output.strip().splitlines()[-1], "output_tail": output[-3000:]}


def sanitizer(quick: bool, device: str) -> Stage:
    """Each tool over :func:`workload`; a tool that finds something fails the stage."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not on PATH")
    outcomes, failed = {}, []
    for tool in TOOLS[:1] if quick else TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "99"]
        try:
            # torch's cache of memory blocks would hide accesses beyond a tensor.
            output = call(
                [*command, sys.executable, __file__, "--workload"],
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            outcomes[tool] = output.strip().splitlines()[-1]
        except RuntimeError as error:
            outcomes[tool] = str(error)[-3000:]
            failed.append(tool)
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed: {json.dumps(outcomes)}")
    return {"tools": outcomes}


def workload(device: str) -> None:
    """Every kernel of ours once per size and dtype, with a system that fails among them."""
    import torch

    from backmatch import linalg

    for dtype in (torch.float32, torch.float64):
        for n in WORKLOAD_SIZES:
            generator = torch.Generator().manual_seed(n)
            factors = torch.randn(5, n, n + 4, generator=generator, dtype=dtype)
            A = (factors @ factors.mT / n).to(device)
            A[3, n // 2, n // 2] = -1
            B = torch.randn(5, n, 3, generator=generator, dtype=dtype).to(device)
            D = (torch.rand(5, n, generator=generator) > 0.5).to(device, dtype)
            for k in (1, 3):
                assert linalg.spd_solve_ex(A, B[..., :k])[1].tolist() == [0, 0, 0, n // 2 + 1, 0]
            x, info = linalg.scaled_gram_solve_ex(A[0], D, B[..., 0], damping=0.5)
            assert not info.any()
            assert x.isfinite().all()


def kernels(quick: bool, device: str) -> Stage:
    """``backmatch bench`` on the device, with the peers that only it has."""
    import gpu_peers

    return bench(KERNELS, quick, device, gpu_peers.with_peers)


def steps(quick: bool, device: str) -> Stage:
    """The exact step of the MLPs by direct solves and of VGG-13 by CG."""
    import gpu_vgg

    found = bench(("step", "peers"), quick, device)
    found["rows"].append(gpu_vgg.measured(quick, device))
    return found


def bench(
    questions: tuple[str, ...],
    quick: bool,
    device: str,
    extend: Callable[[Any], Any] = lambda case: case,
) -> Stage:
    """The result of ``backmatch bench``; a wrong answer of ours fails the stage, rows are kept."""
    from backmatch.bench import options, report, run

    dtypes = ("float32",) if quick else ("float32", "float64")
    chosen = options.BenchOptions(quick=quick, only=questions, dtypes=dtypes, device=device)
    found, failure = run.collect(run.settle(chosen), report.show, extend)
    return found if failure is None else {"status": "failed", "reason": str(failure), **found}


def call(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run in the repository; returns what it printed.

    Raises:
        RuntimeError: it failed or took too long; the text is the end of its output.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[:6]} took more than {LIMIT} s") from None
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


STAGES: dict[str, Callable[[bool, str], Stage]] = {
    "build": build,
    "tests": tests,
    "sanitizer": sanitizer,
    "kernels": kernels,
    "steps": steps,
}

if __name__ == "__main__":
    sys.exit(main())
