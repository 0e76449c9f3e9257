"""From the scalars of a chain to one factor per block."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import NonFiniteError

#: The least divisor whose inverse is a float.
SMALLEST = 1.0 / sys.float_info.max


@dataclass(frozen=True)
class BlockScale:
    """What one block's gradient is divided by.

    Attributes:
        weight: c_W of the block (averaged with ``average``), ``None`` where it was not needed.
        input: c_z of the block, likewise.
        factor: what the gradient was multiplied by in the last step, normalisation included;
            0 where a scale is 0, ``None`` where the block had no gradient.
    """

    weight: float | None
    input: float | None
    factor: float | None


def averaged(
    before: Mapping[tuple[str, int], float],
    fresh: Mapping[tuple[str, int], float],
    beta: float,
) -> dict[tuple[str, int], float]:
    """Exponential moving average of every scalar, from its first value on."""
    return {
        **before,
        **{
            key: beta * before[key] + (1 - beta) * c if beta and key in before else c
            for key, c in fresh.items()
        },
    }


def factors(
    scalars: Mapping[tuple[str, int], float],
    wanted: Sequence[int],
    top: int,
    damping: float,
    names: Sequence[str],
    *,
    chained: bool,
) -> dict[int, float]:
    """1 / ((c_W + damping) prod_{k > b} (c_z,k + damping)) of the wanted blocks; c = 0 gives 0.

    Raises:
        NonFiniteError: a factor overflows float64.
    """
    found: dict[int, float] = {}
    handed = 1.0  # what is left of the top's displacement on its way down
    for b in range(top, min(wanted, default=top + 1) - 1, -1):
        if b in wanted:
            found[b] = handed * _inverse(scalars["weight", b], damping)
            if not math.isfinite(found[b]):
                raise NonFiniteError("factor of the gradient", 1, 1, block=names[b])
        if chained and b > min(wanted):
            handed *= _inverse(scalars["input", b], damping)
    return found


def _inverse(c: float, damping: float) -> float:
    if not c > 0:
        return 0.0
    total = c + damping
    # Below this the quotient overflows.
    return 1.0 / total if total > SMALLEST else math.inf


def normalising(sizes: Mapping[int, float], found: Mapping[int, float]) -> dict[int, float]:
    """The factors times one number, so that the whole gradient keeps its norm.

    Args:
        sizes: norm of every block's gradient.
        found: factor of every block.
    """
    # The largest factor is taken out: no square over- or underflows where it matters.
    most = max(found.values(), default=0.0)
    if most == 0.0:
        return dict(found)
    relative = {b: f / most for b, f in found.items()}
    amended = math.hypot(*(sizes[b] * f for b, f in relative.items()))
    if amended == 0.0:
        return dict(found)
    plain = math.hypot(*(sizes[b] for b in found))
    return {b: f * (plain / amended) for b, f in relative.items()}
