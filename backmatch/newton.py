"""Gauss-Newton on one side of one block: linearised steps on a fixed nonlinear objective.

    phi(d) = scale/2 |T(. + d) - zhat|^2 + lambda/2 |d|^2

One step (the default) is the full step of the first linearisation, untested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .blocks import Linearisation
from .problems import LeastSquares
from .solvers import Resolved, Solution, Solver

#: Poses one side's problem at a linearisation for a displacement.
Pose = Callable[[Linearisation, Tensor], LeastSquares]

MAX_HALVINGS = 10


def minimise(
    solver: Solver,
    pose: Pose,
    evaluate: Callable[[Tensor], Linearisation],
    start: Linearisation,
    displacement: Tensor,
    newton_steps: int,
) -> Solution:
    """The step d of one side, shape (systems, n), from the linearisation ``start``.

    Args:
        evaluate: d -> linearisation at the start moved by d.
        displacement: zhat - T at the start.
        newton_steps: linearisations; solvers that are no least-squares solve take one step.
    """
    problem = pose(start, displacement)
    damping = solver.damping_for(problem)
    if newton_steps == 1 or not solver.solves_least_squares:
        return solver.solve(problem, damping)
    target = start.output + displacement
    d = torch.zeros_like(problem.gradient())
    record = None
    for _ in range(newton_steps):
        solution = _linearised(solver, problem, damping, d)
        record = solution.record.after(record)
        d, problem = _halved(pose, evaluate, target, problem, damping, d, solution.step)
    assert record is not None
    return Solution(d, record)


def _linearised(
    solver: Solver, problem: LeastSquares, damping: Resolved | None, d: Tensor
) -> Solution:
    """Solve (H + lambda I) p = g - lambda d.

    With q = p + d this is (H + lambda I) q = J^T (rho + J d), an ordinary problem. At lambda = 0
    q would differ from p + d in the null space of J, so there p is solved for itself.
    """
    if damping is None or damping.is_zero:
        return solver.solve(problem, damping)
    shifted = problem.with_residual(problem.residual + problem.jvp(d))
    solution = solver.solve(shifted, damping)
    return replace(solution, step=solution.step - d)


def _halved(
    pose: Pose,
    evaluate: Callable[[Tensor], Linearisation],
    target: Tensor,
    problem: LeastSquares,
    damping: Resolved | None,
    d: Tensor,
    p: Tensor,
) -> tuple[Tensor, LeastSquares]:
    """Halve p, per system, until that system's phi falls; a system that never falls stays."""
    before = _phi(problem, damping, d)
    length = torch.ones_like(before)
    # A system that is solved already has p = 0 and would never fall.
    moving = (p != 0).any(-1).reshape(-1, problem.cut_group).any(-1)
    for halving in range(MAX_HALVINGS + 1):
        moved = d + p * length.repeat_interleave(problem.cut_group).unsqueeze(-1)
        at = evaluate(moved)
        trial = pose(at, target - at.output)
        # "not <" rather than ">=": a NaN has not fallen.
        rising = ~(_phi(trial, damping, moved) < before) & moving
        if not bool(rising.any()):
            return moved, trial
        smaller = length / 2 if halving < MAX_HALVINGS else torch.zeros_like(length)
        length = torch.where(rising, smaller, length)
    moved = d + p * length.repeat_interleave(problem.cut_group).unsqueeze(-1)
    at = evaluate(moved)
    return moved, pose(at, target - at.output)


def _phi(problem: LeastSquares, damping: Resolved | None, d: Tensor) -> Tensor:
    """phi of every independent system (samples with several positions count as one)."""
    shift = 0.0 if damping is None else damping.per_system()
    squares = problem.residual.square().sum(-1)
    if problem.outside is not None:
        squares = squares + problem.outside
    values = problem.scale * squares + shift * d.square().sum(-1)
    return values.reshape(-1, problem.cut_group).sum(-1) / 2
