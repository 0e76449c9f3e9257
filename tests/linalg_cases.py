"""Seeded systems, memory layouts and error measures shared by the tests of ``backmatch.linalg``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
SIZES = (0, 1, 2, 5, 7, 8, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)

#: |A x - b| may be this many times |A| |x| n eps: Cholesky is backward stable, constant of order 1.
RESIDUAL_LIMIT = 30.0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers; the same ones in both dtypes, up to rounding."""
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def spd(*shape: int, condition: float = 1e2, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Shape (..., n), repeated as (..., n, n): eigenvalues from 1 down to 1 / condition."""
    *lead, n = shape
    if n == 0:
        return torch.zeros(*lead, 0, 0, dtype=dtype)
    Q = torch.linalg.qr(normal(*lead, n, n, seed=seed))[0]
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    A = (Q * values) @ Q.mT
    return (0.5 * (A + A.mT)).to(dtype)


def relu_like(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Slopes of a ReLU: 0 or 1, about half of each."""
    return (normal(*shape, seed=seed) > 0).to(dtype)


def _every_other(value: Tensor) -> Tensor:
    wide = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), torch.nan)
    wide[..., ::2] = value
    return wide[..., ::2]


def _transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT


def _inner_batch(value: Tensor) -> Tensor:
    """The batch dimension has stride 1."""
    return value.movedim(0, -1).contiguous().movedim(-1, 0)


def _offset(value: Tensor) -> Tensor:
    padded = value.new_full((value.shape[0] + 2, *value.shape[1:]), torch.nan)
    padded[1:-1] = value
    return padded[1:-1]


def _negated_view(value: Tensor) -> Tensor:
    """A lazily negated view: its memory holds -value."""
    return torch._neg_view(-value)


#: name -> the same values, laid out otherwise; for tensors with at least two dimensions.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "every-other": _every_other,
    "transposed": _transposed,
    "inner-batch": _inner_batch,
    "offset": _offset,
    "negated-view": _negated_view,
}


def residual_ratio(A: Tensor, X: Tensor, B: Tensor) -> float:
    """max over the batch of |A X - B| / (|A| |X| n eps), eps of X's dtype, in float64."""
    if X.numel() == 0:
        return 0.0
    n, eps = A.shape[-1], torch.finfo(X.dtype).eps
    A, X, B = A.double(), X.double(), B.double()
    size = torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(X) * n * eps
    return float((torch.linalg.matrix_norm(A @ X - B) / size.clamp_min(1e-300)).max())


def eye_like(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype)
