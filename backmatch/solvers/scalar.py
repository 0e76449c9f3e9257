"""One scalar per block and side in place of the local Hessian."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..problems import LeastSquares
from .base import Solution, Solver, record_for
from .damping import Damping, Resolved, check, resolve

KINDS = ("trace", "spectral", "rayleigh")


@dataclass(frozen=True)
class Scalar(Solver):
    """``d = g / (c + damping)`` with one c for the whole batch: the papers' idea, derived here.

    Args:
        kind: ``"trace"``: mean eigenvalue of H; ``"spectral"``: its largest eigenvalue;
            ``"rayleigh"``: ``g^T H g / g^T g``.
        damping: a float >= 0, or :class:`Relative`; c = 0 gives d = 0.

    >>> Scalar("spectral", damping=0.1)
    Scalar(kind='spectral', damping=0.1)
    >>> Scalar("norm")
    Traceback (most recent call last):
    ...
    ValueError: Scalar kind must be one of trace, spectral, rayleigh, got 'norm'
    """

    kind: str = "trace"
    damping: Damping = 0.0

    solves_least_squares = False

    def __post_init__(self) -> None:
        checks.choice("Scalar kind", self.kind, KINDS)
        object.__setattr__(self, "damping", check("Scalar damping", self.damping))

    def damping_for(self, problem: LeastSquares) -> Resolved | None:
        return resolve(self.damping, problem)

    def solve(self, problem: LeastSquares, damping: Resolved | None) -> Solution:
        assert damping is not None
        g = problem.gradient()
        c, trace = curvature(self.kind, problem, g)
        checks.finite(f"{self.kind} of the local Hessian", c)
        step = torch.where(c > 0, g / (c + damping.column()), torch.zeros_like(g))
        record = record_for("scalar", problem, damping, scale=float(c))
        return Solution(step, replace(record, trace=trace or record.trace))


def curvature(kind: str, problem: LeastSquares, g: Tensor) -> tuple[Tensor, str | None]:
    """c of the whole-batch H, 0-dimensional, and how its trace was found.

    Args:
        kind: one of :data:`KINDS`.
        g: the problem's gradient, shape (systems, n); only ``"rayleigh"`` reads it.
    """
    if kind == "trace":
        traces, exact = problem.traces()
        # The mean of the groups' traces over a group's size: groups are equally large.
        size = max(problem.damping_group * problem.unknowns, 1)
        return problem.scale * traces.mean() / size, "exact" if exact else "estimated"
    if kind == "spectral":
        return problem.scale * problem.largest_eigenvalue(), None
    square = g.square().sum()
    bent = (g * problem.normal(g)).sum()
    # Not "square > 0": a NaN must not pass for a zero.
    return torch.where(square == 0, torch.zeros_like(square), bent / square), None
