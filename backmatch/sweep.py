"""The backward sweep: from the top block down, solve for the weights, then for the input.

``weight`` and ``input`` problems are posed by the blocks and solved by the solvers; this file is
the plain loop between them, and what it reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import checks
from .blocks import Block, Linearisation, Named
from .errors import NonFiniteError, NotPositiveDefiniteError
from .newton import minimise
from .problems import LeastSquares
from .solvers import LayerInverse, Solver, SolveRecord


@dataclass(frozen=True)
class Options:
    """How a sweep runs; see :class:`backmatch.BackMatching`."""

    order: str
    passes: int
    newton_steps: int

    @property
    def replayable(self) -> bool:
        """Whether blocks are evaluated again after their forward pass."""
        return self.order == "sequential" or self.newton_steps > 1


@dataclass(frozen=True)
class BlockReport:
    """What the sweep did at one block.

    Attributes:
        name: the block's name: its key in the Sequential, else its index.
        displacement_norm: ``|r_b|`` over the whole batch.
        loss_before: the block's back-matching loss before its step, ``1/2 |r_b|^2 / m``.
        weight: record of the weight problem; ``None`` without trainable parameters.
        input: record of the input problem; ``None`` for the bottom block.
        displacement: r_b, with ``keep=True``.
        weight_step: d_W by parameter name, with ``keep=True``.
        input_step: d_z, handed down as r_{b-1}, with ``keep=True``; ``None`` for the bottom block.
    """

    name: str
    displacement_norm: float
    loss_before: float
    weight: SolveRecord | None
    input: SolveRecord | None
    displacement: Tensor | None = None
    weight_step: Named | None = None
    input_step: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """Result of one :meth:`backmatch.BackMatching.backward`.

    Attributes:
        loss: the loss before the step, detached, 0-dimensional.
        output: the network's output before the step, detached.
        blocks: one report per block, bottom first.
    """

    loss: Tensor
    output: Tensor
    blocks: list[BlockReport] = field(default_factory=list)


@dataclass(frozen=True)
class Sides:
    """The solvers of one block; ``None`` where it has no such problem."""

    weights: Solver | None
    inputs: Solver | None


@dataclass(frozen=True)
class BlockStep:
    """The two displacements that one block answers with."""

    weight: Named
    input: Tensor | None
    weight_record: SolveRecord | None
    input_record: SolveRecord | None


def solve_block(
    block: Block,
    at: Linearisation,
    z: Tensor,
    displacement: Tensor,
    sides: Sides,
    options: Options,
) -> BlockStep:
    """Both local problems of one block, in the order asked for."""
    with_input = sides.inputs is not None
    walk = _Walk(block, at, z, at.output + displacement, options, with_input)
    if options.order == "simultaneous":
        weight_record = walk.solve_weights(sides.weights, displacement)
        input_record = walk.solve_inputs(sides.inputs, displacement, at)
        return BlockStep(walk.weight, walk.input, weight_record, input_record)
    weight_record = input_record = None
    remaining = displacement
    for turn in range(options.passes):
        if turn:
            remaining = walk.move()
        weight_record = _joined(weight_record, walk.solve_weights(sides.weights, remaining))
        if with_input:
            remaining = walk.move()
            found = walk.solve_inputs(sides.inputs, remaining, walk.at)
            input_record = _joined(input_record, found)
    return BlockStep(walk.weight, walk.input, weight_record, input_record)


def _joined(earlier: SolveRecord | None, later: SolveRecord | None) -> SolveRecord | None:
    return None if later is None else later.after(earlier)


@contextmanager
def _located(side: str, block: str) -> Iterator[None]:
    """Name block and side in what a solver, which knows neither, reports."""
    try:
        yield
    except NonFiniteError as error:
        if error.block is not None:
            raise
        name = f"{error.tensor} ({side} problem)"
        raise NonFiniteError(name, error.count, error.numel, block=block) from None
    except NotPositiveDefiniteError as error:
        what = f"the damped normal matrix of the {side} problem of block {block!r}"
        raise NotPositiveDefiniteError(what, error.indices, error.pivots, error.batch) from None


class _Walk:
    """One block's point (W + d_W, z + d_z) on its way through the passes."""

    def __init__(
        self,
        block: Block,
        at: Linearisation,
        z: Tensor,
        target: Tensor,
        options: Options,
        with_input: bool,
    ) -> None:
        self.block, self.at, self.z, self.target = block, at, z, target
        self.options, self.with_input = options, with_input
        self.weight: Named = {}
        self.input: Tensor | None = None

    def parameters(self) -> Named:
        return self.block.parameters_plus(self.weight)

    def inputs(self) -> Tensor:
        return self.z if self.input is None else self.z + self.input

    def move(self) -> Tensor:
        """Linearise at the point reached; return what remains of the displacement there."""
        self.at = self._evaluate(self.inputs(), self.parameters())
        return self.target - self.at.output

    def _evaluate(self, z: Tensor, parameters: Named) -> Linearisation:
        return self.block.evaluate(z, parameters, with_input=self.with_input)

    def solve_weights(self, solver: Solver | None, displacement: Tensor) -> SolveRecord | None:
        if solver is None:
            return None
        start, z, start_at = self.parameters(), self.inputs(), self.at

        def moved(step: Named) -> Linearisation:
            return self._evaluate(z, {name: start[name] + step[name] for name in start})

        with _located("weight", self.block.name):
            solution = minimise(
                solver,
                lambda at, r: at.weight_problem(r),
                lambda d: moved(start_at.weight_step(d)),
                start_at,
                displacement,
                self.options.newton_steps,
            )
        step = start_at.weight_step(solution.step)
        if not solution.is_finite:
            for name, part in step.items():
                checks.finite(f"weight step of {name!r}", part, block=self.block.name)
        self.weight = {k: self.weight[k] + d if self.weight else d for k, d in step.items()}
        return solution.record

    def solve_inputs(
        self, solver: Solver | None, displacement: Tensor, at: Linearisation
    ) -> SolveRecord | None:
        if solver is None:
            return None
        start, parameters = self.inputs(), self.parameters()
        if self.options.order == "simultaneous":
            parameters = self.block.parameters_plus(None)

        def pose(at: Linearisation, r: Tensor) -> LeastSquares:
            if isinstance(solver, LayerInverse):
                return at.affine_problem(r, solver.clamp)
            return at.input_problem(r)

        with _located("input", self.block.name):
            solution = minimise(
                solver,
                pose,
                lambda d: self._evaluate(start + at.input_step(d), parameters),
                at,
                displacement,
                self.options.newton_steps,
            )
        step = at.input_step(solution.step)
        if not solution.is_finite:
            checks.finite("input step", step, block=self.block.name)
        self.input = step if self.input is None else self.input + step
        return solution.record


def reports(
    blocks: list[Block],
    displacements: list[Tensor],
    steps: list[BlockStep],
    samples: int,
    keep: bool,
) -> list[BlockReport]:
    """Numbers of every block; the tensors too with ``keep``."""
    norms = torch.stack([torch.linalg.vector_norm(r) for r in displacements]).tolist()
    return [
        BlockReport(
            block.name,
            norm,
            0.5 * norm**2 / samples,
            step.weight_record,
            step.input_record,
            *((r, step.weight, step.input) if keep else (None, None, None)),
        )
        for block, norm, r, step in zip(blocks, norms, displacements, steps, strict=True)
    ]
