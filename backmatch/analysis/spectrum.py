"""Eigenvalues of a block-diagonal symmetric matrix, and which of them count as zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in float64, descending with their sign.

    Attributes:
        values: shape (count,).
        counted: which of them are not zero within the resolution, shape (count,).
        complete: whether these are all eigenvalues.
        method: ``"closed form"``, ``"svd"`` (of J), ``"gram"``, ``"eigh"`` or ``"lanczos"``.
    """

    values: Tensor
    counted: Tensor
    complete: bool
    method: str

    @classmethod
    def of_systems(
        cls, values: Tensor, relative: float, method: str, *, group: int = 1, copies: int = 1
    ) -> Spectrum:
        """All eigenvalues from those of every system.

        Args:
            values: shape (systems, n).
            relative: magnitudes up to this times the largest of their own system count as zero.
            group: consecutive systems that are one for that purpose.
            copies: how often every system stands in the matrix.
        """
        sizes = values.abs()
        counted = torch.zeros_like(sizes, dtype=torch.bool)
        if sizes.numel():
            largest = sizes.amax(-1).reshape(-1, group).amax(-1).repeat_interleave(group)
            counted = sizes > relative * largest.unsqueeze(-1)
        return cls.of_values(values.reshape(-1), counted.reshape(-1), method, copies=copies)

    @classmethod
    def of_values(
        cls,
        values: Tensor,
        counted: Tensor,
        method: str,
        *,
        copies: int = 1,
        complete: bool = True,
    ) -> Spectrum:
        """In descending order, each ``copies`` times."""
        values, order = torch.sort(values, descending=True, stable=True)
        counted = counted[order]
        if copies > 1:
            values, counted = (part.repeat_interleave(copies) for part in (values, counted))
        return cls(values, counted, complete, method)

    def extreme(self, k: int) -> Spectrum:
        """The k of largest magnitude."""
        if k >= self.values.numel():
            return self
        chosen = torch.sort(self.values.abs(), descending=True, stable=True).indices[:k]
        chosen = chosen.sort().values
        return Spectrum(self.values[chosen], self.counted[chosen], False, self.method)
