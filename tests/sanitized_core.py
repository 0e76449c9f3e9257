"""The native core built with AddressSanitizer and UndefinedBehaviorSanitizer, and calls of it.

As a pytest plugin (``-p sanitized_core``) it puts that build, named by BACKMATCH_SANITIZED, in the
place of ``backmatch._C``. The interpreter itself is not built so: it runs with the runtimes of both
preloaded, and every buffer that torch or NumPy allocates has a guarded zone around it.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "BACKMATCH_SANITIZED"


def runtimes() -> list[str]:
    """The shared libraries to preload; empty where the compiler has none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return []
    found = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return found if all(os.path.isabs(path) for path in found) else []


def build(folder: Path) -> Path:
    """Configure and build; returns the module's path. Takes some 50 s on two cores."""
    import pybind11

    tools = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    cmake = shutil.which("cmake", path=tools)
    assert cmake is not None
    configure = [
        *(cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        *("-DBACKMATCH_CUDA=0", "-DBACKMATCH_SANITIZE=ON"),
    ]
    for command in (configure, [cmake, "--build", str(folder), "--target", "_C"]):
        done = subprocess.run(
            command, env={**os.environ, "PATH": tools}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("_C*.so"))


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the runtimes preloaded; the first report of either ends it."""
    environment = {
        **os.environ,
        VARIABLE: str(library),
        "LD_PRELOAD": " ".join(runtimes()),
        # The interpreter and torch leave memory to the end of the process on purpose.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]),
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # a spinning thread takes the core from one that works
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def load() -> Any:
    """The module at ``BACKMATCH_SANITIZED``, without the package around it."""
    spec = importlib.util.spec_from_file_location("backmatch._C", os.environ[VARIABLE])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install() -> None:
    """Have ``backmatch`` use it."""
    import backmatch

    module = load()
    sys.modules["backmatch._C"] = module
    backmatch._C = module  # type: ignore[attr-defined]


def planted(kernel: str, level: str) -> None:
    """Calls ``kernel`` with one buffer an element shorter than its sizes say, or a wild stride."""
    import numpy as np

    core = load()
    core.set_simd_level(level)
    batch, n = 3, 9

    def buffer(*shape: int, short: bool = False) -> int:
        array = np.ones(int(np.prod(shape)) - short, dtype=np.float64)
        keep.append(array)
        return int(array.ctypes.data)

    keep: list[Any] = [np.zeros(batch, dtype=np.int32)]
    info, matrix = keep[0].ctypes.data, (n * n, n, 1)
    if kernel == "spd_solve writes":
        out = buffer(batch, n, 1, short=True)
        args = (buffer(batch, n, n), *matrix, buffer(1), 0, buffer(batch, n, 1), n, 1, 1, out, info)
        core.spd_solve("float64", batch, n, 1, *args)
    elif kernel == "spd_solve reads":
        A = buffer(batch, n, n, short=True)
        args = (A, *matrix, buffer(1), 0, buffer(batch, n, 1), n, 1, 1, buffer(batch, n, 1), info)
        core.spd_solve("float64", batch, n, 1, *args)
    elif kernel == "scaled_gram_solve reads":
        K, D, R = buffer(n, n, short=True), buffer(batch, n), buffer(batch, n)
        args = (K, n, 1, D, n, 1, R, n, 1, buffer(1), 0, buffer(batch, n), info)
        core.scaled_gram_solve("float64", batch, n, *args)
    elif kernel == "weighted_gram writes":
        out = buffer(batch, n, n, short=True)
        core.weighted_gram(
            *("float64", batch, 5, n, buffer(5, n), n, 1, buffer(batch, 5), 5, 1, buffer(1), 0, out)
        )
    elif kernel == "cg_direction writes":
        P, flags = buffer(batch, n, short=True), np.ones(batch, dtype=np.uint8)
        keep.append(flags)
        core.cg_direction(
            *("float64", batch, n, buffer(batch, n), buffer(batch, n), P, buffer(batch)),
            flags.ctypes.data,
        )
    elif kernel == "stride overflows":
        args = (buffer(batch, n, n), 2**62, n, 1, buffer(1), 0, buffer(batch, n, 1), n, 1, 1)
        core.spd_solve("float64", batch, n, 1, *args, buffer(batch, n, 1), info)
    print("nothing noticed")


if os.environ.get(VARIABLE) and __name__ != "__main__":
    install()

if __name__ == "__main__":
    planted(*sys.argv[1:])
