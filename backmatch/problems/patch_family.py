"""Weights of a convolution: one system per output channel, all over the same patches.

    J_j = diag(s_j) [P 1]           convolution with elementwise slopes s_j behind it
    J_j = diag(s_j) [g_j (P - xhat_j b_j^T)  0  xhat_j  1]     with a batch norm between them

P is the patch matrix of the channel's group (:class:`Patches`). The columns are the kernel, its
bias, and gamma and beta of the batch norm, each where trainable. Derived here: the batch norm's
Jacobian g (I - 11^T/N - xhat xhat^T/N) does not mix channels, so that the weights of a whole
convolution + batch norm + activation block fall apart into one small system per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..linalg import _library
from . import _patch_routes as routes
from . import _patch_undamped as undamped
from ._patch_moments import Moments, moments
from .base import Direct, LeastSquares, Preconditioner, lanczos_largest
from .patches import Patches

#: CG steps that a direct solve may cost before ``Auto`` prefers CG.
CG_STEPS = 100


@dataclass(frozen=True)
class Normed:
    """A batch norm behind the convolution.

    Attributes:
        xhat: the normalised input, shape (samples, channels, h, w).
        gain: gamma / s, shape (channels,).
        centred: whether it uses batch statistics, which depend on the weights.
        gamma, beta: whether they are unknowns.
        push: product with its Jacobian, which is symmetric, on (samples, channels, h, w).
    """

    xhat: Tensor
    gain: Tensor
    centred: bool
    gamma: bool
    beta: bool
    push: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PatchFamily(LeastSquares):
    """Systems, one per output channel, that share the patches of their group.

    Attributes:
        patches: P of all groups.
        bias: whether the convolution's bias is an unknown.
        slopes: s, shape (samples, units, h, w); ``None`` for ones.
        residual: shape (units, N).
        label: block and side, for messages.
    """

    patches: Patches
    bias: bool
    slopes: Tensor | None
    residual: Tensor
    scale: float
    structure: str
    damping_group: int
    cut_group: int = 1
    normed: Normed | None = None
    outside: Tensor | None = None
    label: str = "the weight problem"

    @property
    def unknowns(self) -> int:
        extra = 0 if self.normed is None else int(self.normed.gamma) + int(self.normed.beta)
        return self.patches.width + int(self.bias) + extra

    def jvp(self, step: Tensor) -> Tensor:
        return self.patches.to_rows(self._push(step))

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self._pull(self.patches.to_map(cotangent))

    def normal(self, step: Tensor) -> Tensor:
        return self.scale * self._pull(self._push(step))

    def _push(self, step: Tensor) -> Tensor:
        """J d as maps: (units, n) -> (samples, units, h, w)."""
        width = self.patches.width
        rest = list(step[:, width:].unbind(1))
        out = self.patches.apply(step[:, :width].contiguous())
        bias = rest.pop(0) if self.bias else None
        if bias is not None:
            out = out + _per_channel(bias)
        if self.normed is not None:
            out = self.normed.push(out)
            if self.normed.gamma:
                out = torch.addcmul(out, self.normed.xhat, _per_channel(rest.pop(0)))
            if self.normed.beta:
                out = out + _per_channel(rest.pop(0))
        return out if self.slopes is None else out * self.slopes

    def _pull(self, u: Tensor) -> Tensor:
        """J^T u from maps: (samples, units, h, w) -> (units, n)."""
        if self.slopes is not None:
            u = u * self.slopes
        tail = []
        if self.normed is not None:
            if self.normed.gamma:
                tail.append((u * self.normed.xhat).sum((0, 2, 3)))
            if self.normed.beta:
                tail.append(u.sum((0, 2, 3)))
            u = self.normed.push(u)
        if self.bias:
            # Batch statistics take any constant away again: exactly 0, not what rounding leaves.
            lost = self.normed is not None and self.normed.centred
            tail.insert(0, u.new_zeros(u.shape[1]) if lost else u.sum((0, 2, 3)))
        kernel = self.patches.adjoint(u)
        return torch.cat([kernel, *(t.unsqueeze(1) for t in tail)], 1) if tail else kernel

    def traces(self) -> tuple[Tensor, bool]:
        return self.unit_traces.sum().reshape(1), True

    @cached_property
    def unit_traces(self) -> Tensor:
        """tr(J_j^T J_j) of every unit, shape (units,)."""
        if self.normed is None:
            each = self.patches.units // self.patches.groups
            squares = self.patches.squares().repeat_interleave(each, 1) + float(self.bias)
            w = torch.ones_like(squares) if self.slopes is None else self.slopes.square()
            return (w * squares).sum((0, 2, 3))
        found, gain = self.moments, self.normed.gain.square()
        total = found.q * float(self.normed.gamma) + found.count * float(self.normed.beta)
        if not self.normed.centred:
            return total + gain * (found.squares + found.count * float(self.bias))
        # sum_r w_r |P_r - xhat_r b|^2; rounding must not leave a negative sum.
        along = (found.b * found.p).sum(1) * 2 - found.q * found.b.square().sum(1)
        return total + gain * (found.squares - along).clamp_min(0.0)

    @cached_property
    def moments(self) -> Moments:
        """Sums over the patches that every route with a batch norm needs."""
        assert self.normed is not None
        return moments(self, self.normed)

    @property
    def direct_is_cheap(self) -> bool:
        if not routes.fits(self):
            return False
        products = 4 * self.patches.rows * self.patches.width * self.patches.units
        return routes.cheapest(self)[1] <= max(CG_STEPS * products, routes.SMALL)

    @property
    def minimum_norm_is_cheap(self) -> bool:
        return undamped.minimum_norm_fits(self)

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        if isinstance(damping, float) and damping == 0.0:
            return undamped.minimum_norm(self, rcond)
        if not routes.fits(self):
            raise ValueError(
                f"Cholesky: {self.label} has {self.unknowns} unknowns per output unit and "
                f"{self.patches.rows} rows, and matrices of either size are above the workspace "
                f"of {_library.WORKSPACE_BYTES} bytes; use CG(damping) or Auto"
            )
        shift = damping[0] if isinstance(damping, Tensor) else damping
        if self.slopes is None and self.normed is None:
            return routes.shared(self, shift)
        return routes.solve(self, shift)

    def largest_eigenvalue(self) -> Tensor:
        like = self.residual.new_empty(self.systems, self.unknowns)
        return lanczos_largest(lambda step: self._pull(self._push(step)), like)

    def with_residual(self, residual: Tensor) -> PatchFamily:
        return replace(self, residual=residual)

    def diagonal(self) -> Tensor:
        if self.normed is not None:
            return super().diagonal()
        slopes = self.patches.to_map(torch.ones_like(self.residual))
        if self.slopes is not None:
            slopes = self.slopes.square()
        out = replace(self.patches, x=self.patches.x.square()).adjoint(slopes)
        return torch.cat([out, slopes.sum((0, 2, 3)).unsqueeze(1)], 1) if self.bias else out

    def shared_preconditioner(self, damping: float | Tensor) -> Preconditioner:
        if self.normed is not None:
            return super().shared_preconditioner(damping)
        shift = damping[0] if isinstance(damping, Tensor) else damping
        return routes.mean_preconditioner(self, shift)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)
