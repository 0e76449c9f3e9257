"""Conjugate gradient for dense matrices and for callables: the public face of :mod:`krylov`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

from .. import checks
from . import _cuda_cg
from ._failures import raise_failures
from ._fused_cg import Apply
from ._layout import broadcast, damping_tensor, flat, require_damping
from ._library import DTYPE_NAMES, define, guarded, native, native_cuda, not_differentiable
from .krylov import DEFAULT_RTOL, CGResult, conjugate_gradient


def cg(
    A: Tensor | Apply,
    B: Tensor,
    *,
    damping: float | Tensor = 0.0,
    rtol: float | None = None,
    max_steps: int | None = None,
    preconditioner: Apply | None = None,
    x0: Tensor | None = None,
) -> CGResult:
    """Conjugate gradient on ``(A + damping I) x = b``, one Krylov system per column of ``B``.

    Every system stops on its own: at ``|b - (A + damping I) x| <= rtol |b|``, computed from x and
    not by the recursion, at p^T (A + damping I) p <= 0, or at the cap; nothing is iterated past
    that, and b = 0 gives x = 0 in 0 iterations. Stopping early is no error: see ``converged``.

    Args:
        A: symmetric positive semi-definite, shape (..., n, n), read in full; or a callable
            that multiplies a tensor of shape (batch, n, k) by it.
        B: shape (..., n, k).
        damping: a number >= 0, or a tensor of the leading shape.
        rtol: ``None`` means 1e-5 in float32, 1e-10 in float64; 0 takes ``max_steps`` steps.
        max_steps: cap per system; ``None`` means 10 n.
        preconditioner: residual -> approximate solution, on shape (batch, n, k); symmetric
            positive definite.
        x0: start, broadcast to the shape of x; 0 if ``None``.

    Returns:
        :class:`CGResult` with x (..., n, k) and iterations, residual, converged (..., k).

    Raises:
        TypeError: an argument is not a tensor (or callable) or has the wrong dtype.
        ValueError: wrong shape or device, or a negative or NaN damping or rtol.
        NonFiniteError: an argument holds NaN or Inf, or the result does.
        MissingExtensionError: the compiled module is not there.

    Example:
        >>> result = cg(torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([[1.0], [1.0]]))
        >>> result.x.ravel(), result.iterations, result.converged
        (tensor([1.0000, 0.5000]), tensor([2]), tensor([True]))
        >>> cg(lambda P: 3 * P, torch.ones(1, 2, 1), damping=1.0).x.ravel()
        tensor([0.2500, 0.2500])
    """
    if not callable(A):
        checks.tensor("A", A)
    checks.tensor("B", B)
    checks.shape("B", B, ("n", "k"))
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(
            f"preconditioner must be callable or None, got {type(preconditioner).__name__}"
        )
    tol, cap = stopping(B, rtol, max_steps)
    shift = damping_tensor(damping, B)
    if x0 is not None:
        checks.tensor("x0", x0)
    if isinstance(A, Tensor) and preconditioner is None:
        return CGResult(*_op(A, B, shift, tol, cap, x0))
    return _generic(A, B, shift, tol, cap, preconditioner, x0)


def stopping(B: Tensor, rtol: float | None, max_steps: int | None) -> tuple[float, int]:
    """The two stopping arguments, checked, with their defaults."""
    tol = DEFAULT_RTOL[B.dtype] if rtol is None else checks.non_negative("rtol", rtol)
    cap = max(1, 10 * B.shape[-2]) if max_steps is None else max_steps
    return tol, checks.positive_int("max_steps", cap)


def _generic(
    A: Tensor | Apply,
    B: Tensor,
    damping: Tensor,
    rtol: float,
    max_steps: int,
    preconditioner: Apply | None,
    x0: Tensor | None,
) -> CGResult:
    """The loop of :mod:`krylov`, for callables, preconditioners and large systems on CUDA."""
    require_damping(damping)
    lead = _lead(A, B, damping, x0)
    shape = torch.Size((*lead, *B.shape[-2:]))
    B3, shift = flat(B, lead, 2), flat(damping, lead, 0).view(-1, 1, 1)
    multiply = flat(A, lead, 2).matmul if isinstance(A, Tensor) else A
    result = conjugate_gradient(
        lambda P: multiply(P) + shift * P,
        B3,
        rtol=rtol,
        max_steps=max_steps,
        preconditioner=preconditioner,
        x0=None if x0 is None else flat(x0.expand(shape), lead, 2),
    )
    columns = (*lead, B.shape[-1])
    x, *rest = result
    x = guarded("cg", x.reshape(shape), A, B, shift, x0)
    result = CGResult(x, *(value.view(columns) for value in rest))
    _raise_nonfinite(A, B, x0, result)
    return result


def _lead(A: object, B: Tensor, damping: Tensor, x0: Tensor | None) -> Size:
    checks.shape("B", B, ("n", "k"))
    n, k = B.shape[-2:]
    leads = {"B": B.shape[:-2], "damping": damping.shape}
    checks.same("damping", damping, "B", B)
    if isinstance(A, Tensor):
        checks.same("A", A, "B", B)
        checks.shape("A", A, (n, n))
        leads["A"] = A.shape[:-2]
    if x0 is not None:
        checks.same("x0", x0, "B", B)
        checks.shape("x0", x0, (n, k))
        leads["x0"] = x0.shape[:-2]
    return broadcast(**leads)


def _raise_nonfinite(A: object, B: Tensor, x0: Tensor | None, result: CGResult) -> None:
    inputs = {"B": B}
    if isinstance(A, Tensor):
        inputs["A"] = A
    if x0 is not None:
        inputs["x0"] = x0
    raise_failures("A + damping I", result.residual, None, full=inputs)


def _cpu(
    A: Tensor, B: Tensor, damping: Tensor, rtol: float, max_steps: int, x0: Tensor | None = None
) -> CGResult:
    require_damping(damping)
    result = _start(A, B, damping, x0)
    if result.converged.numel() and B.shape[-2]:
        _call(native().cg, A, B, damping, rtol, max_steps, result)
    else:
        for value, answer in zip(result[1:], (0, 0, True), strict=True):
            value.fill_(answer)
    _raise_nonfinite(A, B, x0, result)
    return result


def _cuda(
    A: Tensor, B: Tensor, damping: Tensor, rtol: float, max_steps: int, x0: Tensor | None = None
) -> CGResult:
    if not B.numel() or not _cuda_cg.has_kernel("cg", A):
        return _generic(A, B, damping, rtol, max_steps, None, x0)
    result = _start(A, B, damping, x0)
    if result.converged.numel():
        with torch.cuda.device(A.device):
            if A.stride(-1) != 1 and A.shape[-1] > _LARGEST_ON_CHIP:
                A = A.contiguous()  # neighbouring threads read along its last dimension
            stream = torch.cuda.current_stream().cuda_stream
            _call(native_cuda().cg, A, B, damping, rtol, max_steps, result, stream)
    require_damping(damping)  # waits for the device, as the next line does
    _raise_nonfinite(A, B, x0, result)
    return result


#: Up to here a matrix is copied to shared memory first, whatever its strides and dtype.
_LARGEST_ON_CHIP = 128


def _start(A: Tensor, B: Tensor, damping: Tensor, x0: Tensor | None) -> CGResult:
    """Room for the result, with x at its start."""
    result = _allocate(B, _lead(A, B, damping, x0))
    if x0 is None:
        result.x.zero_()
    else:
        result.x.copy_(x0.expand_as(result.x))
    return result


def _call(
    kernel: Any,
    A: Tensor,
    B: Tensor,
    damping: Tensor,
    rtol: float,
    max_steps: int,
    result: CGResult,
    *tail: int,
) -> None:
    lead = result.x.shape[:-2]
    A3, B3, d1 = flat(A, lead, 2), flat(B, lead, 2), flat(damping, lead, 0)
    kernel(
        *(DTYPE_NAMES[B.dtype], *B3.shape),
        *(A3.data_ptr(), *A3.stride()),
        *(d1.data_ptr(), *d1.stride()),
        *(B3.data_ptr(), *B3.stride()),
        *(rtol, max_steps, result.x.data_ptr()),
        *(result.iterations.data_ptr(), result.residual.data_ptr(), result.converged.data_ptr()),
        *tail,
    )


def _allocate(B: Tensor, lead: Size) -> CGResult:
    n, k = B.shape[-2:]
    return CGResult(
        B.new_empty((*lead, n, k)),
        B.new_empty((*lead, k), dtype=torch.int64),
        B.new_empty((*lead, k)),
        B.new_empty((*lead, k), dtype=torch.bool),
    )


def _fake(
    A: Tensor, B: Tensor, damping: Tensor, rtol: float, max_steps: int, x0: Tensor | None = None
) -> CGResult:
    return _allocate(B, _lead(A, B, damping, x0))


_op = define(
    "cg(Tensor A, Tensor B, Tensor damping, float rtol, int max_steps, Tensor? x0=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    backward=not_differentiable("cg"),
)
