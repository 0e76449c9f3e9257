"""Conjugate gradient on the scaled-Gram family: one product with K per step for all systems."""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor

from .. import checks
from ..errors import NotPositiveDefiniteError
from . import _cuda_cg
from ._failures import raise_failures
from ._fused_cg import Apply
from ._layout import damping_tensor, families, flat, require_damping
from ._library import DTYPE_NAMES, guarded, native, native_cuda
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
    B = R.expand(*lead, R.shape[-1]).unsqueeze(-1)
    tol, cap = stopping(B, rtol, max_steps)
    if not (callable(preconditioner) or preconditioner in (None, "shared")):
        raise ValueError(
            f"preconditioner must be None, 'shared' or a callable, got {preconditioner!r}"
        )
    if not callable(preconditioner) and B.numel() and _cuda_cg.has_kernel("scaled_gram_cg", K):
        result = _on_cuda(K, D, R, shift, lead, tol, cap, preconditioner)
        require_damping(shift)  # waits for the device, as the check of the result does
    else:
        require_damping(shift)
        result = _by_loop(K, D, B, shift, lead, tol, cap, preconditioner)
    x = guarded("scaled_gram_cg", result.x, K, D, R, shift)
    inputs = {"K": K, "D": D, "R": R}
    raise_failures("D K D + damping I", result.residual, None, full=inputs)
    return result._replace(x=x)


def _by_loop(
    K: Tensor,
    D: Tensor,
    B: Tensor,
    shift: Tensor,
    lead: Size,
    rtol: float,
    max_steps: int,
    preconditioner: str | Apply | None,
) -> CGResult:
    """The loop of :mod:`krylov` around one product for all systems; B (..., batch, n, 1)."""
    solve = _preconditioner(preconditioner, K, D, shift)
    inner = None if solve is None else lambda V: solve(V.squeeze(-1)).unsqueeze(-1)

    def restrict(index: Tensor) -> tuple[Apply, Apply | None]:
        some = flat(D, lead, 1)[index], flat(shift, lead, 0)[index]
        return _operator(K, *some), inner

    # Systems of several matrices stay together; a callable may know who is who.
    free = K.dim() == 2 and not callable(preconditioner)
    y, *status = conjugate_gradient(
        _operator(K, D.expand(B.shape[:-1]), shift.expand(lead)),
        B,
        rtol=rtol,
        max_steps=max_steps,
        preconditioner=inner,
        restrict=restrict if free and len(lead) == 1 else None,
    )
    return CGResult(D * y.squeeze(-1), *(value.squeeze(-1) for value in status))


@torch.no_grad()
def _on_cuda(
    K: Tensor,
    D: Tensor,
    R: Tensor,
    shift: Tensor,
    lead: Size,
    rtol: float,
    max_steps: int,
    preconditioner: str | None,
) -> CGResult:
    """The kernel that solves a system from start to end, one launch for each matrix."""
    n = R.shape[-1]
    result = CGResult(
        R.new_empty((*lead, n)),
        R.new_empty(lead, dtype=torch.int64),
        R.new_empty(lead),
        R.new_empty(lead, dtype=torch.bool),
    )
    matrices = math.prod(lead[:-1]) if K.dim() > 2 else 1
    inverses: list[Tensor | None] = [None] * matrices
    if preconditioner is not None:
        eye = torch.eye(n, dtype=K.dtype, device=K.device)
        factor = _shared_factor(K, D.expand(*lead, n), shift)
        inverses = list(torch.linalg.solve_triangular(factor, eye, upper=False).reshape(-1, n, n))
    if K.stride(-1) != 1:
        K = K.contiguous()  # neighbouring threads read along its last dimension
    status = ((value, 0) for value in result[1:])
    parts = families(K, lead, (D, 1), (R, 1), (shift, 0), (result.x, 1), *status)
    with torch.cuda.device(K.device):
        stream = torch.cuda.current_stream().cuda_stream
        for inverse, (*inputs, x, iterations, residual, converged) in zip(
            inverses, parts, strict=True
        ):
            factors = _factors(inverse)
            native_cuda().scaled_gram_cg(
                *(DTYPE_NAMES[K.dtype], *x.shape),
                *(number for value in inputs for number in (value.data_ptr(), *value.stride())),
                *(0 if value is None else value.data_ptr() for value in factors),
                *(rtol, max_steps, x.data_ptr(), iterations.data_ptr()),
                *(residual.data_ptr(), converged.data_ptr(), stream),
            )
    return result


def _factors(inverse: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """L^-T and L^-1, contiguous, from L^-1."""
    return (None, None) if inverse is None else (inverse.mT.contiguous(), inverse.contiguous())


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
    return _shared(K, D, damping) if D.numel() else None  # no systems have no mean


def _shared(K: Tensor, D: Tensor, damping: Tensor) -> Apply:
    """Solves with the family's matrix at its mean scaling."""
    factor = _shared_factor(K, D, damping)
    if K.dim() == 2:
        inverse = cholesky_inverse(factor)
        return lambda V: inverse(V.reshape(-1, V.shape[-1])).reshape(V.shape)
    return lambda V: torch.cholesky_solve(V.mT, factor).mT.reshape(V.shape)


def _shared_factor(K: Tensor, D: Tensor, damping: Tensor) -> Tensor:
    """Cholesky factor L of the family's matrix at its mean scaling."""
    scale = D.square()
    if D.dim() > 1:
        scale = scale.mean(-2) if K.dim() > 2 else scale.flatten(0, -2).mean(0)
    scale = scale.sqrt()
    A = scale.unsqueeze(-1) * K * scale.unsqueeze(-2)
    A.diagonal(dim1=-2, dim2=-1).add_(damping.mean())
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(A)
    if bool(info.any()):
        for name, value in (("K", K), ("D", D)):
            checks.finite(name, value)
        failed = info.flatten().nonzero().flatten()
        pivots = info.flatten()[failed].tolist()
        raise NotPositiveDefiniteError(
            "the shared preconditioner", failed.tolist(), pivots, info.numel()
        )
    return factor
