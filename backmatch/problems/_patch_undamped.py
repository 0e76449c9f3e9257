"""The weights of a convolution at damping 0: pinv(J) r for every channel.

A chunked QR factorisation of [J r] keeps R, at most (n + 1) x (n + 1) per channel: it has the
singular values of J, to rounding, and its last column is Q^T r. The rows of J come and go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import _library
from ._patch_units import rows_of_units
from .base import Direct
from .dense import DENSE_ENTRIES

if TYPE_CHECKING:
    from .patch_family import PatchFamily


def minimum_norm(family: PatchFamily, rcond: float | None) -> Direct:
    """The step and the rank; singular values up to ``rcond`` times the largest count as zero."""
    if not minimum_norm_fits(family):
        raise ValueError(
            f"Cholesky: {family.label} at damping 0 decomposes {family.patches.units} Jacobians "
            f"with {family.unknowns} columns, above the limit of {DENSE_ENTRIES} entries; use a "
            "positive damping or CG(0.0)"
        )
    parts = [
        _decomposed(R, family.unknowns)
        for group in range(family.patches.groups)
        for R in (_shared_factor(family, group) if _is_bare(family) else _factors(family, group))
    ]
    sigma = torch.cat([part[0] for part in parts])
    size = max(family.patches.rows, family.unknowns) * family.cut_group
    cut = (size * torch.finfo(sigma.dtype).eps) ** 0.5 if rcond is None else rcond
    group = family.cut_group
    largest = sigma[:, :1].view(-1, group).amax(1).repeat_interleave(group).unsqueeze(1)
    kept = sigma > cut * largest
    inverse = torch.split(
        torch.where(kept, sigma.reciprocal(), 0), [len(part[0]) for part in parts]
    )
    steps = [
        ((coefficients * i) @ Vh if Vh.dim() == 2 else ((coefficients * i).unsqueeze(1) @ Vh)[:, 0])
        for (_, coefficients, Vh), i in zip(parts, inverse, strict=True)
    ]
    return Direct(torch.cat(steps), rank=int(kept.sum()))


def minimum_norm_fits(family: PatchFamily) -> bool:
    """Whether the right singular vectors of all channels may be held."""
    n, count = family.unknowns, family.patches.units
    if _is_bare(family):
        count = family.patches.groups
    return count * min(family.patches.rows, n + 1) * (n + 1) <= DENSE_ENTRIES


def _is_bare(family: PatchFamily) -> bool:
    """Neither slopes nor norm: the channels of a group share their Jacobian."""
    return family.slopes is None and family.normed is None


def _decomposed(R: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """sigma (units, k), U^T Q^T r (units, k) and V^T: (units, k, n), or (k, n) where it is shared.

    R is (units, rows, n + 1), or (rows, n + units) of a shared Jacobian.
    """
    U, sigma, Vh = torch.linalg.svd(R[..., :n], full_matrices=False)
    coefficients = U.mT @ R[..., n:]
    if R.dim() == 2:
        return sigma.expand(coefficients.shape[1], -1), coefficients.t(), Vh
    return sigma, coefficients.squeeze(2), Vh


def _shared_factor(family: PatchFamily, group: int) -> Iterator[Tensor]:
    """R of [J r_1 .. r_units] of one group, (rows, n + units)."""
    part = family.patches.of_group(group)
    R = family.residual.new_zeros(0, family.unknowns + part.stop - part.start)
    for rows, Z in family.patches.chunks(group, columns=int(family.bias)):
        block = torch.cat([Z, family.residual[part, rows].t()], 1)
        for piece in torch.split(block, max(block.shape[1], 1024)):
            R = torch.linalg.qr(torch.cat([R, piece]), mode="r").R
    yield R


def _factors(family: PatchFamily, group: int) -> Iterator[Tensor]:
    """R of [J_j r_j], (units, rows, n + 1) for some channels of a group at a time."""
    units, width = family.patches.of_group(group), family.unknowns + 1
    # R and as many rows on top, in the input, the copy and the output of a factorisation.
    step = max(1, _library.WORKSPACE_BYTES // (8 * width**2 * family.residual.element_size()))
    for first in range(units.start, units.stop, step):
        part = slice(first, min(first + step, units.stop))
        R = family.residual.new_zeros(part.stop - part.start, 0, width)
        for rows, Z in family.patches.chunks(group):
            for start in range(0, len(Z), width):
                piece = Z[start : start + width]
                at = slice(rows.start + start, rows.start + start + len(piece))
                J = rows_of_units(family, group, part, at, piece)
                r = family.residual[part, at].unsqueeze(2)
                R = torch.linalg.qr(torch.cat([R, torch.cat([J, r], 2)], 1), mode="r").R
        yield R
