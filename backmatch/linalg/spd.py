"""Batched symmetric positive definite systems: factor and solve in one kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from .. import checks
from ._by_library import first_bad_pivot, solve_by_library
from ._failures import raise_failures
from ._layout import broadcast, damping_tensor, flat, require_damping
from ._library import (
    DTYPE_NAMES,
    define,
    forward_mode,
    launch,
    native,
    native_cuda,
    refuse_forward_mode,
    unobserved,
)

#: Order up to which one matrix with many right-hand sides goes to the kernel. Measured on two
#: cores, 10 to 10,000 right-hand sides: the kernel's one thread is 2 to 6 times ahead up to here.
KERNEL_SIDE = 512

#: Order up to which a batch on CUDA goes to our kernel, above it to the library: one block a system
#: cannot keep up with one that spreads a large matrix over the device. Estimated, not measured.
CUDA_KERNEL_SIDE = 512


def spd_solve(A: Tensor, B: Tensor, *, damping: float | Tensor = 0.0) -> Tensor:
    """Solve ``(A + damping I) X = B`` for symmetric positive definite ``A + damping I``.

    A Cholesky factorisation per system (LAPACK's ``potrf`` and ``potrs``), fused; only the lower
    triangle of ``A`` is read, nothing is modified. On CUDA, orders above 512 go to torch's library,
    in chunks within the workspace budget. Differentiable to any order in ``A``, ``B`` and
    ``damping``; the gradient of ``A`` fills the lower triangle, the part that the function reads.

    Args:
        A: shape (..., n, n), any strides, float32 or float64.
        B: shape (..., n, k); leading dimensions broadcast with those of ``A``.
        damping: a number >= 0, or a tensor of the leading shape with one value per system.

    Returns:
        X of shape (..., n, k), contiguous.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape or device, or damping negative, NaN or infinite.
        NonFiniteError: ``A`` or ``B`` holds NaN or Inf, or the result overflowed.
        NotPositiveDefiniteError: a matrix is not positive definite; no jitter is added.
        MissingExtensionError: the compiled module is not there.

    Example:
        >>> A = torch.tensor([[4.0, 0.0], [2.0, 3.0]])  # upper triangle is not read
        >>> spd_solve(A, torch.tensor([[8.0], [7.0]]))
        tensor([[1.2500],
                [1.5000]])
        >>> spd_solve(A, torch.tensor([[8.0], [7.0]]), damping=torch.tensor([0.0, 1.0])).shape
        torch.Size([2, 2, 1])
    """
    if isinstance(damping, float) and 0 <= damping < math.inf and _is_plain_batch(A, B):
        X, info = solve_systems(A, B, torch.full((), damping, dtype=A.dtype))
        return _checked(A, B, X, info, True)[0]
    checks.tensor("A", A)
    checks.tensor("B", B)
    return _entry(A, B, damping_tensor(damping, A), True)[0]


def spd_solve_ex(A: Tensor, B: Tensor, *, damping: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """:func:`spd_solve` that reports failures instead of raising them, and never synchronises.

    Above order 512 on CUDA that takes a torch whose batched ``cholesky_solve`` does not wait.

    Returns:
        X of shape (..., n, k) and ``info`` of shape (...), int32: 0 where the system was solved,
        else the order (1-based) of the leading minor that is not positive, as in LAPACK's
        ``potrf``; NaN and Inf in ``A`` count as not positive. A failed system's X is all NaN.
        The values of a damping tensor are not checked.

    Example:
        >>> A = torch.stack([torch.eye(2), -torch.eye(2)])
        >>> X, info = spd_solve_ex(A, torch.ones(2, 1))
        >>> info
        tensor([0, 1], dtype=torch.int32)
    """
    checks.tensor("A", A)
    checks.tensor("B", B)
    return _entry(A, B, damping_tensor(damping, A), False)


def _is_plain_batch(A: Tensor, B: Tensor) -> bool:
    """One batch as the CPU kernel takes it: nothing to refuse, to broadcast or to share.

    One small system costs the kernel less than the checks of the general way cost Python.
    """
    return (
        isinstance(A, Tensor)
        and isinstance(B, Tensor)
        and not (A.is_nested or B.is_nested)  # these have no shape to ask for
        and A.dim() == 3 == B.dim()
        and 0 < A.shape[1] == A.shape[2] == B.shape[1]
        and 0 < A.shape[0] == B.shape[0]
        and B.shape[2] > 0
        and (A.shape[0] == 1 or A.stride(0) != 0)
        and A.dtype == B.dtype in DTYPE_NAMES
        and A.is_cpu
        and B.is_cpu
        and A.layout == torch.strided == B.layout
        and unobserved(A, B)
        and not forward_mode()
    )


def _entry(A: Tensor, B: Tensor, damping: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    refuse_forward_mode(A, B, damping)
    X, info = (_solve if unobserved(A, B, damping) else _op)(A, B, damping, check)
    return X, info


def _lead(A: Tensor, B: Tensor, damping: Tensor) -> Size:
    """Check the three against each other; return the broadcast leading shape."""
    checks.same("B", B, "A", A)
    checks.same("damping", damping, "A", A)
    checks.shape("B", B, (checks.square("A", A), "k"))
    return broadcast(A=A.shape[:-2], B=B.shape[:-2], damping=damping.shape)


def _solve(A: Tensor, B: Tensor, damping: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    lead = _lead(A, B, damping)
    if check:
        require_damping(damping)
    X, info = _allocate(B, lead)
    if X.shape[-2] == 0:
        info.zero_()
    elif info.numel():
        systems = (flat(A, lead, 2), flat(B, lead, 2), flat(damping, lead, 0))
        results = (flat(X, lead, 2), flat(info, lead, 0))
        if info.numel() > 1 and systems[0].stride(0) == 0 == systems[2].stride(0):
            _run_shared(*systems, *results)
        else:
            _run(*systems, *results)
    return _checked(A, B, X, info, check)


def solve_systems(A: Tensor, B: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`spd_solve_ex` past the checks and the dispatcher, for arguments that fit.

    ``A: (batch, n, n), B: (batch, n, k), damping: () or (batch,)``, none of them empty.
    """
    batch = B.shape[0]
    X, info = _allocate(B, B.shape[:1])
    _run(A, B, damping.expand(batch), X, info)
    return X, info


def _run_shared(A: Tensor, B: Tensor, damping: Tensor, X: Tensor, info: Tensor) -> None:
    """A batch that repeats one matrix: all right-hand sides become columns of one system."""
    batch, n, k = B.shape
    columns = B.transpose(0, 1).reshape(n, batch * k)
    solution, status = solve_shared(A[0], columns, damping[0])
    X.copy_(solution.view(n, batch, k).transpose(0, 1))
    info.copy_(status.expand(batch))


def solve_shared(A: Tensor, B: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix, many right-hand sides: ``A: (n, n), B: (n, k), damping: ()``; nothing empty.

    One factorisation: on the CPU the kernel's up to :data:`KERNEL_SIDE`, else the library's.
    Returns X (n, k) and info (1,).
    """
    if not A.is_cuda and A.shape[0] <= KERNEL_SIDE:
        X, info = solve_systems(A.unsqueeze(0), B.unsqueeze(0), damping)
        return X.squeeze(0), info
    shifted = A.clone()
    shifted.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(shifted)
    info = first_bad_pivot(factor, info)
    return torch.where(info == 0, torch.cholesky_solve(B, factor), math.nan), info.reshape(1)


def _run(A: Tensor, B: Tensor, damping: Tensor, X: Tensor, info: Tensor) -> None:
    """The kernel of A's device, on one batch."""
    if A.is_cuda:
        _run_on_cuda(A, B, damping, X, info)
    else:
        _call(native().spd_solve, A, B, damping, X, info)


def _run_on_cuda(A: Tensor, B: Tensor, damping: Tensor, X: Tensor, info: Tensor) -> None:
    """The kernel up to :data:`CUDA_KERNEL_SIDE`, the library above it."""
    if A.shape[-1] > CUDA_KERNEL_SIDE:
        solve_by_library(A, B, damping, X, info)
        return
    kernels, dtype, (batch, n, k) = native_cuda(), DTYPE_NAMES[A.dtype], B.shape

    def enqueue(part: slice, workspace: int, stream: int) -> None:
        systems = (A[part], B[part], damping[part], X[part], info[part])
        _call(kernels.spd_solve, *systems, workspace, stream)

    launch(A.device, batch, lambda b: kernels.spd_solve_workspace(dtype, b, n, k), enqueue)


def _call(
    kernel: Any, A: Tensor, B: Tensor, damping: Tensor, X: Tensor, info: Tensor, *tail: int
) -> None:
    kernel(
        *(DTYPE_NAMES[A.dtype], *B.shape),
        *(A.data_ptr(), *A.stride()),
        *(damping.data_ptr(), *damping.stride()),
        *(B.data_ptr(), *B.stride()),
        *(X.data_ptr(), info.data_ptr(), *tail),
    )


def _allocate(B: Tensor, lead: Size) -> tuple[Tensor, Tensor]:
    X = B.new_empty((*lead, *B.shape[-2:]))
    return X, B.new_empty(lead, dtype=torch.int32)


def _checked(A: Tensor, B: Tensor, X: Tensor, info: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    if check:
        raise_failures("A + damping I", X, info, lower={"A": A}, full={"B": B})
    return X, info


def _fake(A: Tensor, B: Tensor, damping: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    return _allocate(B, _lead(A, B, damping))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    A, B, damping, _ = inputs
    ctx.save_for_backward(A, damping, output[0])
    ctx.B_shape = B.shape
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_X: Tensor | None, grad_info: Any) -> tuple[Tensor | None, ...]:
    """X = S^-1 B with S = A + damping I: dB = S^-1 dX, dS = -dB X^T."""
    if grad_X is None:
        return None, None, None, None
    A, damping, X = ctx.saved_tensors
    grad_B, _ = _op(A, grad_X, damping, False)
    grad_A = grad_damping = None
    if ctx.needs_input_grad[0]:
        # The entry (i, j), i > j, of the lower triangle stands for (j, i) as well.
        G = -grad_B @ X.mT
        grad_A = (G.tril() + G.triu(1).mT).sum_to_size(A.shape)
    if ctx.needs_input_grad[2]:
        grad_damping = -(grad_B * X).sum((-2, -1)).sum_to_size(damping.shape)
    return grad_A, grad_B.sum_to_size(ctx.B_shape), grad_damping, None


_op = define(
    "spd_solve(Tensor A, Tensor B, Tensor damping, bool check=False) -> (Tensor, Tensor)",
    cpu=_solve,
    cuda=_solve,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
