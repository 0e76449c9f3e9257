"""What ``--method`` names: fill ``.grad`` from one batch and say what was done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import NonFiniteError
from ..matching import BackMatching, SolverChoice
from ..partitioning import partition
from ..solvers import CG, Auto, Cholesky, Gradient, LayerInverse, Relative, Scalar, Solver
from ..sweep import Step
from .config import TrainConfig


@dataclass(frozen=True)
class Result:
    """One filled gradient: the loss and the output before the step, and fields for the log."""

    loss: float
    output: Tensor
    log: dict[str, Any] = field(default_factory=dict)


#: Side and its solver -> what :class:`BackMatching` takes for that side.
Choice = Callable[[str, Solver], SolverChoice]

#: Fills ``.grad`` of the model's parameters from inputs and labels.
Method = Callable[[Tensor, Tensor], Result]


_SOLVERS: dict[str, Callable[..., Any]] = {
    "auto": Auto,
    "cholesky": Cholesky,
    "cg": CG,
    "scalar": Scalar,
    "layer-inverse": LayerInverse,
}

T = TypeVar("T")


def create(model: nn.Sequential, config: TrainConfig) -> Method:
    """The method of a run."""
    if config.method == "bp":
        return lambda x, y: _back_propagate(model, x, y)
    matcher = create_matcher(model, config)
    return lambda x, y: _back_match(matcher, x, y)


def create_matcher(
    model: nn.Sequential, config: TrainConfig, choice: Choice | None = None
) -> BackMatching:
    """The matcher that the options of a back-matching run describe.

    Args:
        choice: what to make of each side's solver, for whoever watches them.
    """
    weights, inputs = solvers(config)
    if choice is not None:
        weights, inputs = choice("weights", weights), choice("inputs", inputs)
    return BackMatching(
        partition(model, by=settled(config.blocks)),
        weights=weights,
        inputs=inputs,
        target_step=settled(config.target_step),
        order=settled(config.order),
    )


def solvers(config: TrainConfig) -> tuple[Any, Any]:
    """The solvers of the weight problems and of the input problems."""
    steps = config.cg_steps
    weights = solver(settled(config.weights), config.weight_damping, steps)
    return weights, solver(settled(config.inputs), config.input_damping, steps)


def settled(value: T | None) -> T:
    """The value of an option that only back-propagation leaves open."""
    assert value is not None
    return value


def solver(name: str, damping: float | str | None, cg_steps: int | None = None) -> Any:
    """The solver object of an option pair like ``auto`` and ``rel:0.1``.

    Args:
        cg_steps: exactly so many steps where the solver is ``cg``.

    >>> solver("cg", "rel:0.1").damping
    Relative(factor=0.1)
    >>> solver("cg", 0.5, cg_steps=3)
    CG(damping=0.5, rtol=0.0, max_steps=3, preconditioner=None)
    """
    if name == "gradient":
        return Gradient()
    assert damping is not None
    value = Relative(float(damping[4:])) if isinstance(damping, str) else damping
    if name == "cg" and cg_steps is not None:
        return CG(damping=value, rtol=0, max_steps=cg_steps)
    return _SOLVERS[name](damping=value)


def _back_propagate(model: nn.Module, x: Tensor, y: Tensor) -> Result:
    output = model(x)
    loss = cross_entropy(output, y)
    value = float(loss.detach())
    if not torch.isfinite(loss):
        raise NonFiniteError("loss", 1, 1)
    torch.autograd.backward(loss)
    return Result(value, output.detach())


def _back_match(matcher: BackMatching, x: Tensor, y: Tensor) -> Result:
    step = matcher.backward(x, lambda output: cross_entropy(output, y))
    return Result(float(step.loss), step.output, summarize(step))


def summarize(step: Step) -> dict[str, Any]:
    """The solves of a step in four numbers: is every system solved, and at what cost?

    ``residual`` is the worst relative residual of the normal equations over all blocks and
    sides and ``residual_block`` where it stood; ``None`` is one that overflowed and cannot be told.
    ``iterations`` is the most that any conjugate gradient took.
    """
    worst, where, iterations, converged = 0.0, "", 0, True
    for block in step.blocks:
        for side, record in (("weights", block.weight), ("inputs", block.input)):
            if record is None:
                continue
            iterations = max(iterations, record.iterations)
            converged = converged and record.converged
            if record.residual is None:
                continue
            residual = math.inf if math.isnan(record.residual) else record.residual
            if residual > worst:
                worst, where = residual, f"{block.name} {side}"
    return {
        "residual": worst if math.isfinite(worst) else None,
        "residual_block": where,
        "iterations": iterations,
        "converged": converged,
    }
