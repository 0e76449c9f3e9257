"""Damping: an absolute number, or relative to the mean eigenvalue of the local Hessian."""

from __future__ import annotations

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
        per_system: float for all systems, or tensor (systems,).
        reported: the float, or the tensor with one value per damping group.
        trace: ``"exact"``, ``"estimated"``, or ``None`` when no trace was needed.
    """

    per_system: float | Tensor
    reported: float | Tensor
    trace: str | None = None

    @property
    def is_zero(self) -> bool:
        """Whether the minimum-norm solution is asked for."""
        return isinstance(self.per_system, float) and self.per_system == 0.0


def resolve(damping: Damping, problem: LeastSquares) -> Resolved:
    """Turn a damping option into numbers for ``problem`` (on the scale of its H)."""
    if not isinstance(damping, Relative):
        return Resolved(damping, damping)
    if damping.factor == 0.0:
        return Resolved(0.0, 0.0)
    traces, exact = problem.traces()
    group = problem.damping_group
    values = damping.factor * problem.scale * traces / (group * problem.unknowns)
    # Trace 0 means J = 0, so the right-hand side is 0 as well: any positive damping gives d = 0.
    in_force = torch.where(values > 0, values, torch.ones_like(values))
    word = "exact" if exact else "estimated"
    if len(values) == 1:
        # A tensor of one element stays on the device: no synchronisation for its value.
        return Resolved(in_force.expand(problem.systems), values, word)
    return Resolved(in_force.repeat_interleave(group), values, word)
