"""Peak memory of one call, as torch's allocators see it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler would report its own start and end on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors allocated at one time during ``work``, beyond those before it.

    >>> one = torch.ones(1000)
    >>> peak_bytes(lambda: (one + 1) * 2, torch.device("cpu")) >= 8000
    True
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocated = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    return max(allocated, default=0)
