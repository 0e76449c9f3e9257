"""The scaled-Gram family: J_s = diag(slopes_s) M diag(columns_s) with ONE matrix M.

The weight problem of a Linear layer with an elementwise activation (M = [z 1], one system per
output unit) and its input problem (M = W, one system per sample and position) both have this
form; without an activation the slopes are ones and one factorisation serves all systems.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..linalg._normal import cholesky_inverse, ridge_error, ridge_normal
from ..linalg.ridge import damped, ridge_ex
from .base import Direct, LeastSquares, Preconditioner, lanczos_largest, mean_factor
from .dense import DENSE_ENTRIES, DenseBatch


@dataclass(frozen=True)
class ScaledGram(LeastSquares):
    """Systems that share a matrix.

    Attributes:
        matrix: M, shape (rows, n).
        slopes: shape (systems, rows), ``None`` for ones.
        columns: shape (systems, n), ``None`` for ones: slopes of what stands before the layer.
    """

    matrix: Tensor
    slopes: Tensor | None
    residual: Tensor
    scale: float
    structure: str
    damping_group: int = 1
    cut_group: int = 1
    columns: Tensor | None = None
    separable = True

    @property
    def unknowns(self) -> int:
        return self.matrix.shape[1]

    def jvp(self, step: Tensor) -> Tensor:
        out = (step if self.columns is None else step * self.columns) @ self.matrix.t()
        return out if self.slopes is None else out * self.slopes

    def vjp(self, cotangent: Tensor) -> Tensor:
        out = (cotangent if self.slopes is None else cotangent * self.slopes) @ self.matrix
        return out if self.columns is None else out * self.columns

    def normal(self, step: Tensor) -> Tensor:
        if self.columns is not None or not step.numel():
            return super().normal(step)
        if step.is_cuda:
            return ((step @ self.matrix.t()) * self._weights) @ self.matrix
        return ridge_normal(self.matrix, self._weights, step)

    @cached_property
    def _weights(self) -> Tensor:
        """scale S^2, shape (systems, rows)."""
        if self.slopes is None:
            return self.residual.new_tensor(self.scale).expand(self.residual.shape)
        return (self.scale * self.slopes.square()).contiguous()

    def relative_residual(self, step: Tensor, damping: float | Tensor) -> float:
        if self.columns is not None or not step.numel():
            return super().relative_residual(step, damping)
        shift = damping if isinstance(damping, Tensor) else step.new_tensor(damping)
        family = (self.matrix, self.residual, self.slopes)
        return ridge_error(*family, shift, step, self.cut_group)

    def traces(self) -> tuple[Tensor, bool]:
        if self.columns is not None:
            rows = self.columns.square() @ self.matrix.square().t()
            per_system = (rows if self.slopes is None else rows * self.slopes.square()).sum(-1)
        elif self.slopes is None:
            return self.matrix.square().sum().mul(self.damping_group).reshape(1), True
        else:
            per_system = self.slopes.square() @ torch.linalg.vecdot(self.matrix, self.matrix)
        if self.damping_group == 1:
            return per_system, True
        return per_system.reshape(-1, self.damping_group).sum(-1), True

    @property
    def direct_is_cheap(self) -> bool:
        return self.columns is None or self._entries <= DENSE_ENTRIES

    @property
    def _entries(self) -> int:
        return self.systems * self.matrix.numel()

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        if self.columns is not None:
            if self._entries > DENSE_ENTRIES:
                raise ValueError(
                    "Cholesky: a Linear behind an activation in one block shares no matrix, and "
                    f"its {self.systems} dense Jacobians are above the limit of {DENSE_ENTRIES} "
                    "entries; use CG(damping) or Auto, or start a new block at the Linear"
                )
            return self._dense().direct(damping, rcond)
        if isinstance(damping, Tensor) or damping > 0:
            return Direct(*damped(self.matrix, self.residual, self.slopes, damping))
        step, info, rank = ridge_ex(
            self.matrix,
            self.residual,
            slopes=self.slopes,
            damping=damping,
            rcond=rcond,
            group=self.cut_group,
        )
        return Direct(step, info, None if rank is None else int(rank.sum()))

    def largest_eigenvalue(self) -> Tensor:
        if self.slopes is None and self.columns is None:
            norm: Tensor = torch.linalg.matrix_norm(self.matrix, ord=2)
            return norm.square()
        like = self.residual.new_empty(self.systems, self.unknowns)
        return lanczos_largest(lambda step: self.vjp(self.jvp(step)), like)

    def diagonal(self) -> Tensor:
        if self.slopes is None:
            out = self.matrix.square().sum(0).expand(self.systems, -1)
        else:
            out = self.slopes.square() @ self.matrix.square()
        return out if self.columns is None else out * self.columns.square()

    def take(self, index: Tensor) -> ScaledGram:
        return replace(
            self,
            slopes=None if self.slopes is None else self.slopes[index],
            residual=self.residual[index],
            columns=None if self.columns is None else self.columns[index],
        )

    def with_residual(self, residual: Tensor) -> ScaledGram:
        return replace(self, residual=residual)

    def shared_preconditioner(self, damping: float | Tensor) -> Preconditioner:
        weights = self.scale * self.residual.new_ones(self.matrix.shape[0])
        if self.slopes is not None:
            weights = weights * self.slopes.square().mean(0)
        gram = (self.matrix * weights.unsqueeze(-1)).t() @ self.matrix
        if self.columns is not None:
            mean = self.columns.square().mean(0).sqrt()
            gram = gram * mean * mean.unsqueeze(-1)
        mean_damping = damping.mean() if isinstance(damping, Tensor) else damping
        gram.diagonal().add_(mean_damping)
        return cholesky_inverse(mean_factor(gram))

    def _dense(self) -> DenseBatch:
        """Row and column scalings leave nothing shared: form the Jacobians."""
        jacobian = self.matrix.expand(self.systems, -1, -1)
        if self.slopes is not None:
            jacobian = jacobian * self.slopes.unsqueeze(-1)
        if self.columns is not None:
            jacobian = jacobian * self.columns.unsqueeze(-2)
        return DenseBatch(
            jacobian,
            self.residual,
            self.scale,
            self.structure,
            self.damping_group,
            self.cut_group,
        )
