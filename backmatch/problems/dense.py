"""A batch of dense Jacobians, solved in primal or dual form, whichever is smaller."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg import spd_solve_ex
from .base import Direct, LeastSquares

#: Entries of an explicit Jacobian, over all systems, up to which one is formed.
DENSE_ENTRIES = 2**25


@dataclass(frozen=True)
class DenseBatch(LeastSquares):
    """Systems with their own Jacobian, ``jacobian`` of shape (systems, rows, n)."""

    jacobian: Tensor
    residual: Tensor
    scale: float
    structure: str
    damping_group: int = 1
    cut_group: int = 1

    @property
    def unknowns(self) -> int:
        return self.jacobian.shape[2]

    def jvp(self, step: Tensor) -> Tensor:
        return torch.einsum("spn,sn->sp", self.jacobian, step)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return torch.einsum("spn,sp->sn", self.jacobian, cotangent)

    def traces(self) -> tuple[Tensor, bool]:
        squares = self.jacobian.square().sum((1, 2))
        return squares.reshape(-1, self.damping_group).sum(-1), True

    @property
    def direct_is_cheap(self) -> bool:
        return True

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        J, r = self.jacobian, self.residual
        rows, n = J.shape[1:]
        if J.numel() == 0:
            return Direct(r.new_zeros(self.systems, n), rank=0)
        if isinstance(damping, float) and damping == 0.0:
            return self._minimum_norm(rcond)
        if rows < n:
            dual, info = spd_solve_ex(J @ J.mT, r.unsqueeze(-1), damping=damping)
            return Direct((J.mT @ dual).squeeze(-1), info)
        primal, info = spd_solve_ex(J.mT @ J, J.mT @ r.unsqueeze(-1), damping=damping)
        return Direct(primal.squeeze(-1), info)

    def _minimum_norm(self, rcond: float | None) -> Direct:
        """pinv(J) r through the singular values of J itself, not of J^T J.

        Squaring would put the cut sqrt(n eps) right onto the rounding noise of the Gram matrix.
        """
        rows, n = self.jacobian.shape[1:]
        U, S, Vh = torch.linalg.svd(self.jacobian, full_matrices=False)
        eps = torch.finfo(S.dtype).eps
        size = max(rows, n * self.cut_group)
        relative = (size * eps) ** 0.5 if rcond is None else rcond
        largest = S[:, 0].reshape(-1, self.cut_group).amax(-1).repeat_interleave(self.cut_group)
        kept = (relative * largest).unsqueeze(-1) < S
        inverse = torch.where(kept, S.reciprocal(), torch.zeros_like(S))
        coefficients = torch.einsum("spk,sp->sk", U, self.residual) * inverse
        step = torch.einsum("skn,sk->sn", Vh, coefficients)
        return Direct(step, rank=int(kept.sum()))

    def diagonal(self) -> Tensor:
        return self.jacobian.square().sum(1)

    def largest_eigenvalue(self) -> Tensor:
        if self.jacobian.numel() == 0:
            return self.residual.new_zeros(())
        norm: Tensor = torch.linalg.matrix_norm(self.jacobian, ord=2).max()
        return norm.square()

    def with_residual(self, residual: Tensor) -> DenseBatch:
        return replace(self, residual=residual)
