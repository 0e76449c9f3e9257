"""How well d solves the damped least-squares problems that share one Z."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import native
from ._ridge_routes import call_family


@torch.no_grad()
def ridge_error(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """``|Z^T S (S Z d - r) + damping d|^2`` and ``|Z^T S r|^2`` of every system, S = diag(s_j).

    ``Z: (m, n), R and slopes: (batch, m), damping: () or (batch,), d: (batch, n)``, all on one
    device, none empty. Both results have shape (batch,).
    """
    if Z.is_cuda:
        return _composed(Z, R, slopes, damping, d)
    error, size = torch.empty(2, R.shape[0], dtype=torch.float64)
    tail = (d.data_ptr(), *d.stride(), error.data_ptr(), size.data_ptr())
    call_family(native().ridge_error, Z, slopes, R, damping, *tail)
    return error, size


def _composed(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    missing, wanted = R - d @ Z.mT, R
    if slopes is not None:
        missing, wanted = slopes * (R - slopes * (d @ Z.mT)), slopes * R
    error = torch.addmm(damping.unsqueeze(-1) * d, missing, Z, alpha=-1)
    return _squared_norm(error), _squared_norm(wanted @ Z)


def _squared_norm(rows: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norm.square()
