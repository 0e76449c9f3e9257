"""Batch norm's input problem on batch statistics: one joint system over the batch.

Channel c with N entries, normalised entries x (mean 0, |x|^2 = N v / (v + eps)) and the factor
k = gamma / sqrt(v + eps) has the symmetric J = k (I - 11^T/N - x x^T/N). Its eigenvalues are 0
on 1, k e on x with e = eps / (v + eps), and k on the N - 2 other directions (derived here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Direct, LeastSquares


@dataclass(frozen=True)
class BatchNormInputs(LeastSquares):
    """All channels of the batch as one system.

    Attributes:
        apply: J d, and J^T u as well: (1, n) -> (1, n).
        normed: x, shape (samples, channels, positions), n entries in all.
        slopes: k, shape (channels,).
        shrink: e, shape (channels,).
    """

    apply: Callable[[Tensor], Tensor]
    normed: Tensor
    slopes: Tensor
    shrink: Tensor
    residual: Tensor
    structure: str = "joint"
    scale: float = 1.0

    @property
    def unknowns(self) -> int:
        return self.normed.numel()

    @property
    def entries(self) -> int:
        """N: entries per channel."""
        return self.normed.shape[0] * self.normed.shape[2]

    def jvp(self, step: Tensor) -> Tensor:
        return self.apply(step)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self.apply(cotangent)

    def traces(self) -> tuple[Tensor, bool]:
        squares = self.slopes.square() * (self.entries - 2 + self.shrink.square())
        return squares.sum().reshape(1), True

    @property
    def direct_is_cheap(self) -> bool:
        return True

    def _singular_values(self) -> tuple[Tensor, Tensor]:
        """On x, and on the other directions (where there are none: the same), per channel."""
        small = self.slopes.abs() * self.shrink
        return small, self.slopes.abs() if self.entries > 2 else small

    def largest_eigenvalue(self) -> Tensor:
        return torch.cat(self._singular_values()).max().square()

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        k, e = self.slopes, self.shrink
        if isinstance(damping, float) and damping == 0.0:
            return self._minimum_norm(rcond)
        bulk, small = k.square() + damping, (k * e).square() + damping
        # ke / small - k / bulk, divided by |x|^2 / N = 1 - e before it can cancel.
        return Direct(self._combine(k / bulk, k * (k.square() * e - damping) / (bulk * small)))

    def _minimum_norm(self, rcond: float | None) -> Direct:
        k, e = self.slopes, self.shrink
        small, bulk = self._singular_values()
        relative = rcond
        if relative is None:
            relative = (self.unknowns * torch.finfo(k.dtype).eps) ** 0.5
        cut = relative * torch.maximum(small, bulk).max()
        has_small, has_bulk = small > cut, bulk > cut
        on_x = torch.where(has_bulk, -1 / (k * (1 - e)), 0.0)
        on_x = torch.where(has_small, 1 / (k * e), on_x)
        step = self._combine(torch.where(has_bulk, 1 / k, 0.0), on_x)
        rank = (self.entries - 2) * has_bulk.sum() + has_small.sum()
        return Direct(step, rank=int(rank))

    def _combine(self, on_all: Tensor, on_x: Tensor) -> Tensor:
        """on_all (r - mean) + on_x x (x^T r) / N per channel, shape (1, n)."""
        r = self.residual.view(self.normed.shape)
        mean = r.mean((0, 2), keepdim=True)
        along = (self.normed * r).sum((0, 2)) * (on_x / self.entries)
        step = torch.addcmul((r - mean) * on_all.view(-1, 1), self.normed, along.view(-1, 1))
        return step.reshape(1, -1)

    def with_residual(self, residual: Tensor) -> BatchNormInputs:
        return replace(self, residual=residual)
