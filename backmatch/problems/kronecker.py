"""Average pooling's input problem: J = A (x) B on every map, solved by two small SVDs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import Direct, LeastSquares


@dataclass(frozen=True)
class Kronecker(LeastSquares):
    """Maps X of shape (height, width) with J X = A X B^T, the same A and B for all.

    Attributes:
        first: A, shape (rows_a, height).
        second: B, shape (rows_b, width).
        residual: shape (maps, rows_a * rows_b), the maps of one sample after one another.
        maps: maps per sample.
    """

    first: Tensor
    second: Tensor
    residual: Tensor
    maps: int
    structure: str = "sample"
    scale: float = 1.0

    @property
    def damping_group(self) -> int:  # type: ignore[override]
        return self.maps

    @property
    def cut_group(self) -> int:  # type: ignore[override]
        return self.maps

    @property
    def unknowns(self) -> int:
        return self.first.shape[1] * self.second.shape[1]

    def jvp(self, step: Tensor) -> Tensor:
        grid = step.view(-1, self.first.shape[1], self.second.shape[1])
        return (self.first @ grid @ self.second.t()).reshape(self.systems, -1)

    def vjp(self, cotangent: Tensor) -> Tensor:
        grid = cotangent.reshape(-1, self.first.shape[0], self.second.shape[0])
        return (self.first.t() @ grid @ self.second).reshape(self.systems, -1)

    def traces(self) -> tuple[Tensor, bool]:
        one = self.first.square().sum() * self.second.square().sum()
        return (self.maps * one).reshape(1), True

    @property
    def direct_is_cheap(self) -> bool:
        return True

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U_A, U_B, the products of singular values (p, q), V_A, V_B."""
        left, a, right = torch.linalg.svd(self.first, full_matrices=False)
        below, b, above = torch.linalg.svd(self.second, full_matrices=False)
        return left, below, torch.outer(a, b), right.t(), above.t()

    def largest_eigenvalue(self) -> Tensor:
        return self._factors[2].max().square()

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        left, below, values, right, above = self._factors
        rank = None
        if isinstance(damping, float) and damping == 0.0:
            kept = values > self._relative_cut(rcond) * values.max()
            weights = torch.where(kept, values.reciprocal(), 0.0)
            rank = int(kept.sum()) * self.systems
        else:
            shift = damping.view(-1, 1, 1) if isinstance(damping, Tensor) else damping
            weights = values / (values.square() + shift)
        grid = self.residual.reshape(-1, self.first.shape[0], self.second.shape[0])
        coefficients = (left.t() @ grid @ below) * weights
        step = right @ coefficients @ above.t()
        return Direct(step.reshape(self.systems, -1), rank=rank)

    def _relative_cut(self, rcond: float | None) -> float:
        if rcond is not None:
            return rcond
        size = max(self.residual.shape[1], self.unknowns) * self.maps
        cut: float = (size * torch.finfo(self.residual.dtype).eps) ** 0.5
        return cut

    def with_residual(self, residual: Tensor) -> Kronecker:
        return replace(self, residual=residual)
