"""Peak memory of one call: tensors as torch's allocator counts them, and the whole process."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..training.peak_memory import PeakMemory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def tensor_peak(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors alive at one time during ``run``, its result included."""
    with PeakMemory(device) as memory:
        run()
    return memory.total


def process_peak(run: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at its peak during ``run``, its result included.

    What native code and libraries allocate counts too. ``None`` where the system does not tell
    (Linux only). Free memory is given back before, else a call could grow into it unseen.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # the peak so far becomes the present size
        before = _kilobytes("VmRSS")
        run()
        return max(0, _kilobytes("VmHWM") - before) * 1024
    except (OSError, AttributeError, ValueError):
        return None


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(field)
    return int(found[1])
