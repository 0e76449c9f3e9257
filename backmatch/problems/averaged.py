"""Weights of a convolution whose activations are averaged: explicit Jacobians, one per channel.

Behind an average pooling A (pooled x positions) the rows of a channel are weighted sums of
patches, other weights for every channel: nothing is shared any more, but few rows are left.

    J_j = A diag(s_j) [g_j (P - xhat_j b_j^T)  bias  xhat_j  1]     per sample
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..linalg import _library
from .dense import DenseBatch
from .patch_family import PatchFamily


def averaged(family: PatchFamily, average: Tensor, residual: Tensor) -> DenseBatch:
    """The family behind an average.

    Args:
        family: of the weights before the average; its residual is not read.
        average: A, shape (pooled positions, positions).
        residual: r, shape (samples, units, pooled positions).

    Memory: the Jacobians, and a workspace for what leads to them.
    """
    J = residual.new_zeros(family.patches.units, len(residual), len(average), family.unknowns)
    positions, size = average.shape[1], residual.element_size()
    # The weights of the sums, in two layouts, and the rows that come of them.
    each = size * len(average) * (2 * positions + 2 * family.unknowns)
    for group in range(family.patches.groups):
        units = family.patches.of_group(group)
        for rows, Z in family.patches.chunks(group):
            samples = slice(rows.start // positions, rows.stop // positions)
            P = Z.view(-1, positions, Z.shape[1])
            if family.normed is not None:
                P = family.moments.centre(P, group)

            for part in _runs(units, each * len(P)):
                J[part, samples] = _jacobian(family, part, samples, P, average)
    return DenseBatch(
        J.flatten(1, 2),
        residual.transpose(0, 1).flatten(1),
        family.scale,
        "joint",
        damping_group=family.patches.units,
        cut_group=family.patches.units,
    )


def _runs(units: slice, size: int) -> Iterator[slice]:
    """Units in runs that stay within the workspace; one takes ``size`` bytes."""
    step = max(1, _library.WORKSPACE_BYTES // size)
    for start in range(units.start, units.stop, step):
        yield slice(start, min(start + step, units.stop))


def _jacobian(
    family: PatchFamily, part: slice, samples: slice, P: Tensor, average: Tensor
) -> Tensor:
    """Rows of some channels and samples, P (samples, positions, K): (units, samples, pooled, n)."""
    count, normed = part.stop - part.start, family.normed
    T = average.expand(count, len(P), -1, -1)
    if family.slopes is not None:
        T = T * family.slopes[samples, part].flatten(2).transpose(0, 1).unsqueeze(2)
    flat = T.transpose(0, 1).reshape(len(P), -1, P.shape[1])
    kernel = (flat @ P).view(len(P), count, -1, P.shape[2]).transpose(0, 1)
    ones = T.sum(-1)
    tail = [ones] * int(family.bias)
    if normed is not None:
        gain = normed.gain[part].view(-1, 1, 1)
        xhat = normed.xhat[samples, part].flatten(2).transpose(0, 1)
        along = torch.einsum("uspl,usl->usp", T, xhat)
        curvature = family.moments.b[part].view(count, 1, 1, -1)
        kernel = gain.unsqueeze(-1) * (kernel - along.unsqueeze(-1) * curvature)
        tail = [torch.zeros_like(ones) if normed.centred else gain * ones] * int(family.bias)
        tail += [along] * int(normed.gamma) + [ones] * int(normed.beta)
    return torch.cat([kernel, *(column.unsqueeze(-1) for column in tail)], -1)
