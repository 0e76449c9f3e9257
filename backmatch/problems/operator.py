"""Matrix-free problems: J and J^T as functions, for any module.

A direct solve forms the dense Jacobian below a size; above it the error names CG.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import Direct, LeastSquares, lanczos_largest
from .dense import DENSE_ENTRIES, DenseBatch

#: One side of a system's Jacobian up to which its trace is exact and ``Auto`` solves directly.
EXACT_SIDE = 256
#: The same for ``Auto`` at damping 0, where conjugate gradient takes long and stops inexactly.
UNDAMPED_SIDE = 2048
#: Autodiff passes up to which an explicit Jacobian is formed.
DENSE_PASSES = 4096
#: Hutchinson's probes for the trace of what is larger; the seed is fixed.
PROBES, PROBE_SEED = 16, 0


@dataclass(frozen=True)
class Operator(LeastSquares):
    """Systems given by products.

    Attributes:
        forward: J d, (systems, n) -> (systems, rows).
        reverse: J^T u, (systems, rows) -> (systems, n).
        size: n.
        label: block and side, for messages.
        known_traces: tr(J^T J) of each system where it can be had without a probe.
    """

    forward: Callable[[Tensor], Tensor]
    reverse: Callable[[Tensor], Tensor]
    size: int
    residual: Tensor
    scale: float
    structure: str
    label: str
    damping_group: int = 1
    cut_group: int = 1
    known_traces: Callable[[], Tensor] | None = None
    #: The explicit Jacobian survives :meth:`with_residual`: one list shared by the copies.
    _dense_cache: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def unknowns(self) -> int:
        return self.size

    @property
    def rows(self) -> int:
        """Rows per system."""
        return self.residual.shape[1]

    def jvp(self, step: Tensor) -> Tensor:
        return self.forward(step)

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self.reverse(cotangent)

    @cached_property
    def _entries(self) -> int:
        return self.systems * self.rows * self.size

    @property
    def direct_is_cheap(self) -> bool:
        return min(self.rows, self.size) <= EXACT_SIDE and self._entries <= DENSE_ENTRIES

    @property
    def minimum_norm_is_cheap(self) -> bool:
        short = min(self.rows, self.size)
        return short <= UNDAMPED_SIDE and self._entries <= DENSE_ENTRIES

    def direct(self, damping: float | Tensor, rcond: float | None) -> Direct:
        passes = min(self.rows, self.size)
        if self._entries > DENSE_ENTRIES or passes > DENSE_PASSES:
            raise ValueError(
                f"Cholesky: {self.label} has no structured direct solve and its dense Jacobian "
                f"({self.systems} x {self.rows} x {self.size}) is above the limit of "
                f"{DENSE_ENTRIES} entries or {DENSE_PASSES} passes; use CG(damping) or Auto"
            )
        return self._dense().direct(damping, rcond)

    def traces(self) -> tuple[Tensor, bool]:
        if self._dense_cache or self.direct_is_cheap:
            return self._dense().traces()
        if self.known_traces is not None:
            return self.known_traces(), True
        if min(self.rows, self.size) <= EXACT_SIDE:
            return self._exact_traces(), True
        generator = torch.Generator().manual_seed(PROBE_SEED)
        total = self.residual.new_zeros(self.systems)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, (self.size,), generator=generator, device="cpu") * 2 - 1
            probe = signs.to(self.residual).expand(self.systems, -1)
            total += self.jvp(probe).square().sum(-1)
        return total / PROBES, False

    def _exact_traces(self) -> Tensor:
        """The squares of all rows (or columns) of J, none of them kept."""
        by_rows = self.rows <= self.size
        product, length = (self.reverse, self.rows) if by_rows else (self.forward, self.size)
        total = self.residual.new_zeros(self.systems)
        for k in range(length):
            total += product(self._unit(length, k)).square().sum(-1)
        return total

    def _dense(self) -> DenseBatch:
        if not self._dense_cache:
            if self.rows <= self.size:
                rows = [self.reverse(self._unit(self.rows, k)) for k in range(self.rows)]
                shape = (self.systems, 0, self.size)
                J = torch.stack(rows, 1) if rows else self.residual.new_empty(shape)
            else:
                columns = [self.forward(self._unit(self.size, k)) for k in range(self.size)]
                shape = (self.systems, self.rows, 0)
                J = torch.stack(columns, 2) if columns else self.residual.new_empty(shape)
            self._dense_cache.append(J)
        return DenseBatch(self._dense_cache[0], self.residual, self.scale, self.structure)

    def _unit(self, length: int, k: int) -> Tensor:
        unit = self.residual.new_zeros(self.systems, length)
        unit[:, k] = 1.0
        return unit

    def diagonal(self) -> Tensor:
        if self._dense_cache or self.direct_is_cheap:
            return self._dense().diagonal()
        return super().diagonal()

    def largest_eigenvalue(self) -> Tensor:
        if self._dense_cache or self.direct_is_cheap:
            return self._dense().largest_eigenvalue()
        like = self.residual.new_empty(self.systems, self.size)
        return lanczos_largest(lambda step: self.vjp(self.jvp(step)), like)

    def with_residual(self, residual: Tensor) -> Operator:
        return replace(self, residual=residual)
