"""Batched Cholesky by torch's library: where our own kernels end, decided by n and dtype alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._library import in_chunks


def solve_by_library(A: Tensor, B: Tensor, damping: Tensor, X: Tensor, info: Tensor) -> None:
    """``(A + damping I) X = B`` with the meaning of :func:`spd_solve_ex`.

    Nothing here looks at the device; older builds of torch solve batches by MAGMA, which may wait
    for it. Factors copies of the lower triangles, in chunks within the workspace budget. A failed
    system is all NaN in ``X``, its neighbours are not touched by it.

    Args:
        A: shape (batch, n, n), any strides; only the lower triangles are read.
        B: shape (batch, n, k).
        damping: shape (batch,).
        X: shape (batch, n, k), written.
        info: shape (batch,), int32, written.
    """
    batch, n, k = B.shape

    def work(part: slice) -> None:
        shifted = A[part].tril()
        shifted.diagonal(dim1=-2, dim2=-1).add_(damping[part].unsqueeze(-1))
        factor, status = torch.linalg.cholesky_ex(shifted)
        del shifted
        status = first_bad_pivot(factor, status)
        if k:  # libraries differ in whether they take no right-hand sides
            solution = torch.cholesky_solve(B[part], factor)
            X[part] = torch.where((status == 0)[:, None, None], solution, math.nan)
        info[part] = status

    # The copy, the factor and the library's own copy of it; right-hand sides likewise.
    in_chunks(batch, A.element_size() * 3 * n * (n + k), work)


def first_bad_pivot(factor: Tensor, info: Tensor) -> Tensor:
    """LAPACK libraries differ in whether they report NaN and infinite pivots; here they count.

    ``factor: (..., n, n), info: (...)``, both as ``torch.linalg.cholesky_ex`` returns them.
    """
    bad = ~torch.isfinite(factor.diagonal(dim1=-2, dim2=-1))
    first = (bad.int().argmax(-1) + 1).to(info.dtype)
    return torch.where(bad.any(-1) & ((info == 0) | (first < info)), first, info)
