"""Readers of the values that only ``backmatch compare`` has: lists of seeds, rates, methods.

Each takes what stands behind a flag and what :mod:`json` made of an earlier reading.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..training.readers import integer, number

#: More runs than anyone waits for; a longer list is a mistake.
MOST = 1000


def names(raw: Any) -> list[str]:
    """Names with commas between, none twice; whether they exist is checked elsewhere."""
    expected = "names of methods with commas between, each once"
    found = _parts(raw, expected)
    if not all(isinstance(name, str) for name in found) or len(set(found)) < len(found):
        raise ValueError(expected)
    return found


def seeds(first: int) -> Callable[[Any], list[int]]:
    """``5``: five seeds from ``first`` on; ``3,7``: these."""
    expected = "a number of seeds, or the seeds with commas between, each once"

    def read(raw: Any) -> list[int]:
        if isinstance(raw, str) and "," not in raw:
            try:
                count = integer(1, MOST)(raw)
            except ValueError:
                raise ValueError(f"{expected}, from 1 to {MOST} of them") from None
            return list(range(first, first + count))
        try:
            found = [integer(0)(part) for part in _parts(raw, expected)]
        except ValueError:
            raise ValueError(expected) from None
        if len(set(found)) < len(found):
            raise ValueError(expected)
        return found

    return read


def epochs(raw: Any) -> list[int]:
    """Epochs with commas between, ascending."""
    expected = "epochs with commas between, for example 1,5"
    try:
        found = [integer(1)(part) for part in _parts([raw] if type(raw) is int else raw, expected)]
    except ValueError:
        raise ValueError(expected) from None
    return sorted(set(found))


def rates(raw: Any) -> dict[str, list[float]]:
    """``0.1,0.3`` (of all methods, key ``""``) or ``METHOD=0.1,0.3``, any number of them."""
    if isinstance(raw, dict):
        return {name: _rates(values) for name, values in raw.items()}
    found: dict[str, list[float]] = {}
    for part in raw if isinstance(raw, list) else [raw]:
        text = part if isinstance(part, str) else ""
        name, _, values = text.rpartition("=")
        if name in found:
            raise ValueError(f"rates once for {name or 'all methods'}")
        found[name] = _rates(values)
    return found


def target(raw: Any) -> float:
    """An accuracy in (0, 1]."""
    try:
        value = float(number(0, included=False)(raw))
    except ValueError:
        value = 2.0
    if value > 1:
        raise ValueError("an accuracy > 0 and <= 1, for example 0.95")
    return value


def _rates(raw: Any) -> list[float]:
    expected = "learning rates > 0 with commas between, or METHOD=RATES, for example exact=0.3,1"
    try:
        found = [number(0, included=False)(part) for part in _parts(raw, expected)]
    except ValueError:
        raise ValueError(expected) from None
    return sorted(set(found))


def _parts(raw: Any, expected: str) -> list[Any]:
    parts = raw.split(",") if isinstance(raw, str) else raw
    if not isinstance(parts, list) or not parts or len(parts) > MOST or "" in parts:
        raise ValueError(expected)
    return parts
