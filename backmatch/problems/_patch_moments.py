"""What the patches of a :class:`PatchFamily` with a batch norm have in common with its output.

Two passes over the patches, centred by the chunk: sums over uncentred patches would lose images
whose mean is large beside their spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .patch_family import Normed, PatchFamily


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of every unit, P the patches, centred where the norm is; w = slopes^2.

    Attributes:
        offset: mean patch of every group in two parts, the second what rounding left of the first,
            shape (groups, 2, K); 0 without batch statistics.
        xhat: rows of xhat, shape (units, N).
        weights: w, shape (units, N).
        b: P^T xhat / N, shape (units, K); 0 without batch statistics.
        p: P^T (w xhat), shape (units, K).
        squares: sum of w |P_r|^2, shape (units,).
        count, t, q: sums of w, w xhat and w xhat^2, shape (units,).
    """

    offset: Tensor
    xhat: Tensor
    weights: Tensor
    b: Tensor
    p: Tensor
    squares: Tensor
    count: Tensor
    t: Tensor
    q: Tensor

    def centre(self, Z: Tensor, group: int) -> Tensor:
        """Patches (..., K) of a group minus their mean, in place."""
        return Z.sub_(self.offset[group, 0]).sub_(self.offset[group, 1])


def moments(family: PatchFamily, normed: Normed) -> Moments:
    """All sums at once."""
    patches = family.patches
    xhat = patches.to_rows(normed.xhat)
    weights = torch.ones_like(xhat)
    if family.slopes is not None:
        weights = patches.to_rows(family.slopes.square())
    offset = xhat.new_zeros(patches.groups, 2, patches.width)
    if normed.centred:
        offset[:, 0] = patches.mean()
        for group in range(patches.groups):
            for _, Z in patches.chunks(group):
                offset[group, 1] += Z.sub_(offset[group, 0]).sum(0)
        offset[:, 1] /= patches.rows
    bent = weights * xhat
    b, p = (xhat.new_zeros(patches.units, patches.width) for _ in range(2))
    squares = xhat.new_zeros(patches.units)
    for group in range(patches.groups):
        part = patches.of_group(group)
        for rows, Z in patches.chunks(group):
            Z.sub_(offset[group, 0]).sub_(offset[group, 1])
            if normed.centred:
                b[part].addmm_(xhat[part, rows], Z, alpha=1 / patches.rows)
            p[part].addmm_(bent[part, rows], Z)
            squares[part] += weights[part, rows] @ Z.square().sum(1)
    q = (bent * xhat).sum(1)
    return Moments(offset, xhat, weights, b, p, squares, weights.sum(1), bent.sum(1), q)
