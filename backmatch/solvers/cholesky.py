"""Direct solve: Cholesky in primal or dual form, minimum norm at damping 0."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..problems import LeastSquares
from .base import Solution, Solver, solve_directly
from .damping import Damping, Resolved, check, resolve


@dataclass(frozen=True)
class Cholesky(Solver):
    """The exact step by a direct method.

    Structured blocks use their structure; others form their dense Jacobian below a size and raise
    a ``ValueError`` that names :class:`CG` above it.

    Args:
        damping: a float >= 0 or :class:`Relative`; 0 means minimum norm, ``d = pinv(J) r``, by
            singular values, never by a silent jitter.
        rcond: singular values of J up to ``rcond * sigma_max`` of their own system count as zero;
            ``None``: ``sqrt(n * eps)`` of the dtype. Used at damping 0 only.

    >>> Cholesky(damping=0.0)
    Cholesky(damping=0.0, rcond=None)
    """

    damping: Damping
    rcond: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "damping", check(f"{name} damping", self.damping))
        if self.rcond is not None:
            object.__setattr__(self, "rcond", checks.non_negative(f"{name} rcond", self.rcond))

    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        return resolve(self.damping, problem)

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        assert damping is not None
        return solve_directly("cholesky", problem, damping, self.rcond)
