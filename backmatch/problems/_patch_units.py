"""The matrices of single channels of a :class:`PatchFamily`, for its direct routes.

With a batch norm behind the convolution, every matrix is that of the bare patches and a correction
of rank 2 (derived here): J = diag(s) [g (P - xhat b^T)  bias  xhat  1] with centred patches P.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import spd_solve_ex
from ..linalg._library import in_chunks
from ..linalg.weighted_gram import weighted_gram_unchecked
from .base import Direct

if TYPE_CHECKING:
    from .patch_family import Normed, PatchFamily


def rows_of_units(family: PatchFamily, group: int, part: slice, at: slice, Z: Tensor) -> Tensor:
    """Explicit rows of the Jacobians of units of one group: Z (rows, K) -> (units, rows, n)."""
    units, normed = part.stop - part.start, family.normed
    J = Z.new_zeros(units, len(Z), family.unknowns)
    width, column = family.patches.width, family.patches.width
    if normed is None:
        J[..., :width] = Z
        if family.bias:
            J[..., column] = 1
    else:
        gain = normed.gain[part].view(-1, 1)
        found = family.moments
        xhat, b = found.xhat[part, at], found.b[part]
        Z = found.centre(Z.clone(), group)
        J[..., :width] = gain.unsqueeze(2) * (Z - xhat.unsqueeze(2) * b.unsqueeze(1))
        if family.bias:
            J[..., column] = 0 if normed.centred else gain
            column += 1
        if normed.gamma:
            J[..., column] = xhat
            column += 1
        if normed.beta:
            J[..., column] = 1
    if family.slopes is None:
        return J
    return J.mul_(family.patches.to_rows(family.slopes[:, part])[:, at].unsqueeze(2))


def gram_of_units(family: PatchFamily, group: int, part: slice) -> Tensor:
    """J_j^T J_j for the channels of ``part``, all of one group: (units, n, n)."""
    normed = family.normed
    extra = int(family.bias) if normed is None else 1
    if normed is not None:
        w = family.moments.weights[part]
    elif family.slopes is None:
        w = torch.ones_like(family.residual[part])
    else:
        w = family.patches.to_rows(family.slopes[:, part].square())
    total: Tensor | None = None
    for rows, Z in family.patches.chunks(group, columns=extra):
        if normed is not None:
            family.moments.centre(Z[:, : family.patches.width], group)
        G = weighted_gram_unchecked(Z, w[:, rows])
        total = G if total is None else total.add_(G)
    assert total is not None
    return total if normed is None else _with_norm(family, normed, part, total)


def _with_norm(family: PatchFamily, normed: Normed, part: slice, G: Tensor) -> Tensor:
    """From [P 1]^T S^2 [P 1], P centred where the norm is, to J^T J."""
    K = family.patches.width
    A, h = G[:, :K, :K], G[:, :K, K]
    found, gain = family.moments, normed.gain[part]
    b, p = found.b[part], found.p[part]
    count, t, q = found.count[part], found.t[part], found.q[part]
    H = G.new_zeros(len(G), family.unknowns, family.unknowns)
    corner = H[:, :K, :K]
    corner.copy_(A)
    if normed.centred:
        left, right = torch.stack([p, b], 2), torch.stack([-b, q[:, None] * b - p], 2)
        corner.baddbmm_(left, right.mT)
    corner.mul_(gain.square().view(-1, 1, 1))
    # The other columns of J are combinations of 1 and xhat.
    E = _tail(family, normed, part)
    ones_xhat = torch.stack([h - t[:, None] * b, p - q[:, None] * b], 1)
    H[:, K:, :K] = E @ ones_xhat * gain.view(-1, 1, 1)
    H[:, :K, K:] = H[:, K:, :K].mT
    inner = torch.stack([count, t, t, q], 1).view(-1, 2, 2)
    H[:, K:, K:] = E @ inner @ E.mT
    return H


def _tail(family: PatchFamily, normed: Normed, part: slice) -> Tensor:
    """Columns of bias, gamma and beta as combinations of 1 and xhat: (units, columns, 2)."""
    gain = normed.gain[part]
    zero, one = torch.zeros_like(gain), torch.ones_like(gain)
    columns = []
    if family.bias:
        columns.append((zero if normed.centred else gain, zero))
    if normed.gamma:
        columns.append((zero, one))
    if normed.beta:
        columns.append((one, zero))
    if not columns:
        return gain.new_zeros(len(gain), 0, 2)
    return torch.stack([torch.stack(column, 1) for column in columns], 1)


def normed_dual(family: PatchFamily, damping: float | Tensor) -> Direct:
    """(J_j J_j^T + damping I) y = r_j over the rows whose slope is not 0; d = J_j^T y."""
    patches = family.patches
    s = torch.ones_like(family.residual)
    if family.slopes is not None:
        s = patches.to_rows(family.slopes)
    order = torch.argsort((s == 0).to(torch.int8), dim=1, stable=True)
    most = max(1, int((s != 0).sum(1).max()))
    xhat = patches.to_rows(family.normed.xhat) if family.normed is not None else s
    y = torch.zeros_like(family.residual)
    info = torch.zeros(family.systems, dtype=torch.int32, device=y.device)
    assert family.normed is not None
    for group in range(patches.groups):
        K = patches.dual(group, centred=family.normed.centred)
        units = patches.of_group(group)
        along = _along(family.normed, K, xhat[units])

        def work(
            local: slice, K: Tensor = K, first: int = units.start, along: Tensor = along
        ) -> None:
            part = slice(first + local.start, first + local.stop)
            index = order[part, :most]
            M = _dual_matrix(family, K, part, index, xhat[part], along[local])
            slope = s[part].gather(1, index)
            M.mul_(slope.unsqueeze(2)).mul_(slope.unsqueeze(1))
            r = family.residual[part].gather(1, index).unsqueeze(2)
            found, info[part] = spd_solve_ex(M, r, damping=damping)
            y[part] = y[part].scatter(1, index, found.squeeze(2))

        in_chunks(patches.units // patches.groups, 3 * most**2 * y.element_size(), work)
    return Direct(family.vjp(y), info)


def _along(normed: Normed, K: Tensor, xhat: Tensor) -> Tensor:
    """P b = P P^T xhat / N as rows (units, N); 0 without batch statistics."""
    return xhat @ K / K.shape[0] if normed.centred else torch.zeros_like(xhat)


def _dual_matrix(
    family: PatchFamily, K: Tensor, part: slice, index: Tensor, xhat: Tensor, along: Tensor
) -> Tensor:
    """J_j J_j^T without the slopes, at the rows ``index`` (units, a): (units, a, a)."""
    normed = family.normed
    assert normed is not None
    x, a = (value.gather(1, index) for value in (xhat, along))
    gain = normed.gain[part].square().unsqueeze(1)
    # |b|^2 = xhat^T P b / N
    square = (xhat * along).sum(1, keepdim=True) / K.shape[0]
    along_xhat = gain * square + float(normed.gamma)
    constant = torch.full_like(gain, float(normed.beta))
    if family.bias and not normed.centred:
        constant = constant + gain
    ones = torch.ones_like(x)
    left = torch.stack([x, -gain * a, ones], 2)
    right = torch.stack([along_xhat * x - gain * a, x, constant * ones], 2)
    M = K[index.unsqueeze(2), index.unsqueeze(1)] * gain.unsqueeze(2)
    return M.baddbmm_(left, right.mT)
