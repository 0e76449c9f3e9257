"""Gram matrices of one set of rows under many weightings: Z^T diag(w_j) Z + damping I."""

from __future__ import annotations

from typing import Any

from torch import Size, Tensor

from .. import checks
from ._failures import raise_failures
from ._layout import damping_tensor, families, family_lead, require_damping
from ._library import (
    DTYPE_NAMES,
    define,
    launch,
    native,
    native_cuda,
    not_differentiable,
    refuse_forward_mode,
    unobserved,
)


def weighted_gram(Z: Tensor, w: Tensor, *, damping: float | Tensor = 0.0) -> Tensor:
    """``G_j = Z^T diag(w_j) Z + damping_j I`` for every row w_j of ``w``.

    Rows with weight 0 do not count, whatever they hold; no (batch, m, n) temporary is formed.

    Args:
        Z: shape (..., m, n).
        w: shape (..., batch, m), of any sign.
        damping: a number >= 0, or a tensor of shape (..., batch).

    Returns:
        G of shape (..., batch, n, n), symmetric, both triangles filled.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape or device, or damping negative, NaN or infinite.
        NonFiniteError: ``Z`` or ``w`` holds NaN or Inf, or the result overflowed.
        MissingExtensionError: the compiled module is not there.

    Example:
        >>> import torch
        >>> Z = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> weighted_gram(Z, torch.tensor([[1.0, 3.0]]), damping=0.5)
        tensor([[[1.5000, 2.0000],
                 [2.0000, 7.5000]]])
    """
    checks.tensor("Z", Z)
    checks.tensor("w", w)
    return _entry(Z, w, damping_tensor(damping, Z), True)


def weighted_gram_unchecked(Z: Tensor, w: Tensor) -> Tensor:
    """:func:`weighted_gram` without damping; NaN goes through, nothing synchronises."""
    return _entry(Z, w, damping_tensor(0.0, Z), False)


def _entry(Z: Tensor, w: Tensor, damping: Tensor, check: bool) -> Tensor:
    refuse_forward_mode(Z, w, damping)
    if not unobserved(Z, w, damping):
        G: Tensor = _op(Z, w, damping, check)
        return G
    return (_cuda if Z.is_cuda else _cpu)(Z, w, damping, check)


def _lead(Z: Tensor, w: Tensor, damping: Tensor) -> Size:
    checks.same("w", w, "Z", Z)
    checks.same("damping", damping, "Z", Z)
    checks.shape("Z", Z, ("m", "n"))
    m = Z.shape[-2]
    checks.shape("w", w, (m,) if Z.dim() == 2 else ("batch", m))
    return family_lead("Z", Z, w=w.shape[:-1], damping=damping.shape)


def _cpu(Z: Tensor, w: Tensor, damping: Tensor, check: bool = False) -> Tensor:
    lead = _lead(Z, w, damping)
    if check:
        require_damping(damping)
    G = _allocate(Z, lead)
    kernel = native().weighted_gram
    if G.numel():
        for part in families(Z, lead, (w, 1), (damping, 0), (G, 2)):
            _call(kernel, *part)
    return _checked(Z, w, G, check)


def _cuda(Z: Tensor, w: Tensor, damping: Tensor, check: bool = False) -> Tensor:
    lead = _lead(Z, w, damping)
    if check:
        require_damping(damping)
    G = _allocate(Z, lead)
    if G.numel():
        for part in families(by_rows(Z), lead, (w, 1), (damping, 0), (G, 2)):
            _run_on_cuda(*part)
    return _checked(Z, w, G, check)


def by_rows(Z: Tensor) -> Tensor:
    """``Z`` with its rows contiguous: the CUDA kernels read any strides, but these the fastest.

    A copy of Z is small beside the results of a family.
    """
    return Z if Z.stride(-1) == 1 else Z.contiguous()


def _run_on_cuda(Z: Tensor, w: Tensor, damping: Tensor, G: Tensor) -> None:
    kernel = native_cuda().weighted_gram

    def enqueue(part: slice, workspace: int, stream: int) -> None:
        _call(kernel, Z, w[part], damping[part], G[part], stream)

    launch(Z.device, w.shape[0], lambda batch: 0, enqueue)


def _call(kernel: Any, Z: Tensor, w: Tensor, damping: Tensor, G: Tensor, *tail: int) -> None:
    kernel(
        *(DTYPE_NAMES[Z.dtype], w.shape[0], *Z.shape),
        *(Z.data_ptr(), *Z.stride()),
        *(w.data_ptr(), *w.stride()),
        *(damping.data_ptr(), *damping.stride()),
        *(G.data_ptr(), *tail),
    )


def _allocate(Z: Tensor, lead: Size) -> Tensor:
    n = Z.shape[-1]
    return Z.new_empty((*lead, n, n))


def _checked(Z: Tensor, w: Tensor, G: Tensor, check: bool) -> Tensor:
    if check:
        # A NaN or Inf in column c of Z, or in w_j, always reaches the diagonal of G_j.
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        raise_failures("G", diagonal, None, full={"Z": Z, "w": w})
    return G


def _fake(Z: Tensor, w: Tensor, damping: Tensor, check: bool = False) -> Tensor:
    return _allocate(Z, _lead(Z, w, damping))


_op = define(
    "weighted_gram(Tensor Z, Tensor w, Tensor damping, bool check=False) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    backward=not_differentiable("weighted_gram"),
)
