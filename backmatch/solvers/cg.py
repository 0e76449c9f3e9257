"""Conjugate gradient on the normal equations, one Krylov space per system."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..linalg._fused_cg import Apply
from ..linalg.krylov import DEFAULT_RTOL, CGResult, conjugate_gradient
from ..problems import LeastSquares, Preconditioner
from .base import Solution, Solver, record_for
from .damping import Damping, Resolved, check, resolve

#: (problem, damping) -> preconditioner for that problem.
PreconditionerFactory = Callable[[LeastSquares, "float | Tensor"], Preconditioner]


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradient from 0 (Hestenes and Stiefel 1952).

    One system per sample (inputs), per output unit (Linear with elementwise slopes), one joint
    system otherwise; the report's ``structure`` says which. Each stops by itself, on its
    recomputed residual.

    Args:
        damping: a float >= 0 or :class:`Relative`. At 0 the minimum-norm solution is approached.
        rtol: relative residual of the normal equations; ``None``: 1e-5 in float32, 1e-10 in
            float64; 0 runs exactly ``max_steps`` without a warning.
        max_steps: cap; ``None``: 10 n (at least 1).
        preconditioner: ``None``; ``"jacobi"``: the diagonal of H + damping; ``"shared"``: one
            Cholesky of the family at its mean scaling; both for Linear and Conv2d blocks with
            elementwise activations; or a callable ``(problem, damping) -> apply`` where ``apply``
            maps residuals (systems, n) to approximate solutions.

    >>> CG(damping=1e-3, max_steps=5, rtol=0)
    CG(damping=0.001, rtol=0.0, max_steps=5, preconditioner=None)
    """

    damping: Damping
    rtol: float | None = None
    max_steps: int | None = None
    preconditioner: str | PreconditionerFactory | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", check("CG damping", self.damping))
        if self.rtol is not None:
            object.__setattr__(self, "rtol", checks.non_negative("CG rtol", self.rtol))
        if self.max_steps is not None:
            checks.positive_int("CG max_steps", self.max_steps)
        known = self.preconditioner in (None, "jacobi", "shared") or callable(self.preconditioner)
        if not known:
            raise ValueError(
                'CG preconditioner must be None, "jacobi", "shared" or a callable '
                f"(problem, damping) -> apply, got {self.preconditioner!r}"
            )

    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        return resolve(self.damping, problem)

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        assert damping is not None
        shift = damping.per_system()
        g = problem.gradient()
        # The positions of one sample are one Krylov system: (samples, positions * n, 1).
        krylov = (problem.systems // problem.cut_group, problem.cut_group * problem.unknowns, 1)
        inner = self._preconditioner(problem, shift)

        def restrict(index: Tensor) -> tuple[Apply, Apply | None]:
            part = problem.take(index)
            some = shift[index] if isinstance(shift, Tensor) else shift
            # Only Jacobi's preconditioner differs from system to system.
            own = self._preconditioner(part, some) if self.preconditioner == "jacobi" else inner
            return _damped(part, some), own

        known = self.preconditioner is None or isinstance(self.preconditioner, str)
        separable = problem.separable and problem.cut_group == 1
        result = conjugate_gradient(
            _damped(problem, shift),
            g.reshape(krylov),
            rtol=DEFAULT_RTOL[g.dtype] if self.rtol is None else self.rtol,
            max_steps=self.max_steps or max(10 * krylov[1], 1),
            preconditioner=inner,
            restrict=restrict if known and separable else None,
        )
        iterations, residual, converged = _worst(result)
        # Every entry of g and of the step is in the residual.
        sound = math.isfinite(residual)
        if not sound:
            checks.finite("gradient of the local loss", g)
        record = record_for(
            "cg",
            problem,
            damping,
            iterations=iterations,
            residual=residual,
            converged=self.rtol == 0.0 or converged,
        )
        return Solution(result.x.reshape(g.shape), record, known_finite=sound)

    def _preconditioner(
        self, problem: LeastSquares, damping: float | Tensor
    ) -> Preconditioner | None:
        if self.preconditioner is None:
            return None
        inner: Preconditioner
        if self.preconditioner == "jacobi":
            shift = damping.unsqueeze(-1) if isinstance(damping, Tensor) else damping
            size = problem.scale * problem.diagonal() + shift
            inverse = torch.where(size > 0, size.reciprocal(), 1.0)
            inner = inverse.mul
        elif isinstance(self.preconditioner, str):
            inner = problem.shared_preconditioner(damping)
        else:
            inner = self.preconditioner(problem, damping)
        n = problem.unknowns
        return lambda residual: inner(residual.reshape(-1, n)).reshape(residual.shape)


def _damped(problem: LeastSquares, shift: float | Tensor) -> Apply:
    """p -> (H + damping) p on Krylov vectors, whose positions may be several systems."""
    column = shift.unsqueeze(-1) if isinstance(shift, Tensor) else None

    def apply(P: Tensor) -> Tensor:
        p = P.reshape(-1, problem.unknowns)
        out = problem.normal(p)
        if column is None:
            return torch.add(out, p, alpha=float(shift)).reshape(P.shape)
        return torch.addcmul(out, column, p).reshape(P.shape)

    return apply


def _worst(result: CGResult) -> tuple[int, float, bool]:
    """Most iterations, largest residual and whether all converged, in one wait for the device."""
    if not result.converged.numel():
        return 0, 0.0, True
    worst = (result.iterations.amax(), result.residual.amax(), result.converged.all())
    iterations, residual, converged = torch.stack([value.double() for value in worst]).tolist()
    return int(iterations), residual, bool(converged)
