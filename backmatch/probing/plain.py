"""Numbers as JSON takes them: it has no NaN and no infinity."""

from __future__ import annotations

import math


def finite(value: float | None) -> float | None:
    """The number, or ``None`` for NaN, infinity and ``None``.

    >>> finite(0.5), finite(float("nan")), finite(None)
    (0.5, None, None)
    """
    return None if value is None or not math.isfinite(value) else float(value)
