"""Weights of a convolution whose activations are averaged: explicit Jacobians, one per channel.

Behind an average pooling A (pooled x positions) the rows of a channel are weighted sums of
patches, other weights for every channel: nothing is shared any more, but few rows are left.

    J_j = A diag(s_j) [g_j (P - xhat_j b_j^T)  bias  xhat_j  1]     per sample
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import DenseBatch
from .patch_family import PatchFamily


def averaged(family: PatchFamily, average: Tensor, residual: Tensor) -> DenseBatch:
    """The family behind an average.

    Args:
        family: of the weights before the average; its residual is not read.
        average: A, shape (pooled positions, positions).
        residual: r, shape (samples, units, pooled positions).
    """
    J = residual.new_zeros(family.patches.units, len(residual), len(average), family.unknowns)
    for group in range(family.patches.groups):
        part = family.patches.of_group(group)
        for rows, Z in family.patches.chunks(group):
            _fill(family, part, rows, Z, average, J)
    return DenseBatch(
        J.flatten(1, 2),
        residual.transpose(0, 1).flatten(1),
        family.scale,
        "joint",
        damping_group=family.patches.units,
        cut_group=family.patches.units,
    )


def _fill(
    family: PatchFamily, part: slice, rows: slice, Z: Tensor, average: Tensor, J: Tensor
) -> None:
    """The Jacobians' rows of the samples whose patches are in Z (rows, K)."""
    positions, normed = average.shape[1], family.normed
    first, last = rows.start // positions, rows.stop // positions
    J = J[part, first:last]
    count, width = part.stop - part.start, family.patches.width
    P = Z.view(last - first, positions, width)
    if normed is not None and normed.centred:
        P = P - family.mean_of_unit[part.start]
    slopes = torch.ones_like(J[..., 0, 0]).unsqueeze(-1).expand(-1, -1, positions)
    if family.slopes is not None:
        slopes = family.slopes[first:last, part].flatten(2).transpose(0, 1)
    T = average * slopes.unsqueeze(2)  # (units, samples, pooled, positions)
    flat = T.transpose(0, 1).reshape(last - first, -1, positions)
    kernel = (flat @ P).view(last - first, count, -1, width).transpose(0, 1)
    ones = T.sum(-1)
    tail = [ones] if family.bias else []
    if normed is not None:
        gain = normed.gain[part].view(-1, 1, 1)
        xhat = normed.xhat[first:last, part].flatten(2).transpose(0, 1)
        along = torch.einsum("uspl,usl->usp", T, xhat)
        curvature = family.curvature[part].view(count, 1, 1, width)
        kernel = gain.unsqueeze(-1) * (kernel - along.unsqueeze(-1) * curvature)
        tail = [torch.zeros_like(ones) if normed.centred else gain * ones] if family.bias else []
        tail += [along] * int(normed.gamma) + [ones] * int(normed.beta)
    J[..., :width] = kernel
    for i, column in enumerate(tail):
        J[..., width + i] = column
