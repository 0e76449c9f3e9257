"""Conjugate gradient on the scaled-Gram family: one product with K per step for all systems."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..errors import NotPositiveDefiniteError
from ._failures import raise_failures
from ._fused_cg import Apply
from ._layout import damping_tensor, flat, require_damping
from ._library import DTYPE_NAMES, guarded, native
from ._normal import cholesky_inverse
from .dense_cg import stopping
from .krylov import CGResult, conjugate_gradient
from .scaled_gram import family_shape


def scaled_gram_cg(
    K: Tensor,
    D: Tensor,
    R: Tensor,
    *,
    damping: float | Tensor,
    rtol: float | None = None,
    max_steps: int | None = None,
    preconditioner: str | Apply | None = None,
) -> CGResult:
    """:func:`scaled_gram_solve` by conjugate gradient: ``x_j = D_j y_j``.

    A step costs ``((P * D) K) * D + damping P``: one matrix product for the whole batch. Stops as
    :func:`cg` does, on the residual of y.

    Args:
        K: shape (..., n, n), symmetric positive semi-definite, read in full.
        D: shape (..., batch, n).
        R: shape (..., batch, n).
        damping: a number >= 0, or a tensor of shape (..., batch).
        rtol: ``None`` means 1e-5 in float32, 1e-10 in float64; 0 takes ``max_steps`` steps.
        max_steps: cap per system; ``None`` means 10 n.
        preconditioner: ``"shared"`` factors the family's matrix at its mean scaling,
            (mean D^2)^(1/2) K (mean D^2)^(1/2) + (mean damping) I, once for all systems; a
            callable maps residuals (..., batch, n) to approximate y.

    Returns:
        :class:`CGResult` with x (..., batch, n) and iterations, residual, converged (..., batch).

    Raises:
        TypeError, ValueError: as :func:`scaled_gram_solve`.
        NonFiniteError: ``K``, ``D`` or ``R`` holds NaN or Inf, or the result does.
        NotPositiveDefiniteError: the matrix of the shared preconditioner.

    Example:
        >>> K = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> D = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> R = torch.tensor([[3.0, 8.0], [3.0, 13.0]])
        >>> scaled_gram_cg(K, D, R, damping=1.0, preconditioner="shared").x.round(decimals=4)
        tensor([[1., 2.],
                [0., 2.]])
    """
    for name, value in (("K", K), ("D", D), ("R", R)):
        checks.tensor(name, value)
    shift = damping_tensor(damping, K)
    lead = family_shape(K, D, R, shift)
    require_damping(shift)
    B = R.expand(*lead, R.shape[-1]).unsqueeze(-1)
    tol, cap = stopping(B, rtol, max_steps)

    solve = _preconditioner(preconditioner, K, D, shift)
    inner = None if solve is None else lambda V: solve(V.squeeze(-1)).unsqueeze(-1)

    def restrict(index: Tensor) -> tuple[Apply, Apply | None]:
        some = flat(D, lead, 1)[index], flat(shift, lead, 0)[index]
        return _operator(K, *some), inner

    # Systems of several matrices stay together; a callable may know who is who.
    free = K.dim() == 2 and not callable(preconditioner)
    y, iterations, residual, converged = conjugate_gradient(
        _operator(K, D.expand(B.shape[:-1]), shift.expand(lead)),
        B,
        rtol=tol,
        max_steps=cap,
        preconditioner=inner,
        restrict=restrict if free and len(lead) == 1 else None,
    )
    status = (value.squeeze(-1) for value in (iterations, residual, converged))
    x = guarded("scaled_gram_cg", D * y.squeeze(-1), K, D, R, shift)
    result = CGResult(x, *status)
    inputs = {"K": K, "D": D, "R": R}
    raise_failures("D K D + damping I", result.residual, None, full=inputs)
    return result


def _operator(K: Tensor, D: Tensor, damping: Tensor) -> Apply:
    """P -> (D K D + damping) P for all systems, P of shape (..., batch, n, 1)."""
    if K.is_cuda or K.dim() > 2 or D.dim() != 2:
        columns = damping.unsqueeze(-1)

        def composed(P: Tensor) -> Tensor:
            p = P.squeeze(-1)
            return (((p * D) @ K) * D + columns * p).unsqueeze(-1)

        return composed

    def fused(P: Tensor) -> Tensor:
        P = P.contiguous()
        Q = torch.empty_like(P)
        native().scaled_gram_product(
            *(DTYPE_NAMES[K.dtype], *D.shape, K.data_ptr(), *K.stride()),
            *(D.data_ptr(), *D.stride(), damping.data_ptr(), *damping.stride()),
            *(P.data_ptr(), Q.data_ptr()),
        )
        return Q

    return fused


def _preconditioner(
    choice: str | Apply | None, K: Tensor, D: Tensor, damping: Tensor
) -> Apply | None:
    if choice is None or callable(choice):
        return choice
    if choice != "shared":
        raise ValueError(f"preconditioner must be None, 'shared' or a callable, got {choice!r}")
    return _shared(K, D, damping) if D.numel() else None  # no systems have no mean


def _shared(K: Tensor, D: Tensor, damping: Tensor) -> Apply:
    """Cholesky of the family at its mean scaling."""
    scale = D.square()
    if D.dim() > 1:
        scale = scale.mean(-2) if K.dim() > 2 else scale.flatten(0, -2).mean(0)
    scale = scale.sqrt()
    A = scale.unsqueeze(-1) * K * scale.unsqueeze(-2)
    A.diagonal(dim1=-2, dim2=-1).add_(damping.mean())
    factor, info = torch.linalg.cholesky_ex(A)
    if bool(info.any()):
        for name, value in (("K", K), ("D", D)):
            checks.finite(name, value)
        failed = info.flatten().nonzero().flatten()
        pivots = info.flatten()[failed].tolist()
        raise NotPositiveDefiniteError(
            "the shared preconditioner", failed.tolist(), pivots, info.numel()
        )

    if K.dim() == 2:
        inverse = cholesky_inverse(factor)
        return lambda V: inverse(V.reshape(-1, V.shape[-1])).reshape(V.shape)
    return lambda V: torch.cholesky_solve(V.mT, factor).mT.reshape(V.shape)
