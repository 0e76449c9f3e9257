"""The Gauss-Newton local Hessian, scale J^T J, of a least-squares problem."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..problems import LeastSquares
from ..problems.dense import DENSE_ENTRIES
from ..problems.operator import DENSE_PASSES
from .curvature import Curvature
from .lanczos import extreme_eigenvalues
from .layout import Layout
from .singular_values import closed_form, dense_fits, distinct, jacobians, unit
from .spectrum import Spectrum


class GaussNewton(Curvature):
    """scale J^T J, positive semidefinite."""

    def __init__(self, problem: LeastSquares, layout: Layout) -> None:
        super().__init__(layout, problem.residual)
        self.problem = problem

    def product(self, step: Tensor) -> Tensor:
        return self.problem.normal(step)

    def trace(self) -> tuple[float, bool]:
        problem = self.problem
        found, exact = problem.traces()
        # One value alone stands for all groups.
        repeats = problem.systems // problem.damping_group // max(found.numel(), 1)
        return problem.scale * float(found.double().sum()) * repeats, exact

    def all_eigenvalues(self, work: float, rcond: float | None) -> Spectrum | None:
        problem, copies = distinct(self.problem)
        values = closed_form(problem)
        if values is not None:
            return self._squared(values, 1, problem.cut_group, copies, "closed form", rcond)
        if dense_fits(problem, work):
            parts = [self._svd(J) for _, J in jacobians(problem)]
            values = torch.cat(parts) if parts else self.like.new_zeros(0, 0).double()
            size = min(problem.residual.shape[1], problem.unknowns)
            return self._squared(values, size, problem.cut_group, copies, "svd", rcond)
        return self._gram(problem, copies, work, rcond)

    def _svd(self, J: Tensor) -> Tensor:
        checks.finite("the Jacobian", J)
        found: Tensor = torch.linalg.svdvals(J.double())
        return found

    def _squared(
        self,
        values: Tensor,
        size: int,
        group: int,
        copies: int,
        method: str,
        rcond: float | None,
    ) -> Spectrum:
        """Eigenvalues from singular values; the cut is made on these, and zeros are filled up."""
        relative = size * self.eps if rcond is None else rcond
        missing = self.layout.n - values.shape[1]
        squares = torch.nn.functional.pad(self.problem.scale * values.square(), (0, missing))
        return Spectrum.of_systems(squares, relative**2, method, group=group, copies=copies)

    def _gram(
        self, problem: LeastSquares, copies: int, work: float, rcond: float | None
    ) -> Spectrum | None:
        """J^T J or J J^T by products, where J itself is too large and its short side is not."""
        rows, n = problem.residual.shape[1], problem.unknowns
        side = min(rows, n)
        small = side <= DENSE_PASSES and problem.systems * side**2 <= DENSE_ENTRIES
        if not small or problem.systems * side**3 > work:
            return None
        dual = rows < n

        def product(u: Tensor) -> Tensor:
            return problem.jvp(problem.vjp(u)) if dual else problem.vjp(problem.jvp(u))

        G = torch.stack([product(unit(problem, side, k)) for k in range(side)], 2)
        checks.finite("the local Hessian", G)
        G = G.double()
        values = torch.linalg.eigvalsh((G + G.mT) / 2).flip(-1).clamp_min(0.0)
        values = torch.nn.functional.pad(problem.scale * values, (0, n - side))
        relative = max(rows, n) * self.eps if rcond is None else rcond**2
        group = problem.cut_group
        return Spectrum.of_systems(values, relative, "gram", group=group, copies=copies)

    def extreme_eigenvalues(self, k: int, rcond: float | None) -> Spectrum:
        problem, copies = distinct(self.problem)
        size = problem.systems * problem.unknowns
        wanted = min(-(-k // copies), size - 1)

        def product(v: Tensor) -> Tensor:
            out = problem.normal(v.view(problem.systems, -1)).reshape(-1)
            checks.finite("the local Hessian's product", out)
            return out

        values = extreme_eigenvalues(product, self.like.new_empty(size), wanted)
        values = values.double().clamp_min(0.0)
        return self._largest(values, k, copies, rcond)

    def blocks(self) -> Tensor:
        problem, copies = distinct(self.problem)
        parts = []
        if dense_fits(problem, float("inf")):
            parts = [(J.mT.double() @ J.double()) * problem.scale for _, J in jacobians(problem)]
            found = torch.cat(parts).to(self.like)
        else:
            n = problem.unknowns
            found = torch.stack([problem.normal(unit(problem, n, k)) for k in range(n)], 2)
        return found.repeat_interleave(copies, 0)
