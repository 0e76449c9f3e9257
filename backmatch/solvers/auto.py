"""The default: direct where the structure makes it cheap, conjugate gradient otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from ..problems import LeastSquares
from .base import Solution
from .cg import CG
from .cholesky import Cholesky
from .damping import Resolved


@dataclass(frozen=True)
class Auto(Cholesky):
    """:class:`Cholesky` where that is cheap, :class:`CG` at its default tolerance otherwise.

    Linear layers with elementwise activations; normalisations, pooling and activations alone; the
    weights of convolutions (with batch norm, activation and max pooling) and their inputs where
    the estimated flops stay below those of conjugate gradient; and any other block with one side
    of its Jacobian at most 256 (and the Jacobian within 2^25 entries) are solved directly. The
    report's ``solver`` names the route that ran.

    Args:
        damping: a float >= 0 or :class:`Relative`; 0 means minimum norm.
        rcond: rank cut of the direct route at damping 0, as for :class:`Cholesky`.

    >>> Auto(damping=0.5)
    Auto(damping=0.5, rcond=None)
    """

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        assert damping is not None
        cheap = problem.minimum_norm_is_cheap if damping.is_zero else problem.direct_is_cheap
        if cheap:
            return super().solve(problem, damping)
        return CG(self.damping).solve(problem, damping)
