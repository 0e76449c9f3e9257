"""Options of the whole chain, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks
from ..solvers import KINDS
from .scales import Rule

#: Estimator -> the kind of scale that it estimates.
ESTIMATES = {"exact": None, "hutchinson": "trace", "power": "spectral"}


@dataclass(frozen=True)
class Options:
    """Options of the whole chain; see :class:`backmatch.optim.ScaleAmendedSGD`."""

    kind: str
    damping: float
    normalize: bool
    estimate: str
    probes: int
    every: int
    average: float

    def __post_init__(self) -> None:
        checks.choice("kind", self.kind, KINDS)
        checks.choice("estimate", self.estimate, tuple(ESTIMATES))
        of = ESTIMATES[self.estimate]
        if of is not None and self.kind != of:
            raise ValueError(
                f'estimate="{self.estimate}" needs kind="{of}", got kind="{self.kind}"; '
                'use estimate="exact"'
            )
        object.__setattr__(self, "damping", checks.non_negative("damping", self.damping))
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be a bool, got {type(self.normalize).__name__}")
        checks.positive_int("probes", self.probes)
        checks.positive_int("every", self.every)
        average = checks.non_negative("average", self.average)
        if not average < 1:
            raise ValueError(f"average must be in [0, 1), got {self.average}")
        object.__setattr__(self, "average", average)

    @property
    def rule(self) -> Rule:
        return Rule(self.kind, self.estimate, self.probes)
