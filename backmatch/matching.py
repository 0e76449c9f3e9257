"""``BackMatching``: forward pass and backward sweep, in place of ``loss.backward()``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import checks
from .blocks import Block, Linearisation, Snapshot, adapt, transaction
from .errors import ConvergenceWarning, NotConvergedError
from .model import chain, check_parameters, check_ready, refuse_shared
from .precision import full_precision
from .solvers import Auto, LayerInverse, Relative, Solver
from .sweep import BlockReport, BlockStep, Options, Sides, Step, reports, solve_block
from .top import top_displacement

#: A solver for all blocks, or one chosen per block from its name and module.
SolverChoice = Solver | Callable[[str, nn.Module], Solver]
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sweep:
    """All that one sweep computed, before any of it is written to ``.grad``."""

    blocks: list[Block]
    inputs: list[Tensor]
    outputs: list[Tensor]
    displacements: list[Tensor]
    steps: list[BlockStep]
    loss: Tensor


class BackMatching:
    """Exact back-matching propagation over a chain of blocks.

    Per block and batch of m samples, with target displacement r (shape of the block's output):
    ``min_d 1/(2m) |J_W d - r|^2 + lambda/2 |d|^2`` over its trainable parameters, and
    ``min_d 1/2 |J_z d - r|^2 + mu/2 |d|^2`` over its input, whose solution is the displacement of
    the block below. At the top ``r = -target_step * m * dJ/dz``. The idea is Zhang, Chen and Liu's
    (arXiv 1802.09750, 2018; NeurIPS 2018); the formulas are derived here. Forward hooks fire once;
    backward hooks and hooks on parameters do not fire: the sweep has no gradient to show them.
    Forward pass and solves keep float32's 24 bits, even where TF32 or bfloat16 is allowed.

    Args:
        blocks: an ``nn.Sequential`` (its children are the blocks) or an iterable of modules, such
            as :func:`backmatch.partition` returns. Dimension 0 of every tensor is the sample.
        weights: solver of the weight problems, or a callable ``(name, block) -> solver``.
        inputs: solver of the input problems, likewise.
        target_step: s > 0.
        reduction: ``"mean"`` if the loss is a mean over the batch, ``"sum"`` if it is a sum.
        order: ``"simultaneous"``: both problems at the current weights; ``"sequential"``: the
            input problem after the block's weights have moved by their full step.
        passes: alternations of the two steps per block; more than 1 needs ``"sequential"``.
        newton_steps: Gauss-Newton linearisations per problem; 1 is the linearised step.
        strict: raise :class:`NotConvergedError` where an iterative solve hits its cap, instead of
            a :class:`ConvergenceWarning` once per matcher.
        process_group: must be ``None``: sweeps over several processes are not supported yet.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, a block is not a module
            or is wrapped for distributed training, or two blocks share a parameter.

    Example:
        One linear layer, loss 1/2 |z - y|^2: an undamped step lands on the least-squares solution.

        >>> import torch, backmatch as bm
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2).double())
        >>> matcher = bm.BackMatching(model, weights=bm.Cholesky(damping=0.0))
        >>> step = matcher.backward(x, lambda out: 0.5 * (out - y).square().sum(1).mean())
        >>> torch.optim.SGD(model.parameters(), lr=1.0).step()
        >>> augmented = torch.cat([x, torch.ones(20, 1)], 1)
        >>> best = torch.linalg.lstsq(augmented, y).solution
        >>> bool(torch.allclose(model[0].weight, best[:3].T))
        True
    """

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        weights: SolverChoice = Auto(damping=Relative(0.1)),  # noqa: B008
        inputs: SolverChoice = Auto(damping=Relative(1e-2)),  # noqa: B008
        target_step: float = 1.0,
        reduction: str = "mean",
        order: str = "simultaneous",
        passes: int = 1,
        newton_steps: int = 1,
        strict: bool = False,
        process_group: object = None,
    ) -> None:
        self.blocks = chain(blocks)
        self.weights = _choice("weights", weights)
        self.inputs = _choice("inputs", inputs)
        self.target_step = checks.non_negative("target_step", target_step)
        if self.target_step == 0:
            raise ValueError("target_step must be > 0, got 0.0")
        self.reduction = checks.choice("reduction", reduction, ("mean", "sum"))
        order = checks.choice("order", order, ("simultaneous", "sequential"))
        passes = checks.positive_int("passes", passes)
        if passes > 1 and order != "sequential":
            raise ValueError(f'passes={passes} needs order="sequential", got order="{order}"')
        self.options = Options(order, passes, checks.positive_int("newton_steps", newton_steps))
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be a bool, got {type(strict).__name__}")
        self.strict = strict
        if process_group is not None:
            raise ValueError(
                "process_group must be None: sweeps over several processes are not supported in "
                "this version"
            )
        self._warned = False

    def backward(self, x: Tensor, loss: Loss, keep: bool = False) -> Step:
        """Forward pass, backward sweep, and ``.grad -= d_W`` for every trainable parameter.

        ``.grad`` then holds minus the step (added to what it held, as in autograd), so that
        ``torch.optim.SGD(lr=1)`` applies the exact step. Works under ``torch.no_grad``. If
        anything raises, no parameter, grad, buffer or RNG state has changed.

        Args:
            x: a batch, shape (m, ...), float32 or float64 like the parameters; integers where the
                first block takes them.
            loss: output -> scalar loss J. It may reach parameters through the output only.
            keep: put r_b, d_W and d_z as tensors into the reports.

        Raises:
            NonFiniteError: NaN or Inf in x, a parameter, the loss, or arising in the sweep.
            NotPositiveDefiniteError: a damped normal matrix is singular in this dtype.
            NotConvergedError: with ``strict=True``, an iterative solve stopped at its cap.
            TypeError, ValueError: autocast, inference mode, half precision, mixed devices, an
                empty batch, a loss that is no scalar or does not depend on the output alone.
        """
        check_ready(x)
        with transaction(self.blocks.values(), x.device) as before:
            swept = self._sweep(x, loss, replayable=False)
            found = reports(swept.blocks, swept.displacements, swept.steps, x.shape[0], keep)
            self._judge(found)
            grads = [
                (parameter, step.weight[name].reshape(parameter.shape))
                for block, step in zip(swept.blocks, swept.steps, strict=True)
                for name, parameter in block.trainable.items()
            ]
            _accumulate(grads, before)
        return Step(swept.loss, swept.outputs[-1], found)

    def sweep(self, x: Tensor, loss: Loss) -> Sweep:
        """All steps, none of them written: buffers and RNG move once, nothing else changes.

        The blocks of the result can be evaluated again. Arguments and errors are those of
        :meth:`backward`.
        """
        check_ready(x)
        with transaction(self.blocks.values(), x.device):
            return self._sweep(x, loss, replayable=True)

    def _sweep(self, x: Tensor, loss: Loss, *, replayable: bool) -> Sweep:
        blocks = [adapt(name, module) for name, module in self.blocks.items()]
        refuse_shared({block.name: block.parameters for block in blocks})
        sides = [self._sides(block, with_input=b > 0) for b, block in enumerate(blocks)]
        check_parameters(x, blocks)
        with full_precision():
            inputs, lins = _forward(blocks, x, replayable or self.options.replayable)
        factor = self.target_step * (x.shape[0] if self.reduction == "mean" else 1)
        outputs = [lin.output for lin in lins]
        value, r = top_displacement(outputs[-1], loss, factor=factor)
        # A backward pass may run parts of a forward pass again (checkpointing).
        after = Snapshot(self.blocks.values(), x.device)
        displacements = [r]
        steps: list[BlockStep] = []
        with full_precision(), torch.no_grad():
            for b in reversed(range(len(blocks))):
                # Taken off the list: what a block holds is free again before the next one solves.
                step = solve_block(
                    blocks[b], lins.pop(), inputs[b], displacements[0], sides[b], self.options
                )
                self._check_converged(blocks[b].name, step)
                steps.insert(0, step)
                if step.input is not None:
                    displacements.insert(0, step.input)
        after.restore()
        return Sweep(blocks, inputs, outputs, displacements, steps, value)

    def _sides(self, block: Block, *, with_input: bool) -> Sides:
        weights = _chosen("weights", self.weights, block) if block.trainable else None
        if isinstance(weights, LayerInverse):
            raise ValueError("weights: LayerInverse solves input problems only; use Auto(damping)")
        return Sides(weights, _chosen("inputs", self.inputs, block) if with_input else None)

    def _check_converged(self, name: str, step: BlockStep) -> None:
        if self.strict:
            for side, record in (("weight", step.weight_record), ("input", step.input_record)):
                if record is not None and not record.converged:
                    raise NotConvergedError(_stopped(name, side, record.residual))

    def _judge(self, reports: list[BlockReport]) -> None:
        """Warn of the first solve that stopped early, once per matcher."""
        if self._warned:
            return
        for each in reports:
            for side, record in (("weight", each.weight), ("input", each.input)):
                if record is not None and not record.converged:
                    text = _stopped(each.name, side, record.residual)
                    warnings.warn(text, ConvergenceWarning, stacklevel=3)
                    self._warned = True
                    return


def _forward(
    blocks: list[Block], x: Tensor, replayable: bool
) -> tuple[list[Tensor], list[Linearisation]]:
    inputs: list[Tensor] = []
    lins: list[Linearisation] = []
    z = x.detach()
    for b, block in enumerate(blocks):
        lin = block.forward(z, with_input=b > 0, replayable=replayable)
        inputs.append(z)
        lins.append(lin)
        z = lin.output
    outputs = zip(blocks, lins, strict=True)
    checks.all_finite(("output", lin.output, block.name) for block, lin in outputs)
    return inputs, lins


def _accumulate(steps: list[tuple[nn.Parameter, Tensor]], before: Snapshot) -> None:
    """As autograd does: in place where there is a grad already; all of them or none."""
    # What may fail for want of memory comes first.
    fresh = [step.neg().contiguous() if p.grad is None else None for p, step in steps]
    before.hold_grads(parameter for parameter, _ in steps)
    for (parameter, step), grad in zip(steps, fresh, strict=True):
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.data.sub_(step)


def _stopped(name: str, side: str, residual: float | None) -> str:
    return (
        f"CG stopped before its tolerance on the {side} problem of block {name!r} with relative "
        f"residual {residual:.2e}; raise max_steps, damping or rtol"
    )


def _choice(name: str, value: object) -> SolverChoice:
    if isinstance(value, Solver):
        if name == "weights" and isinstance(value, LayerInverse):
            raise ValueError("weights: LayerInverse solves input problems only; use Auto(damping)")
        return value
    if callable(value) and not isinstance(value, type):
        return value
    got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    raise TypeError(
        f"{name} must be a solver such as Auto(damping=Relative(0.1)), or a callable "
        f"(name, block) -> solver, got {got}"
    )


def _chosen(name: str, choice: SolverChoice, block: Block) -> Solver:
    if isinstance(choice, Solver):
        return choice
    solver: object = choice(block.name, block.module)
    if not isinstance(solver, Solver):
        raise TypeError(
            f"{name}: the callable must return a solver for block {block.name!r}, "
            f"got {type(solver).__name__}"
        )
    return solver
