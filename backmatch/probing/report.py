"""What a probe reports: numbers only, as Python objects and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..auditing import Attained
from ..solvers import SolveRecord
from .likeness import Likeness
from .plain import finite
from .spectrum import Spectrum
from .spread import Spread


@dataclass(frozen=True)
class LocalLoss:
    """A block's back-matching loss 1/2 |zhat_b - T(W, z)|^2 / m at three points.

    Attributes:
        before: at (W, z): 1/2 |r_b|^2 / m.
        after_weights: at (W + d_W, z).
        after_both: at (W + d_W, z + d_z); equal to ``after_weights`` for the bottom block.
    """

    before: float
    after_weights: float
    after_both: float


@dataclass(frozen=True)
class SideProbe:
    """One side of one block: the sweep's step, its solve, and the steps of others.

    Attributes:
        step_norm: length of the step, of all parameters or of the input over the batch.
        record: of the solve.
        damping: the damping in force over the systems that have one of their own.
        beside: other steps by name, see :func:`backmatch.probe`; ``None`` where there is none.
        spectrum: of the local Hessian H of this side.
    """

    step_norm: float
    record: SolveRecord
    damping: Spread | None
    beside: dict[str, Likeness | None]
    spectrum: Spectrum

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is undefined or not finite is ``None``."""
        record, others = self.record, self.beside.items()
        return {
            "solver": record.solver,
            "structure": record.structure,
            "systems": record.systems,
            "unknowns": record.unknowns,
            "iterations": record.iterations,
            "residual": finite(record.residual),
            "converged": record.converged,
            "rank": record.rank,
            "damping": None if self.damping is None else self.damping.as_dict(),
            "step_norm": finite(self.step_norm),
            "cosine": {name: None if o is None else finite(o.cosine) for name, o in others},
            "ratio": {name: None if o is None else finite(o.ratio) for name, o in others},
            "spectrum": self.spectrum.as_dict(),
        }


@dataclass(frozen=True)
class BlockProbe:
    """One block in one probe.

    Attributes:
        name: the block's name.
        requested: length of r_b over the batch.
        loss: the local loss before and after.
        local, joint, propagated: what of r_b is attained, as :func:`backmatch.audit` has it.
        weight: the weight side; ``None`` without trainable parameters.
        input: the input side; ``None`` for the bottom block.
    """

    name: str
    requested: float
    loss: LocalLoss
    local: Attained
    joint: Attained
    propagated: Attained
    weight: SideProbe | None
    input: SideProbe | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; attained lengths are ratios to ``requested``."""
        attained = {
            name: {
                "ratio": finite(move.norm / self.requested) if self.requested > 0 else None,
                "cosine": finite(move.cosine),
            }
            for name, move in (
                ("local", self.local),
                ("joint", self.joint),
                ("propagated", self.propagated),
            )
        }
        return {
            "block": self.name,
            "requested": finite(self.requested),
            "loss": {name: finite(value) for name, value in asdict(self.loss).items()},
            **attained,
            "weight": None if self.weight is None else self.weight.as_dict(),
            "input": None if self.input is None else self.input.as_dict(),
        }


@dataclass(frozen=True)
class Probe:
    """What one probe found.

    Attributes:
        loss: the loss J before the step.
        blocks: one report per block, bottom first.
        missing: methods whose step could not be computed -> why.
    """

    loss: float
    blocks: list[BlockProbe]
    missing: dict[str, str] = field(default_factory=dict)
