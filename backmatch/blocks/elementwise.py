"""Modules without parameters that act entry by entry or only reshape, and blocks of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..problems import Diagonal, LeastSquares
from .base import Block, Linearisation, Named

#: They keep every entry: a sample's entries in, the same entries out, in another shape.
RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)

#: out[i] depends on in[i] only (dropout: on the mask it drew as well).
ELEMENTWISE = (
    nn.AlphaDropout,
    nn.CELU,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ELU,
    nn.FeatureAlphaDropout,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


def is_diagonal(leaf: nn.Module) -> bool:
    """Whether the leaf's Jacobian is diagonal per sample (up to a reshape)."""
    return type(leaf) in ELEMENTWISE or is_reshape(leaf)


def is_reshape(leaf: nn.Module) -> bool:
    """Whether the leaf only reshapes what belongs to one sample."""
    if type(leaf) is nn.Flatten:
        return leaf.start_dim >= 1
    if type(leaf) is nn.Unflatten:
        return isinstance(leaf.dim, int) and leaf.dim >= 1
    return type(leaf) is nn.Identity


def apply_diagonal(
    leaves: Sequence[nn.Module], z: Tensor, *, with_slopes: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Run a chain of diagonal leaves; return its output and its slopes in the shape of ``z``.

    Slopes come from reverse-mode autodiff with a cotangent of ones, which for a diagonal Jacobian
    is the diagonal: every activation has torch's own derivative, dropout the mask it drew.
    ``None`` stands for ones. ``z`` is never modified, in-place leaves included.
    """
    if not leaves:
        return z.detach(), None
    if with_slopes and len(leaves) == 1 and type(leaves[0]) is nn.ReLU:
        return _relu(z.detach())
    if all(type(leaf) in RESHAPES for leaf in leaves):
        with_slopes = False
    start = z.detach().requires_grad_(with_slopes)
    with torch.set_grad_enabled(with_slopes):
        out = start.clone()
        for leaf in leaves:
            # Plain leaves have no hooks; a compiled one is taken uncompiled.
            out = leaf.forward(out)
    if not with_slopes:
        return out, None
    (slopes,) = torch.autograd.grad(out, start, torch.ones_like(out))
    return out.detach(), slopes


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    """The commonest chain without a graph; its slope at 0 is 0, as in torch."""
    with torch.no_grad():
        return torch.relu(z), torch.gt(z, 0, out=torch.empty_like(z))


class DiagonalLinearisation(Linearisation):
    """Elementwise modules alone."""

    def __init__(self, output: Tensor, slopes: Tensor | None, shape: torch.Size) -> None:
        self.output, self.slopes, self.shape = output, slopes, shape

    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        raise AssertionError("an elementwise block has no parameters")

    def weight_step(self, step: Tensor) -> Named:
        raise AssertionError("an elementwise block has no parameters")

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        residual = displacement.reshape(self.shape[0], -1)
        if self.slopes is None:
            return Diagonal(torch.ones_like(residual), residual)
        return Diagonal(self.slopes.reshape(residual.shape), residual)

    def input_step(self, step: Tensor) -> Tensor:
        return step.reshape(self.shape)


class DiagonalBlock(Block):
    """A block of elementwise and reshaping modules."""

    def __init__(self, name: str, module: nn.Module, leaves: Sequence[nn.Module]) -> None:
        super().__init__(name, module)
        self.leaves = leaves

    def _linearise(self, z: Tensor, with_input: bool, parameters: Named | None) -> Linearisation:
        floating = z.is_floating_point()
        output, slopes = apply_diagonal(self.leaves, z, with_slopes=with_input and floating)
        return DiagonalLinearisation(output, slopes, z.shape)
