"""What a solver is: a frozen bag of options with one method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import checks
from ..errors import NotPositiveDefiniteError
from ..problems import LeastSquares
from .damping import Resolved
from .record import SolveRecord


@dataclass(frozen=True)
class Solution:
    """A step and what it took to get it.

    Attributes:
        step: shape (systems, n).
        record: for the report.
        known_finite: whether the step is known to hold no NaN or Inf.
    """

    step: Tensor
    record: SolveRecord
    known_finite: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether the step holds no NaN or Inf; may say no where it is huge."""
        return self.known_finite or math.isfinite(self.step.sum().item())


class Solver(ABC):
    """One point on the continuum from back-propagation to exact back-matching."""

    #: Whether ``newton_steps`` repeats this solver; the others take their one step.
    solves_least_squares = True

    @abstractmethod
    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        """The damping in force for ``problem``; ``None`` where the solver has none."""

    @abstractmethod
    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        """Solve with a damping from :meth:`damping_for` of this problem or an earlier one."""


def record_for(
    solver: str, problem: LeastSquares, damping: Resolved | None = None, **fields: Any
) -> SolveRecord:
    """The record fields that come from the problem and its damping, plus ``fields``."""
    return SolveRecord(
        solver,
        problem.structure,
        problem.systems // problem.cut_group,
        problem.unknowns * problem.cut_group,
        damping=None if damping is None else damping.reported,
        trace=None if damping is None else damping.trace,
        **fields,
    )


def solve_directly(
    name: str, problem: LeastSquares, damping: Resolved, rcond: float | None
) -> Solution:
    """Direct solve, its failures raised and its residual measured."""
    # H + lambda I = scale (J^T J + lambda/scale I)
    shift = damping.per_system(problem.scale)
    result = problem.direct(shift, rcond)
    residual = problem.relative_residual(result.step, shift)
    # A failed system is NaN, and every entry of the step is in the residual.
    if not math.isfinite(residual) and result.info is not None and bool(result.info.any()):
        # An overflow or an infinite slope is no lack of damping.
        checks.finite("trace of the local Hessian", problem.traces()[0])
        checks.finite("gradient of the local loss", problem.gradient())
        bad = result.info.nonzero().flatten()
        raise NotPositiveDefiniteError(
            "the damped normal matrix", bad.tolist(), result.info[bad].tolist(), problem.systems
        )
    record = record_for(name, problem, damping, residual=residual, rank=result.rank)
    return Solution(result.step, record, known_finite=math.isfinite(residual))
