"""Minimum-norm solution of positive semi-definite systems, rank revealed by eigenvalues."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from .. import checks
from ._layout import broadcast, flat
from ._library import define, in_chunks, not_differentiable

#: Floor of n in the default cut n * eps: a product J^T J is rounded even where n is small.
SMALLEST_N = 32


def min_norm_solve(A: Tensor, B: Tensor, *, rcond: float | None = None) -> Tensor:
    """``pinv(A) B`` for symmetric positive semi-definite ``A``, of any rank.

    Eigenvalues up to a cut count as zero, so every X is the shortest of the least-squares
    solutions. The decomposition runs in float64 also for float32, where the cut is float32's.
    Only the lower triangle of ``A`` is read.

    Args:
        A: shape (..., n, n); typically J^T J or J J^T.
        B: shape (..., n, k); leading dimensions broadcast with those of ``A``.
        rcond: eigenvalues <= rcond * (largest eigenvalue of that matrix) count as zero.
            ``None`` means max(n, 32) * eps of the dtype, that is (about) sqrt(n * eps) on the
            singular values of J. Rule derived here.

    Returns:
        X of shape (..., n, k). A = 0 gives X = 0.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape, device or rcond, or an eigenvalue that is negative beyond rounding.
        NonFiniteError: ``A`` or ``B`` holds NaN or Inf.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # the matrix of ones, lower triangle
        >>> min_norm_solve(A, torch.tensor([[2.0], [2.0]])).ravel().round(decimals=4)
        tensor([1., 1.])
    """
    checks.tensor("A", A)
    checks.tensor("B", B)
    X: Tensor = _op(A, B, None if rcond is None else checks.non_negative("rcond", rcond))
    return X


def pinv_solve(A: Tensor, B: Tensor, rcond: float | None, name: str = "A") -> Tensor:
    """:func:`min_norm_solve` for shapes (b, n, n) and (batch, n, k) with b = batch or 1."""
    n, eps = A.shape[-1], torch.finfo(A.dtype).eps
    values, vectors = torch.linalg.eigh(A.double())
    largest = values[..., -1:].clamp_min(0)
    rounding = max(n, SMALLEST_N) * eps
    _require_semidefinite(name, values, 10 * max(rounding, rcond or 0.0))
    kept = values > (rounding if rcond is None else rcond) * largest
    inverse = torch.where(kept, values.reciprocal(), 0)
    X = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ B.double()))
    result: Tensor = X.to(B.dtype)
    return result


def _require_semidefinite(name: str, values: Tensor, tolerance: float) -> None:
    smallest = values[..., 0]
    bad = (smallest < -tolerance * values.abs().amax(-1)).nonzero().flatten()
    if bad.numel():
        index = int(bad[0])
        raise ValueError(
            f"{name} must be positive semi-definite, "
            f"got the eigenvalue {float(smallest[index]):.3g} at batch index {index}"
        )


def _lead(A: Tensor, B: Tensor) -> Size:
    checks.same("B", B, "A", A)
    checks.shape("B", B, (checks.square("A", A), "k"))
    return broadcast(A=A.shape[:-2], B=B.shape[:-2])


def _solve(A: Tensor, B: Tensor, rcond: float | None = None) -> Tensor:
    lead = _lead(A, B)
    checks.finite("A", A.tril())
    checks.finite("B", B)
    X = B.new_empty((*lead, *B.shape[-2:]))
    A3, B3, X3 = flat(A, lead, 2), flat(B, lead, 2), flat(X, lead, 2)
    batch, n, k = X3.shape
    if n == 0 or batch == 0:
        return X
    if A3.stride(0) == 0:  # one matrix for all: decompose it once
        columns = B3.movedim(0, -1).reshape(1, n, k * batch)
        X3.copy_(pinv_solve(A3[:1], columns, rcond).view(n, k, batch).movedim(-1, 0))
        return X

    def work(part: slice) -> None:
        X3[part] = pinv_solve(A3[part], B3[part], rcond)

    in_chunks(batch, 8 * n * (4 * n + 3 * k), work)
    return X


def _fake(A: Tensor, B: Tensor, rcond: float | None = None) -> Tensor:
    return B.new_empty((*_lead(A, B), *B.shape[-2:]))


_op = define(
    "min_norm_solve(Tensor A, Tensor B, float? rcond=None) -> Tensor",
    cpu=_solve,
    cuda=_solve,
    fake=_fake,
    backward=not_differentiable("min_norm_solve"),
)
