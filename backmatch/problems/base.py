"""The least-squares problem of one side of one block, split into independent systems.

    min_d  scale/2 |J_s d_s - r_s|^2 + damping_s/2 |d_s|^2,      s = 1..systems

``scale`` is 1/m for weights and 1 for inputs, so that H = scale J^T J, g = scale J^T r are the
local Hessian and the gradient of the block's back-matching loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

#: A preconditioner: residuals (systems, n) -> approximate solutions (systems, n).
Preconditioner = Callable[[Tensor], Tensor]

Self = TypeVar("Self", bound="LeastSquares")


@dataclass(frozen=True)
class Direct:
    """Result of a direct solve.

    Attributes:
        step: d, shape (systems, n).
        info: int32 (systems,), 0 where solved, LAPACK meaning elsewhere; ``None`` = all solved.
        rank: rank of the whole Jacobian (summed over systems), known at damping 0.
    """

    step: Tensor
    info: Tensor | None = None
    rank: int | None = None


class LeastSquares(ABC):
    """What every problem type offers to every solver.

    Attributes:
        residual: r, shape (systems, rows).
        scale: factor in front of the squared residual.
        structure: ``"unit"``, ``"sample"`` or ``"joint"``: what one system is.
        damping_group: number of consecutive systems that share one :class:`Relative` damping.
        cut_group: number of consecutive systems that are one system of the specification, as the
            positions of one sample are: they share the largest singular value of the rank cut,
            and the step-halving of Gauss-Newton.
        outside: the part of |r|^2 that ``residual`` leaves out because no step changes it, shape
            (systems,); ``None`` for nothing. Equivalent problems have it: they keep J^T J and
            J^T r only, but what lies outside the range differs between linearisations.
        separable: whether :meth:`take` can single out systems.
    """

    residual: Tensor
    scale: float
    structure: str
    damping_group: int = 1
    cut_group: int = 1
    outside: Tensor | None = None
    separable: ClassVar[bool] = False

    @property
    def systems(self) -> int:
        """Number of systems."""
        return self.residual.shape[0]

    @property
    @abstractmethod
    def unknowns(self) -> int:
        """Unknowns per system, n."""

    @abstractmethod
    def jvp(self, step: Tensor) -> Tensor:
        """J d: (systems, n) -> (systems, rows)."""

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> Tensor:
        """J^T u: (systems, rows) -> (systems, n)."""

    @abstractmethod
    def traces(self) -> tuple[Tensor, bool]:
        """tr(J^T J) of each damping group, and whether it is exact.

        One value alone stands for all groups: they share one Jacobian.
        """

    @abstractmethod
    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        """Solve (J^T J + damping I) d = J^T r; damping 0 means minimum norm.

        Args:
            damping: a float >= 0, or a tensor (systems,) of positive numbers.
            rcond: rank cut at damping 0.

        Raises:
            ValueError: the problem is too large for a direct solve; the text names CG.
        """

    @property
    @abstractmethod
    def direct_is_cheap(self) -> bool:
        """Whether ``Auto`` should solve directly."""

    @property
    def minimum_norm_is_cheap(self) -> bool:
        """Whether ``Auto`` should solve directly at damping 0."""
        return self.direct_is_cheap

    @abstractmethod
    def largest_eigenvalue(self) -> Tensor:
        """lambda_max(J^T J) over all systems, 0-dimensional."""

    @abstractmethod
    def with_residual(self: Self, residual: Tensor) -> Self:
        """The same Jacobian with another r."""

    def take(self: Self, index: Tensor) -> Self:
        """The systems ``index`` alone; only where :attr:`separable`."""
        raise AssertionError("not separable")

    def diagonal(self) -> Tensor:
        """diag(J^T J) of every system, (systems, n), where it costs no more than a product."""
        raise ValueError(
            'preconditioner="jacobi" needs a block whose diagonal of J^T J is known, such as a '
            "Linear or Conv2d with elementwise activations; pass None or a callable"
        )

    def shared_preconditioner(self, damping: float | Tensor) -> Preconditioner:
        """Cholesky of the family at its mean scaling; only families with one matrix have it."""
        raise ValueError(
            'preconditioner="shared" needs a Linear or Conv2d with elementwise activations; this '
            "block has no shared matrix: pass None or a callable"
        )

    def normal(self, step: Tensor) -> Tensor:
        """H d = scale J^T J d, undamped: (systems, n) -> (systems, n)."""
        return self.scale * self.vjp(self.jvp(step))

    def gradient(self) -> Tensor:
        """g = scale J^T r, shape (systems, n)."""
        return self.scale * self.vjp(self.residual)

    def relative_residual(self, step: Tensor, damping: float | Tensor) -> float:
        """Worst ``|(J^T J + damping I) d - J^T r| / |J^T r|``; absolute where J^T r = 0.

        Over the systems of the specification: :attr:`cut_group` of ours in a row are one.
        """
        column = damping.unsqueeze(-1) if isinstance(damping, Tensor) else damping
        gradient = self.vjp(self.residual)
        if not gradient.numel():
            return 0.0
        error = self.normal(step) / self.scale + column * step - gradient
        samples = (self.systems // self.cut_group, self.cut_group * self.unknowns)
        size = torch.linalg.vector_norm(gradient.reshape(samples), dim=-1)
        worst = torch.linalg.vector_norm(error.reshape(samples), dim=-1)
        return float((worst / size.masked_fill(size == 0, 1)).max())


def mean_factor(gram: Tensor) -> Tensor:
    """Cholesky factor of a family's damped matrix at its mean scaling, for a preconditioner."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool(info):
        raise ValueError(
            'preconditioner="shared" needs a positive damping: the mean matrix of the family '
            "is singular"
        )
    return factor


def lanczos_largest(
    normal: Callable[[Tensor], Tensor], like: Tensor, max_steps: int = 300
) -> Tensor:
    """Largest eigenvalue over a batch of symmetric PSD operators, by Lanczos.

    One Lanczos process per row of ``like`` (systems, n), all started from one seeded vector (so
    the order of the samples does not matter), fully reorthogonalised (Paige 1972: without it
    converged Ritz values come back as ghosts). Stops when the largest Ritz value of every system
    no longer changes by more than rounding.
    """
    systems, n = like.shape
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu").to(like)
    q = (start / start.norm()).expand(systems, n)
    basis = [q]
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    eps = torch.finfo(like.dtype).eps
    best = like.new_zeros(systems)
    for k in range(1, min(n, max_steps) + 1):
        w = normal(basis[-1])
        diagonal.append((w * basis[-1]).sum(-1))
        Q = torch.stack(basis, dim=1)
        for _ in range(2):
            w = w - torch.einsum("sk,skn->sn", torch.einsum("skn,sn->sk", Q, w), Q)
        beta = torch.linalg.vector_norm(w, dim=-1)
        ritz = _tridiagonal(diagonal, off)[:, -1]
        scale = ritz.abs().clamp_min(torch.finfo(like.dtype).tiny)
        settled = ((ritz - best).abs() <= 4 * eps * scale) & (k > 2)
        best = ritz
        if bool((settled | (beta <= 4 * eps * scale)).all()):
            break
        off.append(beta)
        # An exhausted Krylov space has beta = 0: its next vector is 0 and adds nothing.
        alive = (beta > 4 * eps * scale).unsqueeze(-1)
        basis.append(torch.where(alive, w / beta.unsqueeze(-1), 0.0))
    return best.max().clamp_min(0.0)


def _tridiagonal(diagonal: list[Tensor], off: list[Tensor]) -> Tensor:
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if off:
        beta = torch.stack(off, -1)
        matrix = matrix + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values
