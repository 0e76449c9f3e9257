"""The probe itself: three sweeps of one batch, and block by block what each would do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..auditing import Moves, compare, output_moves
from ..blocks import Block, Linearisation, Named, Snapshot
from ..errors import NonFiniteError
from ..matching import BackMatching, Sweep
from ..model import check_ready
from ..precision import full_precision
from ..problems import LeastSquares
from ..solvers import Gradient, Scalar, Solver, SolveRecord
from ..sweep import BlockStep
from .likeness import Likeness, liken, norm
from .report import BlockProbe, LocalLoss, Probe, SideProbe
from .spectrum import spectrum
from .spread import Spread

#: A step beside the sweep's: its parts, or ``None`` where it could not be computed.
Other = Iterable[Tensor] | None

#: Solvers whose damping is added to this side's own H.
_DAMPS_H = ("cg", "cholesky")


def probe(
    matcher: BackMatching,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    others: Mapping[str, Mapping[nn.Parameter, Tensor]] | None = None,
) -> Probe:
    """What one step of the sweep does at every block, beside the steps of other methods.

    Beside each weight step and input step d stand

    - ``gradient``: that of back-propagation, ``Gradient()`` on both sides of every block:
      -target_step dJ/dW, and -target_step m dJ/dz for the input;
    - ``scalar``: that of ``Scalar("trace")`` on both sides of every block. It points where
      ``gradient`` points: the two differ by one factor per block;
    - ``local_gradient``, ``local_scalar``: one gradient step, and one scalar step, on the very
      local problem that d solves, with the displacement that the sweep handed down;
    - the weight steps in ``others``.

    Nothing is changed: model, grads, buffers and RNG are as before, after an exception too. The
    forward pass runs three times, and forward hooks fire each time. Derived here; the cost is that
    of three sweeps, of one more linearisation per block, and of a bounded look at the spectra
    (:mod:`backmatch.probing.spectrum`).

    Args:
        matcher: the sweep to probe; its step is the full d_W, d_z of every block. With
            ``order="sequential"`` the local steps of the input side are taken, like d_z, after the
            block's weights have moved.
        x, loss: as for :meth:`BackMatching.backward`.
        others: further weight steps by name, parameter -> step of its shape; parameters that are
            missing there take no step.

    Raises:
        What :meth:`BackMatching.backward` raises; a gradient or scalar sweep that overflows is
        reported in :attr:`Probe.missing` instead.
        TypeError, ValueError: ``others`` is no mapping of mappings, or holds a step that is not of
            its parameter's shape.

    >>> import torch, backmatch as bm
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2).double())
    >>> x, y = torch.ones(1, 3).double(), torch.ones(1, 2).double()
    >>> matcher = bm.BackMatching(model, weights=bm.Cholesky(damping=0.0))
    >>> (block,) = bm.probe(matcher, x, lambda out: 0.5 * (out - y).square().sum()).blocks
    >>> block.loss.after_weights < 1e-20, round(block.weight.beside["gradient"].cosine, 9)
    (True, 1.0)
    """
    if not isinstance(matcher, BackMatching):
        raise TypeError(f"matcher must be a BackMatching, got {type(matcher).__name__}")
    check_ready(x)
    given = _checked(others)
    before = Snapshot(matcher.blocks.values(), x.device)
    missing: dict[str, str] = {}
    try:
        swept = matcher.sweep(x, loss)
        rivals: dict[str, Sweep | None] = {}
        for name, solver in (("gradient", Gradient()), ("scalar", Scalar("trace"))):
            before.restore()
            try:
                rivals[name] = _alone(matcher, solver).sweep(x, loss)
            except NonFiniteError as error:  # factors of many blocks, multiplied, leave the dtype
                rivals[name], missing[name] = None, str(error)
        before.restore()
        with torch.no_grad():
            blocks = _blocks(matcher, swept, rivals, given)
    finally:
        before.restore()
    return Probe(float(swept.loss), blocks, missing)


def _alone(matcher: BackMatching, solver: Solver) -> BackMatching:
    """The same chain with one solver on both sides of every block."""
    return BackMatching(
        matcher.blocks.values(),
        weights=solver,
        inputs=solver,
        target_step=matcher.target_step,
        reduction=matcher.reduction,
    )


def _checked(
    others: Mapping[str, Mapping[nn.Parameter, Tensor]] | None,
) -> Mapping[str, Mapping[nn.Parameter, Tensor]]:
    given = {} if others is None else others
    if not isinstance(given, Mapping):
        raise TypeError(f"others must be a mapping name -> steps, got {type(given).__name__}")
    for name, steps in given.items():
        if not isinstance(steps, Mapping):
            raise TypeError(
                f"others[{name!r}] must be a mapping parameter -> step, got {type(steps).__name__}"
            )
        for parameter, step in steps.items():
            if not isinstance(parameter, nn.Parameter) or not isinstance(step, Tensor):
                raise TypeError(f"others[{name!r}] must map parameters to tensors")
            if step.shape != parameter.shape:
                raise ValueError(
                    f"others[{name!r}] must hold steps of their parameters' shapes, expected "
                    f"{tuple(parameter.shape)}, got {tuple(step.shape)}"
                )
    return given


def _blocks(
    matcher: BackMatching,
    swept: Sweep,
    rivals: Mapping[str, Sweep | None],
    given: Mapping[str, Mapping[nn.Parameter, Tensor]],
) -> list[BlockProbe]:
    found = []
    changes = [step.weight for step in swept.steps]
    samples = swept.inputs[0].shape[0]
    for b, (name, moves) in enumerate(output_moves(swept, changes)):
        block, step = swept.blocks[b], swept.steps[b]
        theirs = {n: None if s is None else s.steps[b] for n, s in rivals.items()}
        found.append(
            BlockProbe(
                name,
                norm([moves.requested]),
                _losses(moves, samples),
                compare(moves.local, moves.requested),
                compare(moves.joint, moves.requested),
                compare(moves.propagated, moves.requested),
                *_sides(matcher, swept, b, theirs, _others_of(block, step, given)),
            )
        )
    return found


def _losses(moves: Moves, samples: int) -> LocalLoss:
    def loss(left: Tensor) -> float:
        return norm([left]) ** 2 / 2 / samples

    requested = moves.requested
    return LocalLoss(loss(requested), loss(requested - moves.local), loss(requested - moves.joint))


def _others_of(
    block: Block, step: BlockStep, given: Mapping[str, Mapping[nn.Parameter, Tensor]]
) -> dict[str, Named]:
    """The given weight steps by the names of a block."""
    return {
        name: {key: steps.get(p, torch.zeros_like(p)) for key, p in block.trainable.items()}
        for name, steps in given.items()
    }


def _sides(
    matcher: BackMatching,
    swept: Sweep,
    b: int,
    theirs: Mapping[str, BlockStep | None],
    given: dict[str, Named],
) -> tuple[SideProbe | None, SideProbe | None]:
    block, z, step = swept.blocks[b], swept.inputs[b], swept.steps[b]
    r = swept.displacements[b]
    weight = input_side = None
    with full_precision():
        at = block.evaluate(z, block.parameters_plus(None), with_input=b > 0)
        if step.weight_record is not None:
            beside = {n: None if s is None else s.weight for n, s in theirs.items()}
            problem = at.weight_problem(r)
            weight = _weights(problem, at, step.weight, step.weight_record, {**beside, **given})
        if step.input is not None and step.input_record is not None:
            if matcher.options.order == "sequential":
                moved = block.evaluate(z, block.parameters_plus(step.weight), with_input=True)
                at, r = moved, at.output + r - moved.output
            beside_z = {n: None if s is None else s.input for n, s in theirs.items()}
            problem = at.input_problem(r)
            input_side = _inputs(problem, at, step.input, step.input_record, beside_z)
    return weight, input_side


def _weights(
    problem: LeastSquares,
    at: Linearisation,
    step: Named,
    record: SolveRecord,
    beside: Mapping[str, Named | None],
) -> SideProbe:
    local = {name: at.weight_step(d) for name, d in _local_steps(problem).items()}
    parts = {
        name: None if other is None else [other[key].reshape(step[key].shape) for key in step]
        for name, other in {**beside, **local}.items()
    }
    return _side(problem, record, list(step.values()), parts)


def _inputs(
    problem: LeastSquares,
    at: Linearisation,
    step: Tensor,
    record: SolveRecord,
    beside: Mapping[str, Tensor | None],
) -> SideProbe:
    local = {name: at.input_step(d) for name, d in _local_steps(problem).items()}
    parts = {n: None if other is None else [other] for n, other in {**beside, **local}.items()}
    return _side(problem, record, [step], parts)


def _local_steps(problem: LeastSquares) -> dict[str, Tensor]:
    scalar = Scalar("trace")
    return {
        "local_gradient": problem.gradient(),
        "local_scalar": scalar.solve(problem, scalar.damping_for(problem)).step,
    }


def _side(
    problem: LeastSquares, record: SolveRecord, step: list[Tensor], parts: dict[str, Any]
) -> SideProbe:
    beside: dict[str, Likeness | None] = {
        name: None if other is None else liken(step, other) for name, other in parts.items()
    }
    in_force = record.damping if record.solver in _DAMPS_H else None
    return SideProbe(
        norm(step),
        record,
        None if record.damping is None else Spread.of(record.damping),
        beside,
        spectrum(problem, in_force),
    )
