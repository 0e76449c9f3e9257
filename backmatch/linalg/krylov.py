"""Conjugate gradient on many systems at once, each with its own stop.

The loop :func:`conjugate_gradient` is written once, for any operator; :func:`cg` and
:func:`scaled_gram_cg` hand what has a kernel of its own to that, which follows the same rules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _cuda_cg
from ._fused_cg import Apply, FusedRun, Restrict

#: Relative residual at which a system counts as solved when ``rtol`` is ``None``.
DEFAULT_RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}


class CGResult(NamedTuple):
    """What conjugate gradient found, one entry per system in the last three.

    Attributes:
        x: the solutions.
        iterations: int64, steps that the system took.
        residual: recomputed ``|b - A x| / |b|``; 0 where b = 0.
        converged: bool, ``|b - A x| <= rtol |b|``.
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor


@torch.no_grad()
def conjugate_gradient(
    apply: Apply,
    B: Tensor,
    *,
    rtol: float,
    max_steps: int,
    preconditioner: Apply | None = None,
    x0: Tensor | None = None,
    restrict: Restrict | None = None,
) -> CGResult:
    """Preconditioned conjugate gradient (Hestenes and Stiefel 1952) on every column of ``B``.

    One Krylov system per column. A system pauses when its recursive residual reaches
    ``rtol |b|``, after ``max_steps`` steps, or for good when ``p^T A p <= 0`` (or anything in it
    is not finite); a paused system does not change any more. When all pause, the true residuals
    are computed, and systems that are not there yet go on from them: rounding in the recursion
    neither ends a solve too early nor lets one run past convergence.

    Args:
        apply: the damped symmetric positive definite operator on tensors of B's shape.
        B: shape (..., n, k).
        rtol: relative residual to reach; 0 takes exactly ``max_steps`` steps, unless a system
            breaks down or is solved exactly.
        max_steps: cap per system.
        preconditioner: residual -> approximate solution, symmetric positive definite.
        x0: start, shape of ``B``; 0 if ``None``. Where b = 0 the result is 0 whatever the start.
        restrict: for B of shape (systems, n, 1): indices -> operator and preconditioner of those
            systems alone, so that finished ones leave the products (on the CPU).

    Returns:
        x of shape (..., n, k); iterations, residual and converged of shape (..., k).
    """
    if B.shape[-2] == 0:
        return _nothing_to_solve(B)
    scale = _power_of_two(B)
    B = (B / scale).contiguous()
    norm = torch.linalg.vector_norm(B, dim=-2)
    target = rtol * norm
    if x0 is None:
        X, R = torch.zeros_like(B), B.clone()
    else:
        X = (x0 / scale).masked_fill((norm == 0).unsqueeze(-2), 0).contiguous()
        R = B - apply(X)
    steps = torch.zeros_like(norm, dtype=torch.int64)
    alive = torch.ones_like(norm, dtype=torch.bool)
    rounds = _Rounds(B, max_steps)
    while True:
        distance = torch.linalg.vector_norm(R, dim=-2)
        running = alive & (distance > target) & (steps < max_steps)
        if not rounds.another(running):
            break
        _run(
            apply, preconditioner, X, R, running, alive, steps, target, max_steps, restrict, rounds
        )
        R = B - apply(X)
    residual = (distance / norm).masked_fill(norm == 0, 0)
    return CGResult(X * scale, steps, residual, distance <= target)


class _Rounds:
    """Whether another round of steps follows, and how many steps it may take.

    Where nothing can be looked at (:mod:`_cuda_cg`) the rounds are counted instead.
    """

    def __init__(self, B: Tensor, max_steps: int) -> None:
        self.on_cuda, self.steps, self.done = _cuda_cg.on_cuda(B) and B.numel() > 0, max_steps, 0
        self.counted = _cuda_cg.capturing(B)
        self.looks = _cuda_cg.Looks() if self.on_cuda and not self.counted else None

    def another(self, running: Tensor) -> bool:
        if self.looks is not None:
            return self.looks.now(running)
        if not self.on_cuda:
            return bool(running.any())
        if self.done > 0:
            self.steps = min(self.steps, _cuda_cg.STEPS_OF_RESTART)
        self.done += 1
        return self.done <= 1 + _cuda_cg.RESTARTS_IN_GRAPH


def _run(
    apply: Apply,
    preconditioner: Apply | None,
    X: Tensor,
    R: Tensor,
    running: Tensor,
    alive: Tensor,
    steps: Tensor,
    target: Tensor,
    max_steps: int,
    restrict: Restrict | None,
    rounds: _Rounds,
) -> None:
    """Iterate until every system pauses; updates X, alive and steps in place."""
    arrays = (X, R, running, alive, steps, target, max_steps)
    if rounds.on_cuda:
        _cuda_cg.CudaRun(apply, preconditioner, *arrays, rounds.steps, rounds.looks)()
    elif X.shape[-1] == 1:
        FusedRun(apply, preconditioner, *arrays, restrict)()
    else:
        _plain_run(apply, preconditioner, *arrays)


def _plain_run(
    apply: Apply,
    preconditioner: Apply | None,
    X: Tensor,
    R: Tensor,
    running: Tensor,
    alive: Tensor,
    steps: Tensor,
    target: Tensor,
    max_steps: int,
) -> None:
    """Iterate until every system pauses; updates X, R, alive and steps in place."""
    Z = R if preconditioner is None else preconditioner(R)
    P, rho = Z.clone(), _dot(R, Z)
    while True:
        Q = apply(P)
        curvature = _dot(P, Q)
        sound = (curvature > 0) & (curvature < torch.inf) & (rho > 0)
        alive &= sound | ~running
        running = running & sound
        alpha = torch.where(running, rho / curvature, 0).unsqueeze(-2)
        X.addcmul_(alpha, P)
        R.addcmul_(alpha, Q, value=-1)
        steps += running
        running = running & (torch.linalg.vector_norm(R, dim=-2) > target)
        running = running & (steps < max_steps)
        Z = R if preconditioner is None else preconditioner(R)
        rho, previous = _dot(R, Z), rho
        # A paused system has beta = 0, so that its unused direction stays bounded.
        beta = torch.where(running, rho / previous, 0).unsqueeze(-2)
        P = torch.addcmul(Z, beta, P)
        if not bool(running.any()):
            return


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-2)


def _power_of_two(B: Tensor) -> Tensor:
    """The power of two next below each column's largest entry, shape (..., 1, k).

    Dividing by it is exact, and squared norms of tiny or huge columns stay in range.
    """
    largest = B.abs().amax(-2, keepdim=True)
    exponent = torch.frexp(largest).exponent - 1
    return torch.ldexp(torch.ones_like(largest), exponent)


def _nothing_to_solve(B: Tensor) -> CGResult:
    columns = (*B.shape[:-2], B.shape[-1])
    return CGResult(
        B.clone(),
        B.new_zeros(columns, dtype=torch.int64),
        B.new_zeros(columns),
        B.new_ones(columns, dtype=torch.bool),
    )
