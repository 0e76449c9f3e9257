"""How like another step a step is: angle and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plain import finite


@dataclass(frozen=True)
class Likeness:
    """One step beside another.

    Attributes:
        cosine: cosine of the angle between them, in [-1, 1]; NaN if either is 0.
        ratio: length of the step over that of the other; NaN if the other is 0.
    """

    cosine: float
    ratio: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: what is undefined is ``None``."""
        return {"cosine": finite(self.cosine), "ratio": finite(self.ratio)}


def liken(step: Sequence[Tensor], other: Sequence[Tensor]) -> Likeness:
    """Compare two steps given in the same parts; sums run in float64.

    >>> step, other = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.ones(1), torch.zeros(1)]
    >>> liken(step, other)
    Likeness(cosine=0.6, ratio=5.0)
    """
    size, length = norm(step), norm(other)
    product = sum(
        (float((a * b).sum(dtype=torch.float64)) for a, b in zip(step, other, strict=True)), 0.0
    )
    nan = float("nan")
    if not size * length > 0:
        return Likeness(nan, size / length if length > 0 else nan)
    return Likeness(min(1.0, max(-1.0, product / (size * length))), size / length)


def norm(step: Sequence[Tensor]) -> float:
    """Euclidean length over all parts, summed in float64."""
    squares = (float(torch.linalg.vector_norm(p, dtype=torch.float64)) ** 2 for p in step)
    return float(sum(squares, 0.0) ** 0.5)
