"""What gpu.py and its children share before the package is built: files and processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def write_json(path: Path, value: object) -> None:
    """At once, so that a reader or a sudden end never sees half a file; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")
    scratch.replace(path)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def kill(process: subprocess.Popen[bytes]) -> bytes:
    """End a process with all that it started, if it still runs; returns what it printed."""
    if process.poll() is not None:
        return b""
    try:
        os.killpg(process.pid, 9)  # it leads a session of its own
    except ProcessLookupError:
        process.kill()
    return process.communicate()[0] or b""
