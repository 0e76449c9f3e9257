"""The routes of :mod:`ridge` for one matrix Z (m, n); derived here.

- :func:`shared`, no slopes: one Cholesky factor of the smaller of Z^T Z and Z Z^T;
- :func:`complement`: the same solution for 0/1 slopes, by way of the rows that are not active;
- :func:`dual`: d = Z^T x, x = S y, (S K S + damping I) y = r with one K = Z Z^T;
- :func:`primal`: (Z^T S^2 Z + damping I) d = Z^T S r;
- :func:`minimum_norm`, damping 0: singular values of S Z, cut relative to the largest.

S = diag(s_j). All return d (batch, n) and info (batch,); a failed system's d is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._library import DTYPE_NAMES, in_chunks, launch, native, native_cuda
from .scaled_gram import solve_family
from .spd import KERNEL_SIDE, solve_shared, solve_systems
from .weighted_gram import by_rows, weighted_gram_unchecked


def shared(Z: Tensor, R: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Many right-hand sides, one damping: ``Z: (m, n), R: (batch, m)``."""
    m, n = Z.shape
    if not Z.is_cuda and min(m, n) <= KERNEL_SIDE:
        return _solved(native().ridge_shared, Z, R, None, damping, rows=2)
    wide = n > m
    A = Z @ Z.mT if wide else Z.mT @ Z
    solution, info = solve_shared(A, R.mT if wide else (R @ Z).mT, damping)
    return solution.mT @ Z if wide else solution.mT, info.expand(R.shape[0])


def dual(Z: Tensor, R: Tensor, slopes: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``Z: (m, n), R and slopes: (batch, m), damping: () or (batch,)``."""
    if Z.is_cuda:
        x, info = solve_family(Z @ Z.mT, slopes, R, damping)
        return x @ Z, info
    return _solved(native().ridge_dual, Z, R, slopes, damping, rows=1)


def complement(Z: Tensor, R: Tensor, slopes: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`dual` for slopes that are mostly 0 or 1 and ``damping: ()``; float32 on the CPU."""
    return _solved(native().ridge_complement, Z, R, slopes, damping, rows=9)


def _solved(
    kernel: Any, Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """``rows``: arrays like R that the kernel takes as scratch."""
    d = torch.empty(R.shape[0], Z.shape[1], dtype=R.dtype)
    info = torch.empty(R.shape[0], dtype=torch.int32)

    def work(part: slice) -> None:
        shift = damping[part] if damping.dim() else damping
        tail = (d[part].data_ptr(), info[part].data_ptr())
        weights = None if slopes is None else slopes[part]
        call_family(kernel, Z, weights, R[part], shift, *tail)

    in_chunks(R.shape[0], rows * R.shape[1] * R.element_size(), work)
    return d, info


def call_family(
    kernel: Any, Z: Tensor, slopes: Tensor | None, R: Tensor, damping: Tensor, *tail: int
) -> Any:
    """A native kernel on arguments shaped as for :func:`dual`; no slopes are a null pointer."""
    return kernel(
        *(DTYPE_NAMES[Z.dtype], *R.shape, Z.shape[1]),
        *(Z.data_ptr(), *Z.stride()),
        *((0, 0, 0) if slopes is None else (slopes.data_ptr(), *slopes.stride())),
        *(R.data_ptr(), *R.stride()),
        *(damping.data_ptr(), damping.stride(0) if damping.dim() else 0, *tail),
    )


def primal(Z: Tensor, R: Tensor, slopes: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Same arguments.

    On CUDA one kernel forms and solves each system on chip where it fits; otherwise the Gram
    matrices are formed chunk by chunk within the memory budget.
    """
    batch, n = R.shape[0], Z.shape[1]
    if Z.is_cuda:
        with torch.cuda.device(Z.device):
            fits = native_cuda().ridge_primal_fits(DTYPE_NAMES[Z.dtype], n)
        if fits:
            return primal_on_chip(by_rows(Z), R, slopes, damping)
    w = slopes.square()
    # A row that is off counts for nothing, whatever R holds there: as in the other routes.
    B = ((slopes * R).masked_fill(slopes == 0, 0) @ Z).unsqueeze(-1)
    d, info = torch.empty_like(B), B.new_empty(batch, dtype=torch.int32)

    def work(part: slice) -> None:
        G = weighted_gram_unchecked(Z, w[part])
        shift = damping[part] if damping.dim() else damping
        d[part], info[part] = solve_systems(G, B[part], shift)

    in_chunks(batch, Z.element_size() * n * n, work)
    return d.squeeze(-1), info


def primal_on_chip(Z: Tensor, R: Tensor, slopes: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`primal` on CUDA, for orders that the kernel takes."""
    batch, n = R.shape[0], Z.shape[1]
    kernel = native_cuda().ridge_primal
    d, info = R.new_empty(batch, n), R.new_empty(batch, dtype=torch.int32)

    def enqueue(part: slice, workspace: int, stream: int) -> None:
        shift = damping[part] if damping.dim() else damping
        tail = (d[part].data_ptr(), info[part].data_ptr(), stream)
        call_family(kernel, Z, slopes[part], R[part], shift, *tail)

    launch(Z.device, batch, lambda size: 0, enqueue)
    return d, info


def minimum_norm(
    Z: Tensor, R: Tensor, slopes: Tensor | None, rcond: float | None, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``pinv(S Z) r`` and the ranks; ``group`` systems in a row share one largest value."""
    batch, (m, n) = R.shape[0], Z.shape
    cut = math.sqrt(max(m, n) * torch.finfo(Z.dtype).eps) if rcond is None else rcond
    if slopes is None:
        U, inverse, Vh, rank, info = _pinv(Z.unsqueeze(0), cut, 1)
        d = ((R @ U[0]) * inverse) @ Vh[0]
        return d, info.expand(batch).contiguous(), rank.expand(batch).contiguous()
    d = R.new_empty(batch, n)
    info, rank = R.new_empty(batch, dtype=torch.int32), R.new_empty(batch, dtype=torch.int64)

    def work(part: slice) -> None:
        J = slopes[part].unsqueeze(-1) * Z
        U, inverse, Vh, rank[part], info[part] = _pinv(J, cut, group)
        c = (R[part].unsqueeze(-2) @ U) * inverse.unsqueeze(-2)
        d[part] = (c @ Vh).squeeze(-2)

    short = min(m, n)
    in_chunks(batch, Z.element_size() * (3 * m * n + 2 * short * (short + m + n)), work, group)
    return d, info, rank


def _pinv(J: Tensor, cut: float, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Factors U, 1/sigma (0 below the cut, NaN for a J that is not finite), V^T, rank, info."""
    bad = ~torch.isfinite(J).flatten(1).all(-1)
    U, sigma, Vh = torch.linalg.svd(torch.where(bad[:, None, None], 0, J), full_matrices=False)
    largest = sigma[:, 0].view(-1, group).amax(-1).repeat_interleave(group).unsqueeze(-1)
    kept = sigma > cut * largest
    inverse = torch.where(kept, sigma.reciprocal(), 0)
    inverse = torch.where(bad.unsqueeze(-1), math.nan, inverse)
    return U, inverse, Vh, kept.sum(-1), bad.int()
