"""The independent systems of one real block: the samples of its inputs, the units of its weights.

A local Hessian is block-diagonal over them, so its eigenvalues are theirs, taken together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .gauss_newton import GaussNewton
from .pose import Posed, pose
from .singular_values import distinct, jacobians
from .spectra import Spectra

#: Relative difference at which a product contradicts the independence of the units.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def systems(block: nn.Module, z: Tensor, side: str, most: int | None = None) -> Spectra:
    """Spectra of the systems that a block's local Hessian consists of.

    Args:
        block: for the weight side, one whose output channel j depends on the j-th entries (along
            dimension 0) of its parameters alone: a Linear with batch norm, elementwise modules
            and parameterless shortcuts around it.
        z: its input, shape (m, ...); for the input side the samples must be independent.
        side: ``"input"``: one system per sample; ``"weight"``: one per output unit, over all its
            trainable parameters. Systems that share one matrix (a Linear alone) are one.
        most: only the first so many systems.

    Returns:
        The spectra; taken together they are the eigenvalues of :func:`backmatch.local_hessian`.

    Raises:
        ValueError: the block does not fall apart in this way.

    >>> layer = nn.Linear(3, 2, bias=False).double()
    >>> z = torch.eye(3).double()
    >>> systems(nn.Sequential(layer, nn.Tanh()), z, "weight").eigenvalues.shape
    torch.Size([2, 3])
    """
    posed = pose(block, z, side, None)
    assert isinstance(posed.curvature, GaussNewton)
    problem = posed.curvature.problem
    if problem.structure == "joint" and side == "input":
        raise ValueError(
            "the samples of this block are one joint system on the input side; put its batch norm "
            "into eval mode"
        )
    with torch.no_grad():
        if problem.structure == "joint" and problem.systems == 1:
            return Spectra.of_jacobians(_by_units(posed, posed.curvature)[:most], problem.scale)
        problem, _ = distinct(problem)
        if most is not None and problem.separable:
            problem = problem.take(torch.arange(min(most, problem.systems), device=z.device))
        parts = [Spectra.of_jacobians(J[:most], problem.scale) for _, J in jacobians(problem)]
        return Spectra.joined(parts)


def _by_units(posed: Posed, curvature: GaussNewton) -> Tensor:
    """Jacobians (units, m, parameters of a unit) by one product per parameter of a unit."""
    problem, layout = curvature.problem, curvature.layout
    units = {shape[0] if shape else 0 for shape in posed.shapes.values()}
    n_out = max(units)
    if len(units) != 1 or n_out == 0 or problem.residual.numel() % (posed.samples * n_out):
        raise ValueError(f"this block has no units of its own: its parameters are {posed.shapes}")

    def moved(named: list[Tensor]) -> Tensor:
        """(m, units, positions): the outputs for one step, (units, k) per parameter."""
        flat = torch.cat([part.reshape(-1) for part in named])
        return problem.jvp(layout.to_systems(flat)).reshape(posed.samples, n_out, -1)

    sizes = [math.prod(shape[1:]) for shape in posed.shapes.values()]
    eye = torch.eye(sum(sizes)).to(curvature.like)
    columns = [moved([part.expand(n_out, -1) for part in torch.split(row, sizes)]) for row in eye]
    J = torch.stack(columns, -1)
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(n_out, sum(sizes), generator=generator, dtype=torch.float64).to(J)
    direct = moved(list(torch.split(step, sizes, 1)))
    difference = direct - torch.einsum("mupk,uk->mup", J, step)
    limit = _TOLERANCE[J.dtype] * torch.linalg.vector_norm(direct)
    if bool(torch.linalg.vector_norm(difference) > limit):
        raise ValueError("an output unit of this block depends on parameters of another one")
    return J.permute(1, 0, 2, 3).flatten(1, 2)
