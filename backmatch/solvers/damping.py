"""Damping: an absolute number, or relative to the mean eigenvalue of the local Hessian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks

if TYPE_CHECKING:
    from ..problems import LeastSquares


@dataclass(frozen=True)
class Relative:
    """Damping ``factor * trace(H) / n``, scale-free (spec: "derived here").

    On the weight side one number for the block (H over all its trainable parameters); on the
    input side one number per sample where samples are independent, else one for the block.

    >>> Relative(0.1)
    Relative(factor=0.1)
    >>> Relative(-1.0)
    Traceback (most recent call last):
    ...
    ValueError: Relative factor must be finite and >= 0, got -1.0
    """

    factor: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", checks.non_negative("Relative factor", self.factor))


Damping = float | Relative


def check(name: str, value: object) -> Damping:
    """Refuse what is neither a float >= 0 nor :class:`Relative`."""
    if isinstance(value, Relative):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or Relative(factor), got {value!r}")
    return checks.non_negative(name, value)


@dataclass(frozen=True)
class Resolved:
    """A damping in force for one problem.

    Attributes:
        values: a float for all systems, or a tensor with one value for all or one per damping
            group.
        systems: number of systems.
        trace: ``"exact"``, ``"estimated"``, or ``None`` when no trace was needed.
        has_zero: whether a tensor of values may hold 0.
        common: the number in a tensor of one value.
    """

    values: float | Tensor
    systems: int
    trace: str | None = None
    has_zero: bool = False
    common: float | None = None

    @property
    def reported(self) -> float | Tensor:
        """The number in force, or one per damping group."""
        return self.values if self.common is None else self.common

    @property
    def is_zero(self) -> bool:
        """Whether the minimum-norm solution is asked for."""
        return isinstance(self.values, float) and self.values == 0.0

    def per_system(self, scale: float = 1.0) -> float | Tensor:
        """The damping over ``scale``: a float, or a tensor (systems,) of positive numbers.

        One value for all systems comes as an expanded view: that is how solvers see that one
        factorisation serves all.
        """
        if not isinstance(self.values, Tensor):
            return self.values / scale
        # Trace 0 means J = 0, so the right-hand side is 0 too: any positive damping gives d = 0.
        values = self.values.masked_fill(self.values == 0, 1) if self.has_zero else self.values
        if scale != 1:
            values = values / scale
        if len(values) == self.systems:
            return values
        if len(values) == 1:
            return values.expand(self.systems)
        return values.repeat_interleave(self.systems // len(values))

    def column(self) -> float | Tensor:
        """:meth:`per_system` to be multiplied with steps (systems, n)."""
        shift = self.per_system()
        return shift.unsqueeze(-1) if isinstance(shift, Tensor) else shift


def resolve(damping: Damping, problem: LeastSquares) -> Resolved:
    """Turn a damping option into numbers for ``problem`` (on the scale of its H)."""
    if not isinstance(damping, Relative):
        return Resolved(damping, problem.systems)
    if damping.factor == 0.0:
        return Resolved(0.0, problem.systems)
    traces, exact = problem.traces()
    size = problem.damping_group * problem.unknowns
    values = traces * (damping.factor * problem.scale / max(size, 1))
    low, high = torch.stack(values.aminmax()).tolist() if values.numel() else (1.0, 1.0)
    if not 0 < low <= high < math.inf:
        checks.finite("trace of the local Hessian", traces)
    how = "exact" if exact else "estimated"
    common = low if len(values) == 1 else None
    return Resolved(values, problem.systems, how, has_zero=low == 0, common=common)
