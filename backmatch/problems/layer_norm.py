"""Layer and group norm's input problem: one system per normalised group of one sample.

    J = diag(slopes) B,   B = I - 11^T/n - x x^T/n,   |x|^2 = n (1 - e),   e = eps / (v + eps)

B is 0 on 1, e on x and the identity elsewhere. With q = B d the problem becomes a weighted linear
regression of slopes * r on [1, x], solved in O(n) without a small difference of large numbers, so
that no refinement is needed (derived here).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _rank_two as rank_two
from .base import Direct, LeastSquares
from .dense import DENSE_ENTRIES
from .operator import DENSE_PASSES, EXACT_SIDE


@dataclass(frozen=True)
class LayerNormInputs(LeastSquares):
    """The groups of all samples, those of one sample after one another.

    Attributes:
        normed: x, shape (systems, n).
        slopes: gamma / sqrt(v + eps), shape (systems, n), or (systems, 1) where it is one number.
        shrink: e, shape (systems,).
        label: block and side, for messages.
        damping_group: groups per sample; :attr:`cut_group` likewise.
    """

    normed: Tensor
    slopes: Tensor
    shrink: Tensor
    residual: Tensor
    label: str
    damping_group: int = 1
    cut_group: int = 1
    structure: str = "sample"
    scale: float = 1.0

    @property
    def unknowns(self) -> int:
        return self.normed.shape[1]

    def jvp(self, step: Tensor) -> Tensor:
        return self.slopes * self._standardise(step)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._standardise(self.slopes * cotangent)

    def _standardise(self, value: Tensor) -> Tensor:
        along = torch.linalg.vecdot(self.normed, value).unsqueeze(-1)
        centred = value - value.mean(-1, keepdim=True)
        return centred.addcmul_(self.normed, along, value=-1 / max(self.unknowns, 1))

    def traces(self) -> tuple[Tensor, bool]:
        n, shrink = self.unknowns, self.shrink.unsqueeze(-1)
        if n == 2:  # B = e/2 [[1, -1], [-1, 1]], which the difference below would lose
            rows = (shrink.square() / 2).expand_as(self.normed)
        else:
            rows = (1 - 1 / n - self.normed.square() * ((1 + shrink) / n)).clamp_min(0.0)
        per_system = (self.slopes.square() * rows).sum(-1)
        return per_system.reshape(-1, self.damping_group).sum(-1), True

    @property
    def direct_is_cheap(self) -> bool:
        return True

    @property
    def minimum_norm_is_cheap(self) -> bool:
        # Slopes below the cut take dense Jacobians, which have a limit.
        if self.unknowns <= EXACT_SIDE:
            return True
        size = self.slopes.abs()
        cut = (self.unknowns * self.cut_group * torch.finfo(size.dtype).eps) ** 0.5
        # J's largest singular value is at most the largest slope.
        return bool((size > cut * size.amax()).all())

    def largest_eigenvalue(self) -> Tensor:
        return self._doubled().largest().max().to(self.residual.dtype)

    def _doubled(self) -> rank_two.RankTwo:
        """In float64: undamped systems are as ill-conditioned as e makes them."""
        slopes = self.slopes.double().expand_as(self.normed)
        return rank_two.RankTwo(self.normed.double(), slopes, self.shrink.double())

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        if isinstance(damping, float) and damping == 0.0:
            return self._minimum_norm(rcond)
        shift = damping.unsqueeze(-1) if isinstance(damping, Tensor) else damping
        slopes = self.slopes.expand_as(self.normed)
        system = rank_two.RankTwo(self.normed, slopes, self.shrink)
        return Direct(system.solve(self.residual, shift))

    def _minimum_norm(self, rcond: float | None) -> Direct:
        """The regression where all slopes stand above the rank cut, else by dense SVD."""
        system, r = self._doubled(), self.residual.double()
        cut = self._cut(system, rcond)
        above = (system.slopes.abs() > cut.unsqueeze(-1)) & (cut > 0).unsqueeze(-1)
        lacking = above.any(-1) & ~above.all(-1)
        rank = torch.where(above.any(-1), system.count_above(cut.square()), 0)
        step = torch.where(above.all(-1).unsqueeze(-1), system.solve(r, 0.0), 0.0)
        # One direction, close to x, may fall below the cut although no slope does.
        short = (above.all(-1) & (rank == self.unknowns - 2)).nonzero().flatten()
        if short.numel():
            step[short] = system[short].solve_without_smallest(r[short], cut[short])
        for part in self._chunks(lacking.nonzero().flatten()):
            step[part], rank[part] = system[part].solve_dense(r[part], cut[part])
        return Direct(step.to(self.residual.dtype), rank=int(rank.sum()))

    def _cut(self, system: rank_two.RankTwo, rcond: float | None) -> Tensor:
        """Singular values that count as zero, per system; alike in one sample."""
        size = self.unknowns * self.cut_group
        eps = torch.finfo(self.residual.dtype).eps
        relative = (size * eps) ** 0.5 if rcond is None else rcond
        # 1 is in the null space exactly: no rounding may count it in.
        relative = max(relative, size * torch.finfo(torch.float64).eps)
        largest = system.largest().sqrt().reshape(-1, self.cut_group).amax(-1)
        return relative * largest.repeat_interleave(self.cut_group)

    def _chunks(self, systems: Tensor) -> tuple[Tensor, ...]:
        """Systems in runs whose Jacobians stay within DENSE_ENTRIES."""
        n = self.unknowns
        if systems.numel() and (n > DENSE_PASSES or n * n > DENSE_ENTRIES):
            raise ValueError(
                f"Cholesky: {self.label} has slopes below the rank cut, which at damping 0 takes "
                f"dense Jacobians, and those ({n} x {n}) are above the limit of {DENSE_ENTRIES} "
                f"entries or {DENSE_PASSES} a side; use CG(0.0), or a positive damping"
            )
        if not systems.numel():
            return ()
        parts: tuple[Tensor, ...] = torch.tensor_split(systems, _breaks(systems.numel(), n))
        return parts

    def with_residual(self, residual: Tensor) -> LayerNormInputs:
        return replace(self, residual=residual)


def _breaks(count: int, n: int) -> list[int]:
    """Where to cut ``count`` systems of n x n."""
    most = max(DENSE_ENTRIES // (n * n), 1)
    return list(range(most, count, most))
