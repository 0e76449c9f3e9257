"""The normal equations of the least-squares problems that share one Z: products and residuals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._library import DTYPE_NAMES, native
from ._ridge_routes import call_family


def ridge_error(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, d: Tensor, group: int = 1
) -> float:
    """Worst ``|Z^T S (S Z d - r) + damping d| / |Z^T S r|``, S = diag(s_j).

    Absolute where ``Z^T S r = 0``.

    ``Z: (m, n), R and slopes: (batch, m), damping: () or (batch,), d: (batch, n)``, all on one
    device, none empty. Norms are taken over ``group`` systems in a row. NaN if d holds one.
    """
    if Z.is_cuda:
        error, size = (v.reshape(-1, group).sum(-1) for v in _composed(Z, R, slopes, damping, d))
        return float((error / size.masked_fill(size == 0, 1)).max().sqrt())
    squares = torch.empty(2 * R.shape[0], dtype=torch.float64)
    at = squares.data_ptr()
    tail = (d.data_ptr(), *d.stride(), at, at + 8 * R.shape[0], group)
    worst: float = call_family(native().ridge_error, Z, slopes, R, damping, *tail)
    return worst


def _composed(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    missing, wanted = R - d @ Z.mT, R
    if slopes is not None:
        missing, wanted = slopes * (R - slopes * (d @ Z.mT)), slopes * R
    error = torch.addmm(damping.unsqueeze(-1) * d, missing, Z, alpha=-1)
    return _squared_norm(error), _squared_norm(wanted @ Z)


def _squared_norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norm.square()


def ridge_normal(Z: Tensor, w: Tensor, step: Tensor) -> Tensor:
    """``Z^T (w_j * Z p)`` of every system, on the CPU.

    ``Z: (m, n), w: (batch, m), step: (batch, n)``, none empty.
    """
    P = step.contiguous()
    Q = torch.empty_like(P)
    native().ridge_normal(
        *(DTYPE_NAMES[Z.dtype], w.shape[0], *Z.shape, Z.data_ptr(), *Z.stride()),
        *(w.data_ptr(), *w.stride(), P.data_ptr(), Q.data_ptr()),
    )
    return Q


def cholesky_inverse(factor: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows ``v -> (L L^T)^-1 v`` by products with L^-1, for preconditioners.

    Products run at many times the speed of two triangular solves, and L^-T L^-1 stays positive
    definite where an explicit inverse might not.

    Args:
        factor: L of shape (n, n), lower triangular.

    Returns:
        A function of rows (batch, n).
    """
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)

    def apply(rows: Tensor) -> Tensor:
        if rows.is_cuda or not rows.numel():
            out: Tensor = (rows @ inverse.mT) @ inverse
            return out
        return ridge_normal(inverse, rows.new_ones(()).expand(rows.shape), rows)

    return apply
