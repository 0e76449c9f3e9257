"""Singular values of a least-squares problem's Jacobians, by what its structure allows.

From J itself, in float64: squaring into J^T J first would lose every singular value below
sqrt(eps) of the largest. Matrices that many systems share are decomposed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..problems import (
    BatchNormInputs,
    DenseBatch,
    Diagonal,
    Kronecker,
    LeastSquares,
    PatchFamily,
    ScaledGram,
    SharedOperator,
)
from ..problems.dense import DENSE_ENTRIES
from ..problems.operator import DENSE_PASSES

#: Entries of the Jacobians that are decomposed at a time.
CHUNK_ENTRIES = 2**22


def distinct(problem: LeastSquares) -> tuple[LeastSquares, int]:
    """The same problem without repeated systems, and how often each of its systems stands."""
    systems = problem.systems
    if isinstance(problem, (ScaledGram, SharedOperator)):
        if problem.slopes is not None or problem.columns is not None:
            return problem, 1
        first = problem.residual[:1]
        if isinstance(problem, ScaledGram):
            return replace(problem, residual=first, damping_group=1, cut_group=1), systems
        return replace(problem, residual=first, outside=None), systems
    if isinstance(problem, Kronecker):
        return replace(problem, residual=problem.residual[:1], maps=1), systems
    if isinstance(problem, PatchFamily) and problem.slopes is None and problem.normed is None:
        groups = problem.patches.groups
        one = replace(
            problem,
            patches=replace(problem.patches, units=groups),
            residual=problem.residual[:groups],
            damping_group=1,
            cut_group=1,
            outside=None,
        )
        return one, systems // groups
    return problem, 1


def closed_form(problem: LeastSquares) -> Tensor | None:
    """All singular values in float64, (systems, count), where they can be written down."""
    if isinstance(problem, Diagonal):
        return problem.slopes.abs().double()
    if isinstance(problem, BatchNormInputs):
        return _batch_norm(problem)
    if isinstance(problem, Kronecker):
        factors = (problem.first.double(), problem.second.double())
        first, second = (torch.linalg.svdvals(factor) for factor in factors)
        return torch.outer(first, second).reshape(1, -1).expand(problem.systems, -1)
    return None


def _batch_norm(problem: BatchNormInputs) -> Tensor:
    """Per channel 0 on the constants, k e on x, and k on the rest."""
    k, e, N = problem.slopes.abs().double(), problem.shrink.double(), problem.entries
    if N < 2:
        return torch.zeros_like(k).reshape(1, -1)
    return torch.cat([torch.zeros_like(k), k * e, k.repeat_interleave(N - 2)]).unsqueeze(0)


def dense_fits(problem: LeastSquares, work: float) -> bool:
    """Whether the Jacobians can be formed and decomposed for at most ``work`` (min^2 max each)."""
    rows, n = problem.residual.shape[1], problem.unknowns
    short, long = sorted((rows, n))
    if problem.systems * short**2 * long > work:
        return False
    if isinstance(problem, (ScaledGram, DenseBatch)):
        return rows * n <= DENSE_ENTRIES
    return short <= DENSE_PASSES and problem.systems * rows * n <= DENSE_ENTRIES


def jacobians(problem: LeastSquares) -> Iterator[tuple[slice, Tensor]]:
    """The Jacobians (systems, rows, n) of some systems at a time."""
    rows, n = problem.residual.shape[1], problem.unknowns
    if not isinstance(problem, ScaledGram):
        yield slice(0, problem.systems), _by_products(problem, rows, n)
        return
    step = max(1, CHUNK_ENTRIES // max(rows * n, 1))
    for start in range(0, problem.systems, step):
        part = slice(start, min(start + step, problem.systems))
        J = problem.matrix.expand(part.stop - start, -1, -1)
        if problem.slopes is not None:
            J = J * problem.slopes[part].unsqueeze(-1)
        if problem.columns is not None:
            J = J * problem.columns[part].unsqueeze(-2)
        yield part, J


def _by_products(problem: LeastSquares, rows: int, n: int) -> Tensor:
    if isinstance(problem, DenseBatch):
        return problem.jacobian
    by_rows = rows <= n
    length = rows if by_rows else n
    product = problem.vjp if by_rows else problem.jvp
    parts = [product(unit(problem, length, k)) for k in range(length)]
    if not parts:
        return problem.residual.new_zeros(problem.systems, rows, n)
    return torch.stack(parts, 1 if by_rows else 2)


def unit(problem: LeastSquares, length: int, k: int) -> Tensor:
    """The k-th unit vector in every system, (systems, length)."""
    vector = problem.residual.new_zeros(problem.systems, length)
    vector[:, k] = 1.0
    return vector
