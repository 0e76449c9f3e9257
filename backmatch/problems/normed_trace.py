"""The exact trace of a convolution's input problem with batch statistics behind it.

J = diag(s) g (I - 11^T/N - xhat xhat^T/N) W couples all samples, yet tr(J^T J) takes no estimate
(derived here). Per channel, with w_p the row of W at position p, and per sample j

    e = sum_p w_p,   f_j = sum_p xhat_jp w_p,   h_j = sum_p s_jp^2 xhat_jp w_p,   k_j without xhat

    tr / g^2 = sum s^2 |w_p|^2 - 2/N sum_j (e k_j + f_j h_j)
               + 1/N^2 sum_j (|e|^2 sum s^2 + 2 e f_j sum s^2 xhat + |f_j|^2 sum s^2 xhat^2)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from ..linalg import _library
from .patches import Patches


def normed_trace(
    patches: Patches,
    weight: Tensor,
    sides: tuple[int, int],
    xhat: Tensor,
    gain: Tensor,
    slopes: Tensor | None,
) -> Tensor:
    """tr(J^T J) over the whole batch, 0-dimensional.

    Args:
        patches: of the input.
        weight: shape (units, channels of a group, kernel height, kernel width).
        sides: height and width of the input; what ``patches.x`` has beyond is padding.
        xhat: normalised output, shape (samples, units, h, w).
        gain: gamma / s, shape (units,).
        slopes: shape of ``xhat``; ``None`` for ones.
    """
    squares = torch.ones_like(xhat) if slopes is None else slopes.square()
    samples, units = xhat.shape[:2]
    # Inner products over the input channels only: R of a QR factorisation has the same ones.
    R = torch.linalg.qr(weight.flatten(2), mode="r").R
    weight = R.reshape(units, -1, *weight.shape[2:])
    each = 4 * samples * weight.shape[1] * patches.x[0, 0].numel() * xhat.element_size()
    step = max(1, _library.WORKSPACE_BYTES // 2 // each)
    total = xhat.new_zeros(())
    for first in range(0, units, step):
        part = slice(first, min(first + step, units))
        pulled = _Pulled(patches, weight[part], sides)
        total += (gain[part].square() * pulled.traces(xhat[:, part], squares[:, part])).sum()
    return total.clamp_min(0.0)


class _Pulled:
    """Sums of rows of W for some channels, each channel by itself."""

    def __init__(self, patches: Patches, weight: Tensor, sides: tuple[int, int]) -> None:
        self.patches, self.weight, self.sides = patches, weight, sides

    def __call__(self, u: Tensor) -> Tensor:
        """sum_p u_jp w_p: (samples, channels, h, w) -> (samples, channels, inputs)."""
        p, count = self.patches, len(self.weight)
        shape = (len(u), count * self.weight.shape[1], *p.x.shape[2:])
        options = (p.stride, p.padding, p.dilation, count)
        found: Tensor = conv2d_input(shape, self.weight, u, *options)  # type: ignore[no-untyped-call]
        found = found[:, :, : self.sides[0], : self.sides[1]]
        return found.reshape(len(u), count, -1)

    def traces(self, xhat: Tensor, squares: Tensor) -> Tensor:
        """tr / g^2 of every channel."""
        count = xhat[:, 0].numel()
        e = self(torch.ones_like(xhat[:1]))[0]
        f = self(xhat)
        bent = squares * xhat
        total, t, q = (v.sum((0, 2, 3)) for v in (squares, bent, bent * xhat))
        first = (e * self(squares).sum(0)).sum(1) + (f * self(bent)).sum((0, 2))
        second = len(xhat) * total * e.square().sum(1) + 2 * t * (e * f.sum(0)).sum(1)
        second = second + q * f.square().sum((0, 2))
        lengths = self._lengths(squares)
        traces: Tensor = lengths - 2 / count * first + second / count**2
        return traces

    def _lengths(self, squares: Tensor) -> Tensor:
        """sum s^2 |w_p|^2: rows at the border are shorter."""
        p, count = self.patches, len(self.weight)
        ones = squares.new_zeros(1, count * self.weight.shape[1], *p.x.shape[2:])
        ones[:, :, : self.sides[0], : self.sides[1]] = 1
        options = (p.stride, p.padding, p.dilation, count)
        rows = torch.nn.functional.conv2d(ones, self.weight.square(), None, *options)
        return (rows * squares).sum((0, 2, 3))
