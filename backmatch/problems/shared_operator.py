"""One linear map M for all samples, given by products: J_i = diag(slopes_i) M diag(columns_i).

The input problem of a convolution with elementwise modules around it. CG applies M; a direct solve
forms M once, below a size, and hands over to the scaled-Gram family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..linalg import _library
from .base import Direct, LeastSquares, Preconditioner, lanczos_largest
from .dense import DENSE_ENTRIES
from .scaled_gram import ScaledGram

#: CG steps that a direct solve may cost before ``Auto`` prefers CG, and flops always worth it.
CG_STEPS, SMALL = 60, 2e8
#: Flops of the singular value decompositions that ``Auto`` takes on at damping 0.
UNDAMPED_FLOPS = 1e12


@dataclass(frozen=True)
class SharedOperator(LeastSquares):
    """Systems that share a matrix-free M of shape (rows, size).

    Attributes:
        forward: M v for rows v: (count, size) -> (count, rows).
        reverse: M^T u for rows u: (count, rows) -> (count, size).
        squared, squared_reverse: the same two with every entry of M squared.
        size: n.
        flops: of one product with M.
        label: block and side, for messages.
        slopes: shape (systems, rows), ``None`` for ones.
        columns: shape (systems, n), ``None`` for ones.
    """

    forward: Callable[[Tensor], Tensor]
    reverse: Callable[[Tensor], Tensor]
    squared: Callable[[Tensor], Tensor]
    squared_reverse: Callable[[Tensor], Tensor]
    size: int
    flops: float
    residual: Tensor
    slopes: Tensor | None
    columns: Tensor | None
    label: str
    scale: float = 1.0
    structure: str = "sample"
    outside: Tensor | None = None
    separable = True
    #: M survives :meth:`with_residual`: one list shared by the copies.
    _matrix: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def unknowns(self) -> int:
        return self.size

    @property
    def rows(self) -> int:
        """Rows of M."""
        return self.residual.shape[1]

    def jvp(self, step: Tensor) -> Tensor:
        out = self.forward(step if self.columns is None else step * self.columns)
        return out if self.slopes is None else out * self.slopes

    def vjp(self, cotangent: Tensor) -> Tensor:
        out = self.reverse(cotangent if self.slopes is None else cotangent * self.slopes)
        return out if self.columns is None else out * self.columns

    def normal(self, step: Tensor) -> Tensor:
        out = self.forward(step if self.columns is None else step * self.columns)
        if self._squares is not None:
            out = out * self._squares
        back = self.reverse(out)
        return back if self.columns is None else back * self.columns

    @cached_property
    def _squares(self) -> Tensor | None:
        return None if self.slopes is None else self.slopes.square()

    def take(self, index: Tensor) -> SharedOperator:
        return replace(
            self,
            residual=self.residual[index],
            slopes=None if self.slopes is None else self.slopes[index],
            columns=None if self.columns is None else self.columns[index],
            outside=None if self.outside is None else self.outside[index],
        )

    def traces(self) -> tuple[Tensor, bool]:
        if self.columns is None:
            squares = self.squared(self.residual.new_ones(1, self.size))
        else:
            squares = self.squared(self.columns.square())
        if self.slopes is None:
            return squares.sum(-1), True
        return (squares * self.slopes.square()).sum(-1), True

    @property
    def _formable(self) -> bool:
        short = min(self.rows, self.size)
        bytes_each = self.residual.element_size()
        fits = 2 * short**2 * bytes_each <= _library.WORKSPACE_BYTES
        fits = fits and self.rows * self.size <= DENSE_ENTRIES
        if self.columns is not None:
            fits = fits and self.systems * self.rows * self.size <= DENSE_ENTRIES
        return fits

    @property
    def direct_is_cheap(self) -> bool:
        if not self._formable:
            return False
        short = min(self.rows, self.size)
        each = 1 if self.slopes is None and self.columns is None else self.systems
        primal = self.rows * self.size**2 + self.size**3 / 3
        cost = each * min(self.rows**3 / 3, primal) + self.rows * self.size * short
        return cost <= max(SMALL, 2 * CG_STEPS * self.flops * self.systems)

    @property
    def minimum_norm_is_cheap(self) -> bool:
        """Up to a minute or two of decompositions: undamped CG takes long and stops inexactly."""
        short, long = sorted((self.rows, self.size))
        each = 1 if self.slopes is None and self.columns is None else self.systems
        return self._formable and 20.0 * each * short**2 * long <= UNDAMPED_FLOPS

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        if not self._formable:
            raise ValueError(
                f"Cholesky: {self.label} would form a matrix of {self.rows} x {self.size} (at most "
                f"{DENSE_ENTRIES} entries) and one system of {min(self.rows, self.size)} per "
                "sample; use CG(damping) or Auto"
            )
        return self._explicit().direct(damping, rcond)

    def _explicit(self) -> ScaledGram:
        if not self._matrix:
            if self.rows <= self.size:
                self._matrix.append(self.reverse(_eye(self.rows, self.residual)))
            else:
                self._matrix.append(self.forward(_eye(self.size, self.residual)).t().contiguous())
        return ScaledGram(
            self._matrix[0],
            self.slopes,
            self.residual,
            self.scale,
            self.structure,
            columns=self.columns,
        )

    def largest_eigenvalue(self) -> Tensor:
        count = 1 if self.slopes is None and self.columns is None else self.systems
        like = self.residual.new_empty(count, self.size)
        return lanczos_largest(lambda step: self.vjp(self.jvp(step)), like)

    def diagonal(self) -> Tensor:
        weights = torch.ones_like(self.residual) if self.slopes is None else self.slopes.square()
        out = self.squared_reverse(weights)
        return out if self.columns is None else out * self.columns.square()

    def shared_preconditioner(self, damping: float | Tensor) -> Preconditioner:
        if not self._formable:
            raise ValueError(
                f'preconditioner="shared": {self.label} would form a matrix of {self.rows} x '
                f'{self.size}, which is too large; pass None or "jacobi"'
            )
        return self._explicit().shared_preconditioner(damping)

    def with_residual(self, residual: Tensor) -> SharedOperator:
        return replace(self, residual=residual)


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)
