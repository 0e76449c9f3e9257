"""Invert the activation, then the affine part: the second meaning of an exact input step."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..problems import LeastSquares
from .base import Solution, Solver, solve_directly
from .damping import Damping, Resolved, check, resolve


@dataclass(frozen=True)
class LayerInverse(Solver):
    """Ridge inverse of the affine part after inverting an invertible activation (derived here).

    With ``a = W z + b``, ``z_out = phi(a)`` and target ``zhat``: ``min_d 1/2 |W d - (phi^-1(zhat)
    - a)|^2 + damping/2 |d|^2``, where ``zhat`` is first clamped to the range of phi shrunk by
    ``clamp`` at each bounded end. Inputs only; blocks of one Linear or
    Conv2d and at most one of LeakyReLU, Tanh, Sigmoid, Softplus, ELU. Unlike the other solvers it
    does not linearise phi.

    Args:
        damping: a float >= 0 or :class:`Relative` (of W^T W); 0 means minimum norm.
        clamp: distance kept from the ends of the range, 0 < clamp < 0.5.

    >>> LayerInverse(damping=1e-2)
    LayerInverse(damping=0.01, clamp=0.001)
    """

    damping: Damping
    clamp: float = 1e-3

    solves_least_squares = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "damping", check("LayerInverse damping", self.damping))
        clamp = checks.non_negative("LayerInverse clamp", self.clamp)
        if not 0 < clamp < 0.5:
            raise ValueError(f"LayerInverse clamp must be in (0, 0.5), got {self.clamp}")

    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        return resolve(self.damping, problem)

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        """``problem`` is the affine part's, its residual the inverted displacement."""
        assert damping is not None
        return solve_directly("layer_inverse", problem, damping, None)
