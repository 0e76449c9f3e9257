"""The plain gradient: on both sides this is back-propagation."""

from __future__ import annotations

from dataclasses import dataclass

from ..problems import LeastSquares
from .base import Solution, Solver, record_for
from .damping import Resolved


@dataclass(frozen=True)
class Gradient(Solver):
    """``d = g``: one gradient step of length 1 on the undamped local loss.

    Weights: ``J^T r / m``; inputs: ``J^T r``. On both sides the sweep then gives autograd's
    gradients times ``target_step``.

    >>> Gradient()
    Gradient()
    """

    solves_least_squares = False

    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        return None

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        return Solution(problem.gradient(), record_for("gradient", problem))
