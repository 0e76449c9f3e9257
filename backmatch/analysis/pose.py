"""A block's local Hessian posed: checked, evaluated once on copies of its state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..blocks import Block, Linearisation, adapt, unwrapped
from ..blocks.generic import GenericBlock, GenericLinearisation
from ..blocks.replay import RandomState
from ..model import check_parameters, check_ready
from ..precision import full_precision
from .curvature import Curvature
from .full_hessian import FullHessian
from .gauss_newton import GaussNewton
from .isolation import Moment
from .layout import Layout


@dataclass(frozen=True)
class Posed:
    """A local Hessian and what it belongs to.

    Attributes:
        shapes: of the unknowns by name, in their flat order.
        moment: what products must be computed inside of, as they may run parts of the module
            again (activation checkpointing, forward-mode derivatives); ``None`` where they do not.
    """

    curvature: Curvature
    name: str
    side: str
    kind: str
    samples: int
    shapes: dict[str, torch.Size]
    moment: Moment | None


def pose(module: nn.Module, z: Tensor, side: str, displacement: Tensor | None) -> Posed:
    """The Hessian of one side; see :func:`backmatch.local_hessian` for arguments and errors."""
    module = _checked(module, z, side)
    name = type(module).__name__
    moment = Moment(module, z.device)
    with moment.inside(), full_precision():
        start = RandomState.now(z.device)
        at = _evaluated(adapt(name, module), z, side)
        _check_displacement(displacement, at.output)
        problem_of = at.weight_problem if side == "weight" else at.input_problem
        with torch.no_grad():
            problem = problem_of(torch.zeros_like(at.output))
        layout = _layout(module, at, side, problem.systems, problem.unknowns, z.device)
        if displacement is None:
            curvature: Curvature = GaussNewton(problem, layout)
        else:
            if not isinstance(at, GenericLinearisation):
                start.restore()  # the same dropout masks
            curvature = _full(module, at, z, side, displacement, layout)
    kind = "gauss-newton" if displacement is None else "full"
    structured = displacement is None and not isinstance(at, GenericLinearisation)
    shapes = _shapes(module, z, side)
    return Posed(curvature, name, side, kind, z.shape[0], shapes, None if structured else moment)


def _checked(module: nn.Module, z: Tensor, side: str) -> nn.Module:
    if not isinstance(module, nn.Module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise TypeError(
            f"block must be one nn.Module with a forward, got {type(module).__name__}; several "
            "layers are one block in an nn.Sequential"
        )
    module = unwrapped(module)
    for part in module.modules():
        unwrapped(part)
    check_ready(z, "z")
    check_parameters(z, [adapt(type(module).__name__, module)], "z")
    if side == "input" and not z.is_floating_point():
        raise TypeError(f'side="input" needs a z of dtype float32 or float64, got {z.dtype}')
    if side == "weight" and not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f'side="weight" needs a block with trainable parameters, {type(module).__name__} has '
            'none; use side="input"'
        )
    return module


def _evaluated(block: Block, z: Tensor, side: str) -> Linearisation:
    at = block.forward(z.detach().clone(), with_input=side == "input", replayable=False)
    checks.finite("output", at.output, block=block.name)
    return at


def _check_displacement(displacement: Tensor | None, output: Tensor) -> None:
    if displacement is None:
        return
    checks.tensor("displacement", displacement)
    checks.same("displacement", displacement, "the block's output", output)
    if displacement.shape != output.shape:
        raise ValueError(
            f"displacement must have the shape of the block's output, {tuple(output.shape)}, got "
            f"{tuple(displacement.shape)}"
        )
    checks.finite("displacement", displacement)


def _shapes(module: nn.Module, z: Tensor, side: str) -> dict[str, torch.Size]:
    if side == "input":
        return {"z": z.shape}
    return {name: p.shape for name, p in module.named_parameters() if p.requires_grad}


def _layout(
    module: nn.Module, at: Linearisation, side: str, systems: int, n: int, device: torch.device
) -> Layout:
    """Steps only move entries about, so a step of indices tells where each of them goes."""
    index = torch.arange(systems * n, device=device).view(systems, n)
    if side == "input":
        return Layout.of(systems, n, at.input_step(index).reshape(-1))
    named = at.weight_step(index)
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    return Layout.of(systems, n, torch.cat([named[name].reshape(-1) for name in trainable]))


def _full(
    module: nn.Module,
    at: Linearisation,
    z: Tensor,
    side: str,
    displacement: Tensor,
    layout: Layout,
) -> FullHessian:
    """Structure gives the independent systems, a graph the second derivatives."""
    if not isinstance(at, GenericLinearisation):
        at = _evaluated(GenericBlock(type(module).__name__, module), z, side)
        assert isinstance(at, GenericLinearisation)
    zero = torch.zeros_like(displacement)
    problem = at.weight_problem(zero) if side == "weight" else at.input_problem(zero)
    leaves = list(at.leaves.values()) if side == "weight" else [at.z]
    return FullHessian(at, leaves, displacement.detach().clone(), problem, layout)
