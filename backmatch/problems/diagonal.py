"""A diagonal J or J^T J per sample, solved in closed form: activations alone, max pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Direct, LeastSquares


@dataclass(frozen=True)
class Diagonal(LeastSquares):
    """Systems with J_s = diag(slopes_s), ``slopes`` of shape (systems, n)."""

    slopes: Tensor
    residual: Tensor
    scale: float = 1.0
    structure: str = "sample"
    outside: Tensor | None = None

    @property
    def unknowns(self) -> int:
        return self.slopes.shape[1]

    def jvp(self, step: Tensor) -> Tensor:
        return self.slopes * step

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self.slopes * cotangent

    def traces(self) -> tuple[Tensor, bool]:
        return self.slopes.square().sum(-1), True

    @property
    def direct_is_cheap(self) -> bool:
        return True

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        if isinstance(damping, float) and damping == 0.0:
            size = self.slopes.abs()
            relative = rcond
            if relative is None:
                relative = (self.unknowns * torch.finfo(size.dtype).eps) ** 0.5
            kept = size > relative * size.amax(-1, keepdim=True)
            step = torch.where(kept, self.residual / self.slopes, torch.zeros_like(size))
            return Direct(step, rank=int(kept.sum()))
        shift = damping.unsqueeze(-1) if isinstance(damping, Tensor) else damping
        return Direct(self.slopes * self.residual / (self.slopes.square() + shift))

    def diagonal(self) -> Tensor:
        return self.slopes.square()

    def largest_eigenvalue(self) -> Tensor:
        if self.slopes.numel() == 0:
            return self.residual.new_zeros(())
        return self.slopes.square().max()

    def with_residual(self, residual: Tensor) -> Diagonal:
        return replace(self, residual=residual)
