"""What a figure depends on: versions, processor, threads, and two rates of the same run."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..linalg import _library

_CPU_INFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
#: Steps of every chain in one call of the native loop: about a millisecond.
_FMA_STEPS = 100_000
#: The same on CUDA: a few tenths of a millisecond on a large GPU.
_CUDA_FMA_STEPS = 4096


def describe(device: torch.device) -> dict[str, Any]:
    """Date, versions and hardware, for the head of a result."""
    build = _library.native().build_info()
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "simd": build["simd_active"],
        "compiler": build["compiler"],
        "commit": commit(),
        "python": platform.python_version(),
        "backmatch": __version__,
        **{name: _version(name) for name in ("torch", "numpy", "scipy")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cuda_of_build": build["cuda_version"],
            "driver": driver(),
        }
    return about


def cpu_name() -> str:
    """The model name where Linux tells it, else the architecture."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def driver() -> str | None:
    """Version of the GPU's driver, where its tool tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (run.stdout.splitlines() or [""])[0].strip() or None


def last_level_cache(device: torch.device) -> int:
    """Bytes of the GPU's second-level cache, or of the largest one that Linux lists, or 32 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * 2**20]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1:] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes)


def commit() -> str | None:
    """The commit of the source tree that runs here, ``-dirty`` if files differ; else ``None``."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie below a foreign tree
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


@dataclass(frozen=True)
class Rate:
    """A piece of work whose rate is a limit.

    Attributes:
        run: does it once.
        work: operations, or bytes, of one run.
    """

    run: Callable[[], object]
    work: float


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, Rate]:
    """``"fma"`` (operations) and ``"copy"`` (bytes read and written), ready to be timed.

    Valid for the number of threads in force. On CUDA in float64 ``"matrix"`` besides: multiply-adds
    on the matrix units.
    """
    found = {"fma": _fma(device, dtype), "copy": _copy(device)}
    if device.type == "cuda" and dtype == torch.float64:
        found["matrix"] = _matrix(device)
    return found


def _fma(device: torch.device, dtype: torch.dtype) -> Rate:
    if device.type == "cpu":
        fma_rate, name = _library.native().fma_rate, _library.DTYPE_NAMES[dtype]
        return Rate(lambda: fma_rate(name, _FMA_STEPS), fma_rate(name, _FMA_STEPS))
    cuda, name = _library.native_cuda(), _library.DTYPE_NAMES[dtype]
    return _cuda_rate(functools.partial(cuda.fma_rate, name), cuda.fma_rate_workspace(name), device)


def _matrix(device: torch.device) -> Rate:
    cuda = _library.native_cuda()
    return _cuda_rate(cuda.matrix_rate, cuda.matrix_rate_workspace(), device)


def _cuda_rate(launch: Callable[..., float], size: int, device: torch.device) -> Rate:
    workspace = torch.empty(size, dtype=torch.uint8, device=device)

    def run() -> float:
        stream = torch.cuda.current_stream().cuda_stream
        return launch(_CUDA_FMA_STEPS, workspace.data_ptr(), stream)

    return Rate(run, run())


@functools.lru_cache  # the buffers take longer to make than to copy
def _copy(device: torch.device) -> Rate:
    size = 256 * 2**20 if device.type == "cuda" else 2 * last_level_cache(device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rate(lambda: target.copy_(source), 2.0 * size)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
