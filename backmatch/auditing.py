"""How much of what the sweep asked for the network then does: requested and attained moves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Named, Snapshot
from .matching import BackMatching, Sweep
from .model import check_ready
from .precision import full_precision


@dataclass(frozen=True)
class Attained:
    """One move of a block's output beside the requested one.

    Attributes:
        norm: Euclidean norm over the whole batch.
        cosine: cosine of the angle to the requested displacement; NaN if either is 0.
    """

    norm: float
    cosine: float


@dataclass(frozen=True)
class BlockAudit:
    """Requested and attained displacements of one block's output.

    Attributes:
        name: the block's name.
        requested: norm of r_b.
        local: T(W + d_W, z) - z_b: the weights alone.
        joint: T(W + d_W, z + d_z) - z_b: with the input displaced as handed down; equal to
            ``local`` for the bottom block.
        propagated: z_b(new net) - z_b: what the whole new net does to this output.
    """

    name: str
    requested: float
    local: Attained
    joint: Attained
    propagated: Attained


@dataclass(frozen=True)
class Moves:
    """What :class:`BlockAudit` measures, as tensors of the shape of the block's output."""

    requested: Tensor
    local: Tensor
    joint: Tensor
    propagated: Tensor


def audit(
    matcher: BackMatching,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[BlockAudit]:
    """Compare, block by block, the requested displacement with what a step attains.

    Args:
        matcher: the sweep to audit.
        x, loss: as for :meth:`BackMatching.backward`.
        optimizer: turns the sweep's grads into the parameter change that is audited, starting
            from its present state; ``None``: the full step d_W (SGD with lr 1).

    Returns:
        One :class:`BlockAudit` per block, bottom first. Model, grads, buffers, RNG and optimizer
        are as before.

    Raises:
        What :meth:`BackMatching.backward` raises.

    >>> import torch, backmatch as bm
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2).double())
    >>> x, y = torch.ones(1, 3).double(), torch.ones(1, 2).double()
    >>> matcher = bm.BackMatching(model, weights=bm.Cholesky(damping=0.0))
    >>> (report,) = audit(matcher, x, lambda out: 0.5 * (out - y).square().sum())
    >>> abs(report.local.norm - report.requested) < 1e-12, round(report.local.cosine, 9)
    (True, 1.0)
    """
    check_ready(x)
    before = Snapshot(matcher.blocks.values(), x.device)
    try:
        swept = matcher.sweep(x, loss)
        changes = [step.weight for step in swept.steps]
        if optimizer is not None:
            changes = _optimizer_changes(optimizer, swept)
        return _attained(swept, changes)
    finally:
        before.restore()


def _attained(swept: Sweep, changes: list[Named]) -> list[BlockAudit]:
    return [
        BlockAudit(
            name,
            float(torch.linalg.vector_norm(moves.requested)),
            compare(moves.local, moves.requested),
            compare(moves.joint, moves.requested),
            compare(moves.propagated, moves.requested),
        )
        for name, moves in output_moves(swept, changes)
    ]


def output_moves(swept: Sweep, changes: list[Named]) -> Iterator[tuple[str, Moves]]:
    """Name and moves of every block, bottom first, for a change of every block's parameters."""
    moved_input = swept.inputs[0]
    for b, block in enumerate(swept.blocks):
        parameters = block.parameters_plus(changes[b])

        def change(z: Tensor, b: int = b, parameters: Named = parameters) -> Tensor:
            with full_precision():
                at = swept.blocks[b].evaluate(z, parameters, with_input=False)
            return at.output - swept.outputs[b]

        z = swept.inputs[b]
        local = change(z)
        handed_down = swept.steps[b].input
        joint = local if handed_down is None else change(z + handed_down)
        propagated = change(moved_input)
        moved_input = swept.outputs[b] + propagated
        yield block.name, Moves(swept.displacements[b], local, joint, propagated)


def compare(attained: Tensor, requested: Tensor) -> Attained:
    """Length of a move, and its angle to the requested one."""
    norm, size = torch.linalg.vector_norm(attained), torch.linalg.vector_norm(requested)
    # 0/0 is NaN on purpose: no displacement has no direction.
    cosine = (attained * requested).sum() / (norm * size)
    return Attained(float(norm), float(cosine))


def _optimizer_changes(optimizer: torch.optim.Optimizer, swept: Sweep) -> list[Named]:
    """What one step of the optimizer would add to each parameter; everything is put back."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameters += [p for block in swept.blocks for p in block.trainable.values()]
    saved = [(p, p.detach().clone(), p.grad) for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    try:
        for p in parameters:
            p.grad = None
        for block, step in zip(swept.blocks, swept.steps, strict=True):
            for name, p in block.trainable.items():
                p.grad = -step.weight[name].reshape(p.shape).contiguous()
        before = {id(p): value for p, value, _ in saved}
        optimizer.step()
        return [
            {name: (p - before[id(p)]).detach() for name, p in block.trainable.items()}
            for block in swept.blocks
        ]
    finally:
        for p, value, grad in saved:
            p.data.copy_(value)
            p.grad = grad
        optimizer.load_state_dict(state)
