"""A number per system, in three: smallest, median, largest."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .plain import finite


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of one number per system.

    >>> Spread.of(torch.tensor([4.0, 1.0, 2.0, 9.0]))
    Spread(min=1.0, median=3.0, max=9.0)
    """

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: float | Tensor) -> Spread | None:
        """``None`` for no values; a NaN among them makes all three NaN."""
        if not isinstance(values, Tensor):
            return cls(float(values), float(values), float(values))
        if values.numel() == 0:
            return None
        ordered = values.detach().flatten().double().sort().values
        if bool(ordered.isnan().any()):
            ordered = torch.full_like(ordered, float("nan"))
        count = len(ordered)
        median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
        return cls(float(ordered[0]), float(median), float(ordered[-1]))

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: what is not finite is ``None``."""
        return {name: finite(value) for name, value in asdict(self).items()}
