"""The scalars c of every block's two local Hessians, at the point of a caught forward pass.

Derived here: over the whole batch of m samples, with H_W = J_W^T J_W / m and H_z = J_z^T J_z,

    trace      c = tr(H) / n           mean eigenvalue (n: all unknowns of that side)
    spectral   c = lambda_max(H)
    rayleigh   c = g^T H g / g^T g     g the block's own gradient

Problems and products are those of the sweep, so that nothing is derived twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Linearisation, adapt
from ..blocks.generic import GenericBlock
from ..blocks.replay import RandomState
from ..errors import NonFiniteError
from ..precision import full_precision
from ..problems import LeastSquares
from ..solvers import curvature
from .estimates import hutchinson, power
from .passes import Entry, Pass

#: How far a block's output may be from what the next block was given, relative to its norm.
#: Wide enough for a forward pass in TF32; another function is much further off.
CHAIN_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}


@dataclass(frozen=True)
class Rule:
    """How scalars are found; see :class:`backmatch.optim.ScaleAmendedSGD`."""

    kind: str
    estimate: str
    probes: int

    def scalar(self, problem: LeastSquares, seed: int) -> Tensor:
        """c of one problem, 0-dimensional."""
        if self.estimate == "hutchinson":
            return hutchinson(problem, self.probes, seed)
        if self.estimate == "power":
            return power(problem, self.probes, seed)
        g = problem.gradient() if self.kind == "rayleigh" else problem.residual
        return curvature(self.kind, problem, g)[0]


@dataclass(frozen=True)
class Needs:
    """Which sides of which blocks a step needs."""

    weights: frozenset[int]
    inputs: frozenset[int]

    @property
    def blocks(self) -> list[int]:
        return sorted(self.weights | self.inputs)


#: (side, index of the block) -> c.
Scalars = dict[tuple[str, int], float]


@full_precision()
@torch.no_grad()
def measure(
    blocks: Mapping[str, nn.Module], run: Pass, needs: Needs, rule: Rule, seed: int
) -> Scalars:
    """The scalars that a step needs; leaves RNG, buffers, modes and grads as they are.

    Args:
        needs: at least one block.
        seed: of probes, where there are any.

    Raises:
        NonFiniteError: a scalar is NaN or Inf; names the block and the side.
        RuntimeError: the pass is not one through these blocks, or its tensors have changed.
    """
    names = list(blocks)
    found: dict[tuple[str, int], Tensor] = {}
    gaps: dict[int, Tensor] = {}
    entries = {b: _entry(run, b, names[b]) for b in needs.blocks}
    random = RandomState.now(entries[needs.blocks[0]].z.device)
    try:
        for b, entry in entries.items():
            with _located(blocks[names[b]], entry, names[b]):
                block = adapt(names[b], blocks[names[b]])
                at, gap = _linearised(block, entry, _handed_on(run, b), b in needs.inputs)
                found |= _scalars(at, run, b, needs, rule, seed)
            if gap is not None:
                gaps[b] = gap
    finally:
        random.restore()
    return _settled(found, gaps, names)


def _scalars(
    at: Linearisation, run: Pass, b: int, needs: Needs, rule: Rule, seed: int
) -> dict[tuple[str, int], Tensor]:
    """Both sides of one block; where no direction is asked for, any tensor of the shape does."""
    r = at.output
    if rule.kind == "rayleigh":
        # What the backward pass did not reach has no gradient: c = 0.
        r = run.pulled.get(b, torch.zeros_like(at.output))
        # c does not depend on its length, but the square of a vanishing one would be 0.
        size = r.abs().amax()
        r = r / size.masked_fill(size == 0, 1)
    found = {}
    if b in needs.weights:
        found["weight", b] = rule.scalar(at.weight_problem(r), 2 * (seed * 4096 + b))
    if b in needs.inputs:
        found["input", b] = rule.scalar(at.input_problem(r), 2 * (seed * 4096 + b) + 1)
    return found


def _settled(
    found: dict[tuple[str, int], Tensor], gaps: dict[int, Tensor], names: list[str]
) -> Scalars:
    """Numbers, in one wait for the device."""
    tensors = [*found.values(), *gaps.values()]
    values = torch.stack([t.double() for t in tensors]).tolist() if tensors else []
    scalars = dict(zip(found, values, strict=False))
    for (side, b), c in scalars.items():
        if not math.isfinite(c):
            name = f"scale of the local Hessian ({side} problem)"
            raise NonFiniteError(name, 1, 1, block=names[b])
    for b, gap in zip(gaps, values[len(found) :], strict=True):
        if not gap <= 1:
            raise RuntimeError(_broken(names, b))
    return scalars


@contextmanager
def _located(module: nn.Module, entry: Entry, name: str) -> Iterator[None]:
    """Modes and buffers as in the pass; NaN and Inf named where an eigenvalue solver stops."""
    try:
        with _as_then(module, entry):
            yield
    except torch._C._LinAlgError:  # type: ignore[attr-defined]
        _refuse_non_finite(module, entry, name)


def _refuse_non_finite(module: nn.Module, entry: Entry, name: str) -> None:
    checks.finite("input", entry.z, block=name)
    for key, parameter in module.named_parameters():
        checks.finite(f"parameter {key!r}", parameter, block=name)
    raise NonFiniteError("local Hessian", 1, 1, block=name)


def _broken(names: list[str], b: int) -> str:
    above = "the model's output" if b + 1 == len(names) else f"the input of block {names[b + 1]!r}"
    return (
        f"the output of block {names[b]!r}, computed again, is not {above}: the blocks must be "
        "run one after the other with nothing between them, each must depend on its input, "
        "parameters, buffers and torch's global random numbers alone, and parameters must stay as "
        "they are between the forward pass and step()"
    )


def _entry(run: Pass, b: int, name: str) -> Entry:
    entry = run.entries.get(b)
    if entry is None or run.trouble is not None:
        why = run.trouble or "its input was not seen (a pass under no_grad, or in another order)"
        raise RuntimeError(
            f"block {name!r}: {why}; the model must run all blocks above its lowest trained one "
            "in their order, each on one tensor"
        )
    if entry.z._version != entry.version:
        raise RuntimeError(
            f"the input of block {name!r} has been changed in place between the forward pass and "
            "step(); clone it first"
        )
    if entry.autocast:
        raise TypeError(f"block {name!r} ran under autocast: scales need float32 or float64")
    if entry.z.is_floating_point() or entry.z.is_complex():
        checks.tensor(f"input of block {name!r}", entry.z)
    return entry


def _handed_on(run: Pass, b: int) -> Tensor | None:
    """What the forward pass made of block b, if that still stands."""
    above = run.entries.get(b + 1)
    if above is not None:
        return above.z if above.z._version == above.version else None
    if run.output is None or b != max(run.entries):
        return None
    output, version = run.output
    return output if output._version == version else None


def _linearised(
    block: Block, entry: Entry, expected: Tensor | None, with_input: bool
) -> tuple[Linearisation, Tensor | None]:
    """The block at the point of the pass, and how far its output is off, 1 being too far."""
    block.replay = entry.replay
    here = block.parameters_plus(None)
    hooked = _hooks_of(block)
    at = block.evaluate(entry.z, here, with_input=with_input)
    gap = _gap(at.output, expected)
    if hooked and gap is not None and not bool(gap <= 1):
        # Some hook is part of the function; which one cannot be told from outside.
        assert isinstance(block, GenericBlock)
        block.hooks.essential |= hooked
        at = block.evaluate(entry.z, here, with_input=with_input)
        gap = _gap(at.output, expected)
    return at, gap


def _hooks_of(block: Block) -> set[int]:
    """Forward hooks of a generic block; re-parametrising ones of torch always take part."""
    if not isinstance(block, GenericBlock):
        return set()
    tables = [
        table
        for part in block.module.modules()
        for table in (part._forward_pre_hooks, part._forward_hooks)
    ]
    hooks = [hook for table in tables for hook in table.values()]
    block.hooks.essential |= {
        id(hook) for hook in hooks if type(hook).__module__.startswith("torch.nn.utils")
    }
    return {id(hook) for hook in hooks} - block.hooks.essential


def _gap(output: Tensor, expected: Tensor | None) -> Tensor | None:
    if expected is None:
        return None
    if output.shape != expected.shape:
        return torch.full((), float("inf"), device=output.device)
    size = torch.linalg.vector_norm(expected)
    gap = torch.linalg.vector_norm(output - expected) / size.masked_fill(size == 0, 1)
    # A NaN is the business of the scales: they name what is not finite.
    return torch.nan_to_num(gap / CHAIN_TOLERANCE[output.dtype], 0.0)


@contextmanager
def _as_then(module: nn.Module, entry: Entry) -> Iterator[None]:
    """Inside, modes are those of the pass, and buffers copies of those it began with."""
    parts = list(module.modules())
    modes = [part.training for part in parts]
    tables = [(part._buffers, dict(part._buffers)) for part in parts if part._buffers]
    copies = {}
    if tables:
        then = entry.replay.buffers
        copies = {id(b): then[name].clone() for name, b in module.named_buffers() if name in then}
    try:
        _set_modes(parts, modes, entry.training)
        for table, now in tables:
            table.update({key: copies.get(id(b), b) for key, b in now.items()})
        yield
    finally:
        _set_modes(parts, entry.training, modes)
        for table, now in tables:
            table.update(now)


def _set_modes(parts: list[nn.Module], before: list[bool], after: list[bool]) -> None:
    if before != after:
        for part, mode in zip(parts, after, strict=True):
            part.training = mode
