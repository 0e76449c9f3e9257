"""Systems J = diag(slopes) (I - 11^T/n - x x^T/n): solves and singular values in O(n) a system.

Derived here. Throughout |x|^2 = n (1 - e) and x^T 1 = 0. J J^T = D - V V^T with D = slopes^2 and V
of two columns, so eigenvalues are counted by inertia; solves are regressions on [1, x].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Steps of the searches below; they stop at rounding, long before.
MAX_BISECTIONS, MAX_SECULAR_STEPS = 120, 60


@dataclass(frozen=True)
class RankTwo:
    """A batch of systems.

    Attributes:
        normed: x, shape (systems, n).
        slopes: shape (systems, n).
        shrink: e, shape (systems,).
    """

    normed: Tensor
    slopes: Tensor
    shrink: Tensor

    def __getitem__(self, part: Tensor) -> RankTwo:
        return RankTwo(self.normed[part], self.slopes[part], self.shrink[part])

    def solve(self, r: Tensor, damping: float | Tensor) -> Tensor:
        """(J^T J + damping I) d = J^T r; damping 0 (slopes nonzero): pinv(J) r of rank n - 1.

        Args:
            r: shape (systems, n).
            damping: a float, or shape (systems, 1).
        """
        n, e = self.normed.shape[1], self.shrink.unsqueeze(-1)
        w = 1 / (self.slopes.square() + damping)
        x = _centred(self.normed, w)
        t = _centred(self.slopes * r, w)
        weighted, ridge = w * x, damping * (1 + e)
        shared = _dot(weighted, t) / _nonzero(ridge * _dot(weighted, x) + n * e.square())
        q = t.addcmul_(x, ridge * shared, value=-1).mul_(w)
        return q.addcmul_(self.normed, e * shared)

    def solve_without_smallest(self, r: Tensor, cut: Tensor) -> Tensor:
        """pinv(J) r less the smallest nonzero singular value, where slopes exceed ``cut`` >= it.

        That value's direction is close to x. Dividing by it and projecting it out again would
        lose 1/e in accuracy; here e occurs in numerators only.
        """
        w = self.slopes.square().reciprocal()
        e = self.shrink.unsqueeze(-1)
        size: Tensor = torch.linalg.vector_norm(self.normed, dim=-1, keepdim=True)
        u = self.normed / size
        v = self._smallest_direction(w, u, cut.unsqueeze(-1))
        on_u = _dot(u, v)
        p = v - u * on_u
        square = on_u.square() + e.square() * _dot(p, p)
        direction = (e * p + on_u * u) / square.sqrt()
        q = w * _centred(self.slopes * r, w)
        over = _dot(u, q) * (1 - e) / square
        return q - direction * _dot(direction, q) + over * (e * _dot(p, p) * u - on_u * p)

    def _smallest_direction(self, w: Tensor, u: Tensor, cut: Tensor) -> Tensor:
        """The v that spans that direction together with u: (nu - e^2 M)^{-1} M u at the root nu of
        (1 - e^2) u^T v = 1, with M = diag(w) - w w^T / sum(w); 1 / sigma^2 = nu / e^2.
        """
        e2 = self.shrink.square().unsqueeze(-1)
        start = w * _centred(u, w)
        nu = torch.maximum(e2 / cut.square(), (1 - e2) * _dot(u, start))
        eps = torch.finfo(w.dtype).eps
        for _ in range(MAX_SECULAR_STEPS):
            v = _resolvent(start, w, e2, nu)
            value = (1 - e2) * _dot(u, v)
            slope = (1 - e2) * _dot(u, _resolvent(v, w, e2, nu))
            # Newton on 1 / value, which is concave: it climbs to the root and never passes it.
            step = (value * (value - 1) / slope).clamp_min(0.0)
            nu = nu + step
            if bool((step <= 4 * eps * nu).all()):
                break
        return _resolvent(start, w, e2, nu)

    def count_above(self, bound: Tensor) -> Tensor:
        """Number of eigenvalues of J J^T above ``bound`` > 0, shape (systems,), by inertia.

        In(D - x - V V^T) = In(D - x) + In(I - V^T (D - x)^{-1} V) - (2, 0, 0).
        """
        n, x = self.normed.shape[1], bound.unsqueeze(-1)
        gap = self.slopes.square() - x
        gap = torch.where(gap == 0, -(torch.finfo(gap.dtype).tiny ** 0.25) * (x + 1), gap)
        a = -bound / n * (1 / gap).sum(-1)
        b = -bound / n * (1 + self.shrink).sqrt() * (self.normed / gap).sum(-1)
        over = (self.normed.square() / gap).sum(-1)
        c = self.shrink.square() - bound * (1 + self.shrink) / n * over
        determinant = a * c - b * b
        both = torch.where(a + c > 0, 2, 0)
        return (gap > 0).sum(-1) + torch.where(determinant < 0, 1, both) - 2

    def largest(self) -> Tensor:
        """lambda_max(J^T J), shape (systems,): bisection between the slopes' squares, where the
        first three have to hold it."""
        top = self.slopes.square().topk(min(3, self.slopes.shape[1]), dim=-1).values
        high = top[:, 0] if top.shape[1] > 1 else torch.zeros_like(top[:, 0])
        low = top[:, 2] if top.shape[1] == 3 else torch.zeros_like(high)
        eps = torch.finfo(high.dtype).eps
        for _ in range(MAX_BISECTIONS):
            if bool((high - low <= 4 * eps * high).all()):
                break
            middle = (low + high) / 2
            found = self.count_above(middle) > 0
            low, high = torch.where(found, middle, low), torch.where(found, high, middle)
        return (low + high) / 2

    def solve_dense(self, r: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
        """pinv(J) r by singular values of the dense J, and the rank of each system."""
        n = self.normed.shape[1]
        x = self.normed
        J = torch.eye(n, dtype=x.dtype, device=x.device) - 1 / n
        J = self.slopes.unsqueeze(-1) * (J - x.unsqueeze(-1) * x.unsqueeze(-2) / n)
        U, S, Vh = torch.linalg.svd(J)
        kept = cut.unsqueeze(-1) < S
        inverse = torch.where(kept, S.reciprocal(), 0.0).unsqueeze(-1)
        step = Vh.mT @ (inverse * (U.mT @ r.unsqueeze(-1)))
        return step.squeeze(-1), kept.sum(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _nonzero(value: Tensor) -> Tensor:
    return torch.where(value == 0, torch.ones_like(value), value)


def _centred(y: Tensor, w: Tensor) -> Tensor:
    """y less its mean under the weights w. Twice: one weight may dwarf all others, and what
    remains there is far below the rounding of the first mean."""
    total = w.sum(-1, keepdim=True)
    y = y - _dot(w, y) / total
    return y.sub_(_dot(w, y) / total)


def _resolvent(y: Tensor, w: Tensor, e2: Tensor, nu: Tensor) -> Tensor:
    """(nu - e2 M)^{-1} y with M = diag(w) - w w^T / sum(w), nu > e2 max(w)."""
    gap = nu - e2 * w
    a, b = y / gap, w / gap
    return a - b * (e2 * _dot(w, a) / (w.sum(-1, keepdim=True) + e2 * _dot(w, b)))
