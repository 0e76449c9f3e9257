"""Systems that share one Gram matrix and differ in a diagonal scaling: D K D + damping I."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from .. import checks
from ._by_library import solve_by_library
from ._failures import raise_failures
from ._layout import damping_tensor, families, family_lead, require_damping
from ._library import (
    DTYPE_NAMES,
    define,
    in_chunks,
    launch,
    native,
    native_cuda,
    not_differentiable,
    refuse_forward_mode,
    unobserved,
)
from .min_norm import pinv_solve

#: Order up to which CUDA solves by our kernel; above it the matrices are formed in chunks and go to
#: the library. Far above :data:`.spd.CUDA_KERNEL_SIDE`: the kernel drops inactive rows first, so a
#: system with half its rows active costs it an eighth. Estimated, not measured.
CUDA_KERNEL_SIDE = 4096


def scaled_gram_solve(K: Tensor, D: Tensor, R: Tensor, *, damping: float | Tensor) -> Tensor:
    """``x_j = D_j y_j`` with ``(D_j K D_j + damping_j I) y_j = R_j``, ``D_j = diag(D[j])``.

    With K = Z Z^T this is the dual of the least-squares problem of :func:`ridge`, whose solution
    is Z^T x_j. K is read once for all systems, no scaled copy of it is formed in memory
    (on CUDA above order 4096 they are, for the library, in chunks within the workspace budget).
    Entries with D = 0 drop out: their x is exactly 0 and they cost nothing. Systems with damping 0
    get the minimum-norm answer ``D_j pinv(D_j K D_j) R_j``, with the cut of :func:`min_norm_solve`.
    Only the lower triangle of K is read.

    Args:
        K: shape (..., n, n), symmetric positive semi-definite.
        D: shape (..., batch, n).
        R: shape (..., batch, n); leading dimensions broadcast with those of ``D``.
        damping: a number >= 0, or a tensor of shape (..., batch).

    Returns:
        x of shape (..., batch, n).

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape or device, or damping negative, NaN or infinite.
        NonFiniteError: ``K``, ``D`` or ``R`` holds NaN or Inf, or the result overflowed.
        NotPositiveDefiniteError: a damped matrix is not positive definite.
        MissingExtensionError: the compiled module is not there.

    Example:
        >>> K = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> D = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> R = torch.tensor([[3.0, 8.0], [3.0, 13.0]])
        >>> scaled_gram_solve(K, D, R, damping=1.0).round(decimals=4)
        tensor([[1., 2.],
                [0., 2.]])
    """
    for name, value in (("K", K), ("D", D), ("R", R)):
        checks.tensor(name, value)
    return _entry(K, D, R, damping_tensor(damping, K), True)[0]


def scaled_gram_solve_ex(
    K: Tensor, D: Tensor, R: Tensor, *, damping: float | Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_gram_solve` that reports failures instead of raising, never synchronises.

    Above order 4096 on CUDA that takes a torch whose batched ``cholesky_solve`` does not wait.

    Damping 0 is not special here: a singular system fails. The values of a damping tensor are not
    checked.

    Returns:
        x of shape (..., batch, n) and ``info`` of shape (..., batch), int32, with the meaning of
        :func:`spd_solve_ex`; pivots count the rows of K. A failed system's x is all NaN.

    Example:
        >>> x, info = scaled_gram_solve_ex(
        ...     -torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2, 2), damping=0.5
        ... )
        >>> info
        tensor([2, 0], dtype=torch.int32)
    """
    for name, value in (("K", K), ("D", D), ("R", R)):
        checks.tensor(name, value)
    return _entry(K, D, R, damping_tensor(damping, K), False)


def _entry(K: Tensor, D: Tensor, R: Tensor, damping: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    refuse_forward_mode(K, D, R, damping)
    X, info = (_solve if unobserved(K, D, R, damping) else _op)(K, D, R, damping, check)
    return X, info


def family_shape(K: Tensor, D: Tensor, R: Tensor, damping: Tensor) -> Size:
    """Check the four against each other; return the leading shape of the systems."""
    for name, value in (("D", D), ("R", R), ("damping", damping)):
        checks.same(name, value, "K", K)
    n = checks.square("K", K)
    tail: tuple[int | str, ...] = (n,) if K.dim() == 2 else ("batch", n)
    checks.shape("D", D, tail)
    checks.shape("R", R, tail)
    return family_lead("K", K, D=D.shape[:-1], R=R.shape[:-1], damping=damping.shape)


def _solve(
    K: Tensor, D: Tensor, R: Tensor, damping: Tensor, check: bool = False
) -> tuple[Tensor, Tensor]:
    lead = family_shape(K, D, R, damping)
    if check:
        require_damping(damping)
    X, info = _allocate(R, lead)
    if X.numel() == 0:
        info.zero_()
    else:
        for part in families(K, lead, (D, 1), (R, 1), (damping, 0), (X, 1), (info, 0)):
            _run(*part)
    return _checked(K, D, R, damping, X, info, check)


def solve_family(K: Tensor, D: Tensor, R: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`scaled_gram_solve_ex` past the checks and the dispatcher, for arguments that fit.

    ``K: (n, n), D and R: (batch, n), damping: () or (batch,)``, none of them empty.
    """
    X, info = _allocate(R, R.shape[:1])
    _run(K, D, R, damping.expand(R.shape[0]), X, info)
    return X, info


def _run(K: Tensor, D: Tensor, R: Tensor, damping: Tensor, X: Tensor, info: Tensor) -> None:
    """The kernel of K's device, on one family."""
    if K.is_cuda:
        _run_on_cuda(K, D, R, damping, X, info)
    else:
        _call(native().scaled_gram_solve, K, D, R, damping, X, info)


def _run_on_cuda(K: Tensor, D: Tensor, R: Tensor, damping: Tensor, X: Tensor, info: Tensor) -> None:
    """The kernel up to :data:`CUDA_KERNEL_SIDE`, the library above it."""
    if K.shape[-1] > CUDA_KERNEL_SIDE:
        _solve_by_library(K, D, R, damping, X, info)
        return
    kernels, dtype, (batch, n) = native_cuda(), DTYPE_NAMES[K.dtype], R.shape

    def enqueue(part: slice, workspace: int, stream: int) -> None:
        systems = (D[part], R[part], damping[part], X[part], info[part])
        _call(kernels.scaled_gram_solve, K, *systems, workspace, stream)

    launch(K.device, batch, lambda b: kernels.scaled_gram_solve_workspace(dtype, b, n), enqueue)


def _solve_by_library(
    K: Tensor, D: Tensor, R: Tensor, damping: Tensor, X: Tensor, info: Tensor
) -> None:
    """Forms the matrices, in chunks; inactive rows become the identity's, whatever K holds."""

    def work(part: slice) -> None:
        d = D[part]
        active = d != 0  # true for NaN, which then fails as a pivot
        both = active.unsqueeze(-1) & active.unsqueeze(-2)
        A = torch.where(both, d.unsqueeze(-1) * K * d.unsqueeze(-2), 0.0)
        shift = torch.where(active, damping[part].unsqueeze(-1), 1.0)
        A.diagonal(dim1=-2, dim2=-1).add_(shift)
        r = torch.where(active, R[part], 0.0).unsqueeze(-1)
        y = torch.empty_like(r)
        solve_by_library(A, r, damping.new_zeros(()).expand(len(d)), y, info[part])
        failed = (info[part] != 0).unsqueeze(-1)
        x = torch.where(active, d * y.squeeze(-1), 0.0)
        X[part] = x.masked_fill_(failed, math.nan)

    batch, n = D.shape
    in_chunks(batch, K.element_size() * 4 * n * (n + 2), work)


def _call(
    kernel: Any,
    K: Tensor,
    D: Tensor,
    R: Tensor,
    damping: Tensor,
    X: Tensor,
    info: Tensor,
    *tail: int,
) -> None:
    kernel(
        *(DTYPE_NAMES[K.dtype], *R.shape),
        *(K.data_ptr(), *K.stride()),
        *(D.data_ptr(), *D.stride()),
        *(R.data_ptr(), *R.stride()),
        *(damping.data_ptr(), *damping.stride()),
        *(X.data_ptr(), info.data_ptr(), *tail),
    )


def _allocate(R: Tensor, lead: Size) -> tuple[Tensor, Tensor]:
    X = R.new_empty((*lead, R.shape[-1]))
    return X, R.new_empty(lead, dtype=torch.int32)


def _checked(
    K: Tensor, D: Tensor, R: Tensor, damping: Tensor, X: Tensor, info: Tensor, check: bool
) -> tuple[Tensor, Tensor]:
    if check:
        lead = info.shape
        if bool((damping == 0).any()):
            for part in families(K, lead, (D, 1), (R, 1), (damping, 0), (X, 1), (info, 0)):
                _minimum_norm(*part)
        what = "D K D + damping I"
        raise_failures(what, X, info, lower={"K": K}, full={"D": D, "R": R})
    return X, info


def _minimum_norm(
    K: Tensor, D: Tensor, R: Tensor, damping: Tensor, X: Tensor, info: Tensor
) -> None:
    """Replace the results of the undamped systems, whose Cholesky factor means nothing."""
    undamped = (damping == 0).nonzero().flatten()
    n = K.shape[-1]
    checks.finite("K", K.tril())
    checks.finite("D", D)
    checks.finite("R", R)

    def work(part: slice) -> None:
        j = undamped[part]
        d = D[j]
        scaled = d.unsqueeze(-1) * K * d.unsqueeze(-2)
        X[j] = d * pinv_solve(scaled, R[j].unsqueeze(-1), None, name="D K D").squeeze(-1)
        info[j] = 0

    if n:
        in_chunks(undamped.numel(), 8 * n * (5 * n + 3), work)


def _fake(
    K: Tensor, D: Tensor, R: Tensor, damping: Tensor, check: bool = False
) -> tuple[Tensor, Tensor]:
    return _allocate(R, family_shape(K, D, R, damping))


_op = define(
    "scaled_gram_solve(Tensor K, Tensor D, Tensor R, Tensor damping, bool check=False)"
    " -> (Tensor, Tensor)",
    cpu=_solve,
    cuda=_solve,
    fake=_fake,
    backward=not_differentiable("scaled_gram_solve"),
)
