"""Readers of option values: one sentence for one mistake, whatever the value came from.

Nothing here imports torch or NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

#: A reader turns a raw value into the option's value or raises ``ValueError(what it expects)``.
Reader = Callable[[Any], Any]


def choice(*names: str) -> Reader:
    """One of a few names."""

    def read(raw: Any) -> str:
        if not isinstance(raw, str) or raw not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return raw

    return read


def switch(raw: Any) -> bool:
    """``on`` or ``off``; YAML 1.1 reads both as booleans, and JSON has its own."""
    if isinstance(raw, bool):
        return raw
    if not isinstance(raw, str) or raw not in ("on", "off"):
        raise ValueError("on or off")
    return raw == "on"


def integer(low: int, high: int = 2**63 - 1) -> Reader:
    """A whole number from ``low`` to ``high``, as an int or in decimal digits."""

    def read(raw: Any) -> int:
        expected = f"a whole number >= {low}" if high == 2**63 - 1 else f"{low} to {high}"
        if isinstance(raw, str) and len(raw) <= 20 and raw.isascii() and raw.isdigit():
            raw = int(raw)
        if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
            raise ValueError(expected)
        return raw

    return read


def number(low: float, *, included: bool, below: float = math.inf) -> Reader:
    """A finite number in (low, below), or [low, below) if ``included``."""
    expected = f"a number {'>=' if included else '>'} {low:g}"
    if below < math.inf:
        expected += f" and < {below:g}"

    def read(raw: Any) -> float:
        value = _as_float(raw, expected)
        if not math.isfinite(value) or not value < below:
            raise ValueError(expected)
        if value < low or (value == low and not included):
            raise ValueError(expected)
        return value

    return read


def damping(raw: Any) -> float | str:
    """``0.5`` (absolute) or ``rel:0.1`` (relative to the mean diagonal of the system)."""
    expected = "a number >= 0 or rel:C with a number C >= 0, for example rel:0.1"
    relative = isinstance(raw, str) and raw.startswith("rel:")
    value = _as_float(raw[len("rel:") :] if relative else raw, expected)
    if not math.isfinite(value) or value < 0:
        raise ValueError(expected)
    return f"rel:{value!r}" if relative else value


def widths(raw: Any) -> list[int]:
    """Hidden layer sizes: ``128,128``, or ``none`` for no hidden layer."""
    if raw == "none":
        return []
    parts = raw.split(",") if isinstance(raw, str) else raw
    parts = [parts] if isinstance(parts, int) else parts
    try:
        if not isinstance(parts, list) or len(parts) > 1000:
            raise ValueError
        return [integer(1, 65536)(part) for part in parts]
    except ValueError:
        raise ValueError(
            "sizes from 1 to 65536 with commas between, for example 128,128, or none"
        ) from None


def _as_float(raw: Any, expected: str) -> float:
    # YAML 1.1 reads 1e-3 as a string, so strings are converted wherever they come from.
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        raise ValueError(expected)
    try:
        return float(raw)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None
