"""What one solve did: the record that a report carries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SolveRecord:
    """One side of one block in one sweep.

    Attributes:
        solver: ``"gradient"``, ``"scalar"``, ``"cg"``, ``"cholesky"`` or ``"layer_inverse"``:
            the route that ran (``Auto`` reports the one it chose).
        structure: what one system is: ``"unit"`` (output unit), ``"sample"`` or ``"joint"``.
        systems: number of independent systems.
        unknowns: unknowns per system.
        damping: the damping in force on the scale of H: a float, or a tensor with one value per
            sample; ``None`` where the solver has none.
        scale: the scalar c of :class:`Scalar`, else ``None``.
        iterations: most CG iterations over the systems (0 for direct solves), summed over the
            solves of one sweep (``passes``, ``newton_steps``).
        residual: worst relative residual of the damped normal equations over the systems,
            ``|(H + damping) d - g| / |g|``; ``None`` where no system was solved.
        converged: whether every system met its tolerance.
        rank: rank of the whole Jacobian, summed over systems, where known (damping 0).
        trace: ``"exact"`` or ``"estimated"``: how :class:`Relative` damping got its trace.
    """

    solver: str
    structure: str
    systems: int
    unknowns: int
    damping: float | Tensor | None = None
    scale: float | None = None
    iterations: int = 0
    residual: float | None = None
    converged: bool = True
    rank: int | None = None
    trace: str | None = None

    def after(self, earlier: SolveRecord | None) -> SolveRecord:
        """The record of this solve and those before it: none of their troubles is forgotten."""
        if earlier is None:
            return self
        residuals = [r for r in (self.residual, earlier.residual) if r is not None]
        return replace(
            self,
            iterations=self.iterations + earlier.iterations,
            residual=max(residuals, default=None),
            converged=self.converged and earlier.converged,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for a log; a per-sample damping is given by its median."""
        values = dict(self.__dict__)
        if isinstance(self.damping, Tensor):
            values["damping"] = float(self.damping.median())
        return values
