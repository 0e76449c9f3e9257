"""Condition numbers of one side's local Hessian, at a bounded cost (derived here).

H = scale J^T J falls into independent systems. A few of them, evenly spaced, are looked at: their
eigenvalues are the squared singular values of J, or the eigenvalues of J^T J where J is long. Where
its short side is too long for that, a short Lanczos process tells the largest eigenvalue, and the
trace the mean one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problems import DenseBatch, LeastSquares
from ..problems.dense import DENSE_ENTRIES
from .plain import finite
from .spread import Spread

#: Short side of a system's J up to which it is formed: products with the block that this takes.
EXACT_SIDE = 256
#: Most systems that are looked at, and the flops (rows n min(rows, n)) that their singular values
#: may cost; a J above that is squared instead, up to the second limit.
MOST_SYSTEMS, SVD_FLOPS, GRAM_FLOPS = 16, 2**28, 2**33
#: Products with H that estimate the largest eigenvalue of what is larger.
LANCZOS_STEPS = 16


@dataclass(frozen=True)
class Spectrum:
    """What is known of the eigenvalues of H (with its factor 1/m on the weight side).

    A spread is over the systems that were looked at.

    Attributes:
        systems: how many systems were looked at.
        exact: whether from all singular values of those; else from products with H alone.
        reason: why not exact, else ``None``.
        largest: largest eigenvalue of a system; if not exact, a Lanczos value at most that large.
        trace_mean: mean eigenvalue over all systems.
        trace: ``"exact"`` or ``"estimated"``.
        rank: singular values above sqrt(n eps) times the largest; ``None`` if not exact.
        condition: largest over smallest eigenvalue on the range (what the rank counts), over the
            systems whose J is not 0 (a unit that is active on no sample has rank 0 and none);
            ``None`` if there is no such system, or not exact.
        condition_damped: of H + damping I as it was solved: (largest + damping) / (smallest +
            damping), all unknowns counted. If not exact, with 0 for the smallest: an upper bound
            up to the error of ``largest``, reached where J has a null space. Over the systems
            whose damping is not 0 (relative damping of a system with J = 0 is); ``None`` where the
            solver solves no damped system of this H, or at damping 0.
    """

    systems: int
    exact: bool
    reason: str | None
    largest: Spread | None
    trace_mean: float
    trace: str
    rank: Spread | None
    condition: Spread | None
    condition_damped: Spread | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dict(self.__dict__, trace_mean=finite(self.trace_mean))
        return {k: v.as_dict() if isinstance(v, Spread) else v for k, v in values.items()}


def spectrum(problem: LeastSquares, damping: float | Tensor | None) -> Spectrum:
    """Look at the eigenvalues of a problem's H.

    Args:
        damping: that in force on the scale of H: a float, or one value per damping group;
            ``None`` or 0: no damped system is asked for.
    """
    groups = problem.systems // problem.cut_group
    size = (problem.residual.shape[1], problem.unknowns)
    traces, known = problem.traces()
    mean = float(traces.double().mean()) * problem.scale
    mean /= max(problem.damping_group * problem.unknowns, 1)
    count, reason = _affordable(groups, problem.cut_group, size)
    index = torch.arange(count) * groups // max(count, 1)
    rank = condition = None
    if reason is None:
        values = _eigenvalues(problem, index) * problem.scale
        largest = values.amax(-1)
        # The rank cut of the direct solvers, on singular values: the eigenvalues' is its square.
        eps = torch.finfo(problem.residual.dtype).eps
        inside = values > max(size[0], size[1] * problem.cut_group) * eps * largest.unsqueeze(-1)
        kept = values.masked_fill(~inside, float("inf")).amin(-1)
        rank, condition = Spread.of(inside.sum(-1)), Spread.of((largest / kept)[largest > 0])
        smallest = values.amin(-1) if size[0] >= size[1] else torch.zeros_like(largest)
    else:
        largest = _largest(problem, index) * problem.scale
        smallest = torch.zeros_like(largest)
    shift = _shift(problem, damping, index.to(largest.device))
    damped = None if shift is None else _damped(largest, smallest, shift)
    return Spectrum(
        count,
        reason is None,
        reason,
        Spread.of(largest),
        mean,
        "exact" if known else "estimated",
        rank,
        condition,
        damped,
    )


def _affordable(groups: int, members: int, size: tuple[int, int]) -> tuple[int, str | None]:
    """How many systems to look at, and why their singular values are not affordable, if so."""
    short, long = min(size), max(size)
    most = min(groups, MOST_SYSTEMS)
    if short > EXACT_SIDE:
        return most, f"{size[0]} x {size[1]} Jacobian: its short side is above {EXACT_SIDE}"
    flops = members * long * short**2
    if flops > GRAM_FLOPS:
        return most, f"{members} x {size[0]} x {size[1]} Jacobian: above {GRAM_FLOPS:.1e} flops"
    return min(most, max(1, SVD_FLOPS // max(flops, 1))), None


def _eigenvalues(problem: LeastSquares, index: Tensor) -> Tensor:
    """Of J^T J, or J J^T where that is smaller: shape (len(index), members * short side)."""
    chosen, rows = _members(problem, index)
    shape = (problem.residual.shape[1], problem.unknowns)
    flops = len(rows) * max(shape) * min(shape) ** 2
    if not flops:
        return problem.residual.new_zeros(len(index), 1, dtype=torch.float64)
    if flops <= SVD_FLOPS and len(rows) * shape[0] * shape[1] <= DENSE_ENTRIES:
        values: Tensor = torch.linalg.svdvals(_jacobian(chosen, rows).double()).square()
    else:
        # Of so long a J the rounding of the products stays below the rank cut, long * eps.
        values = torch.linalg.eigvalsh(_gram(chosen, rows).double()).clamp_min(0)
    return values.reshape(len(index), -1)


def _members(problem: LeastSquares, index: Tensor) -> tuple[LeastSquares, Tensor]:
    """The problem, cut down to the chosen systems where it can be, and where they stand in it."""
    offsets = torch.arange(problem.cut_group)
    rows = (index.unsqueeze(-1) * problem.cut_group + offsets).flatten().to(problem.residual.device)
    if problem.separable:
        return problem.take(rows), torch.arange(len(rows), device=rows.device)
    return problem, rows


def _jacobian(problem: LeastSquares, chosen: Tensor) -> Tensor:
    """J of the chosen systems, or its transpose: (count, short side, long side)."""
    if isinstance(problem, DenseBatch):
        return problem.jacobian[chosen]
    by_rows = problem.residual.shape[1] <= problem.unknowns
    return _columns(problem, problem.vjp if by_rows else problem.jvp, chosen)


def _gram(problem: LeastSquares, chosen: Tensor) -> Tensor:
    """J^T J or J J^T of the chosen systems, whichever is smaller: (count, short, short)."""
    by_rows = problem.residual.shape[1] <= problem.unknowns
    first, second = (problem.vjp, problem.jvp) if by_rows else (problem.jvp, problem.vjp)
    return _columns(problem, lambda unit: second(first(unit)), chosen)


def _columns(problem: LeastSquares, product: Callable[[Tensor], Tensor], chosen: Tensor) -> Tensor:
    """A product with every unit vector of the short side, stacked along dimension 1."""
    length, parts = min(problem.residual.shape[1], problem.unknowns), []
    for k in range(length):
        unit = problem.residual.new_zeros(problem.systems, length)
        unit[:, k] = 1
        parts.append(product(unit)[chosen])
    return torch.stack(parts, 1)


def _largest(problem: LeastSquares, index: Tensor) -> Tensor:
    """Largest Ritz value of J^T J of every chosen system after a few Lanczos steps.

    Without reorthogonalisation, so that three vectors are held: its ghosts repeat converged values
    and leave the largest alone.
    """
    chosen, rows = _members(problem, index)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(chosen.unknowns, generator=generator, dtype=torch.float64, device="cpu")
    q = (start / start.norm()).to(chosen.residual).expand(chosen.systems, -1)
    before, beta = torch.zeros_like(q), q.new_zeros(chosen.systems, 1)
    diagonal, off = [], []
    for _ in range(min(LANCZOS_STEPS, chosen.unknowns)):
        w = chosen.vjp(chosen.jvp(q)) - beta * before
        alpha = (w * q).sum(-1, keepdim=True)
        w = w - alpha * q
        beta = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        diagonal.append(alpha[rows, 0].double())
        off.append(beta[rows, 0].double())
        # A spent Krylov space goes on with 0, which adds nothing but zeros.
        before, q = q, torch.where(beta > 0, w / beta, torch.zeros_like(w))
    if not diagonal:
        return chosen.residual.new_zeros(len(index), dtype=torch.float64)
    T = torch.diag_embed(torch.stack(diagonal, -1))
    if len(off) > 1:
        T = T + torch.diag_embed(torch.stack(off[:-1], -1), -1)  # eigvalsh reads the lower half
    ritz: Tensor = torch.linalg.eigvalsh(T)[:, -1].clamp_min(0)
    return ritz.reshape(len(index), -1).amax(-1)


def _damped(largest: Tensor, smallest: Tensor, shift: Tensor) -> Spread | None:
    """Condition of H + damping I over the systems that are damped."""
    solved = shift > 0
    return Spread.of(((largest + shift) / (smallest + shift))[solved])


def _shift(problem: LeastSquares, damping: float | Tensor | None, index: Tensor) -> Tensor | None:
    """The damping of the chosen systems, shape (len(index),)."""
    if damping is None or (not isinstance(damping, Tensor) and damping == 0):
        return None
    values = torch.as_tensor(damping, dtype=torch.float64, device=index.device).reshape(-1)
    each = problem.systems // len(values)  # systems of ours that share one value
    return values[index * problem.cut_group // max(each, 1)]
