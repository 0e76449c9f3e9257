"""Scalars of a local Hessian from a few products: Hutchinson's trace, the power iteration.

Probes come from a generator of their own, seeded by what is measured: the global RNG is untouched
and a resumed run draws the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problems import LeastSquares


def hutchinson(problem: LeastSquares, probes: int, seed: int) -> Tensor:
    """Mean eigenvalue of H, 0-dimensional, estimated without bias (Hutchinson 1990).

    tr(J^T J) = E |J^T u|^2 for independent random signs u, one per row of every system: a probe is
    one backward pass over the block for the whole batch, on any route.
    """
    generator = torch.Generator().manual_seed(seed)
    total = problem.residual.new_zeros(())
    for _ in range(probes):
        signs = torch.randint(0, 2, problem.residual.shape, generator=generator, device="cpu")
        total = total + problem.vjp((signs * 2 - 1).to(problem.residual)).square().sum()
    return problem.scale * total / (probes * max(problem.systems * problem.unknowns, 1))


def power(problem: LeastSquares, steps: int, seed: int) -> Tensor:
    """Largest eigenvalue of H over all systems, 0-dimensional, by the power iteration.

    Every system runs its own iteration; the answer is the largest Rayleigh quotient after
    ``steps`` products, which never exceeds the eigenvalue (beyond rounding).
    """
    shape = (problem.systems, problem.unknowns)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    v = _unit(start.to(problem.residual))
    best = v.new_zeros(problem.systems)
    for _ in range(steps):
        bent = problem.normal(v)
        best = (v * bent).sum(-1)
        v = _unit(bent)
    return best.amax() if best.numel() else best.sum()


def _unit(v: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    unit: Tensor = v / size.masked_fill(size == 0, 1)
    return unit
