"""Scale and shift per unit: the weight problem of a normalisation, at most 2 unknowns a system.

Unit c of a layer gamma_c x_c + beta_c has J_c = [x_c 1], x_c its normalised rows. Everything is
written in mean and centred part of x_c: no step squares the condition number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import Direct, LeastSquares


@dataclass(frozen=True)
class ScaleShift(LeastSquares):
    """All units of one layer: one joint system of the specification.

    Attributes:
        normed: x, shape (systems, rows).
        scales: whether the units' factors are unknown.
        shifts: whether the units' offsets are unknown; at least one of the two.
    """

    normed: Tensor
    residual: Tensor
    scale: float
    scales: bool = True
    shifts: bool = True
    structure: str = "joint"

    @property
    def damping_group(self) -> int:  # type: ignore[override]
        return self.systems

    @property
    def cut_group(self) -> int:  # type: ignore[override]
        return self.systems

    @property
    def unknowns(self) -> int:
        return int(self.scales) + int(self.shifts)

    def jvp(self, step: Tensor) -> Tensor:
        if not self.scales:
            return step.expand_as(self.residual)
        if not self.shifts:
            return self.normed * step
        return torch.addcmul(step[:, 1:], self.normed, step[:, :1])

    def vjp(self, cotangent: Tensor) -> Tensor:
        parts = []
        if self.scales:
            parts.append((self.normed * cotangent).sum(-1))
        if self.shifts:
            parts.append(cotangent.sum(-1))
        return torch.stack(parts, -1)

    @cached_property
    def _mean(self) -> Tensor:
        return self.normed.mean(-1)

    @cached_property
    def _spread(self) -> Tensor:
        """Sum of the squared centred rows, shape (systems,)."""
        return (self.normed - self._mean.unsqueeze(-1)).square().sum(-1)

    @cached_property
    def _diagonal(self) -> tuple[Tensor, Tensor]:
        """Diagonal of J^T J: sum x^2 and the number of rows, zero where frozen."""
        rows = self.residual.shape[1]
        squares = self._spread + rows * self._mean.square()
        zero = torch.zeros_like(squares)
        return squares if self.scales else zero, zero + rows if self.shifts else zero

    def traces(self) -> tuple[Tensor, bool]:
        first, second = self._diagonal
        return (first + second).sum().reshape(1), True

    @property
    def direct_is_cheap(self) -> bool:
        return True

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Both eigenvalues of J^T J, each (systems,), larger first; the smaller by the
        determinant, which the centred rows give without cancellation."""
        first, second = self._diagonal
        total = first + second
        if self.unknowns == 1:
            return total, torch.zeros_like(total)
        rows = self.residual.shape[1]
        larger = (total + torch.hypot(first - second, 2 * rows * self._mean)) / 2
        return larger, rows * self._spread / larger.clamp_min(torch.finfo(total.dtype).tiny)

    def largest_eigenvalue(self) -> Tensor:
        larger, _ = self._spectrum
        return larger.max() if larger.numel() else larger.new_zeros(())

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        if isinstance(damping, float) and damping == 0.0:
            return self._minimum_norm(rcond)
        if self.unknowns == 1:
            return Direct(self.vjp(self.residual) / (self._spectrum[0] + damping).unsqueeze(-1))
        return Direct(self._both(damping))

    def _both(self, damping: float | Tensor) -> Tensor:
        """Cramer's rule on [[S + n mean^2, n mean], [n mean, n]] + damping I, S the spread."""
        rows, mean, spread = self.residual.shape[1], self._mean, self._spread
        total = self.residual.sum(-1)
        centred = ((self.normed - mean.unsqueeze(-1)) * self.residual).sum(-1)
        first, second = self._diagonal
        determinant = rows * spread + damping * (first + second + damping)
        scale = (rows + damping) * centred + damping * mean * total
        shift = (spread + damping) * total - rows * mean * centred
        return torch.stack([scale, shift], -1) / determinant.unsqueeze(-1)

    def _minimum_norm(self, rcond: float | None) -> Direct:
        larger, smaller = self._spectrum
        eps = torch.finfo(larger.dtype).eps
        size = max(self.residual.shape[1], self.unknowns) * self.systems
        cut = ((size * eps) ** 0.5 if rcond is None else rcond) * larger.max().sqrt()
        tall, full = larger.sqrt() > cut, smaller.sqrt() > cut
        rank = int(tall.sum() + full.sum())
        leading = torch.where(tall.unsqueeze(-1), self._leading(), 0.0)
        if self.unknowns == 1 or not bool(full.any()):
            return Direct(leading, rank=rank)
        return Direct(torch.where(full.unsqueeze(-1), self._both(0.0), leading), rank=rank)

    def _leading(self) -> Tensor:
        """pinv(J) r on the larger singular value alone."""
        g, larger = self.vjp(self.residual), self._spectrum[0].unsqueeze(-1)
        if self.unknowns == 1:
            return g / larger
        first, second = self._diagonal
        angle = torch.atan2(2 * self.residual.shape[1] * self._mean, first - second) / 2
        v = torch.stack([angle.cos(), angle.sin()], -1)
        return v * (v * g).sum(-1, keepdim=True) / larger

    def with_residual(self, residual: Tensor) -> ScaleShift:
        return replace(self, residual=residual)
