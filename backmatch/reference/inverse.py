"""Inputs by inverting the layer: undo the activation, then the affine part by ridge regression."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .jacobian import BlockMap
from .linalg import Array
from .solve import Side, minimise


def layer_inverse(
    block: BlockMap, target: Array, d_w: Array, d_z: Array, solver: Any
) -> tuple[Array, Array]:
    """d = argmin 1/2 \\|A d - (phi^-1(zhat) - u)\\|^2 + mu/2 \\|d\\|^2 per sample, and each mu.

    The block is a Sequential of an affine part z -> u (matrix A) and an activation phi; zhat is
    first moved into phi's range, shrunk by ``clamp`` at every finite end.

    >>> from types import SimpleNamespace
    >>> block = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    >>> nn.init.constant_(block[0].weight, 2.0).shape
    torch.Size([1, 1])
    >>> f = BlockMap(block, torch.zeros(1, 1).double())
    >>> exact = type("LayerInverse", (SimpleNamespace,), {})(damping=0.0, clamp=1e-3)
    >>> d, _ = layer_inverse(f, np.tanh([0.5]), f.zero_w, f.zero_z, exact)
    >>> d.round(12)
    array([0.25])
    """
    if not isinstance(block.module, nn.Sequential) or len(block.module) < 2:
        raise TypeError("LayerInverse needs an affine part followed by an invertible activation")
    wanted = inverse_activation(block.module[-1], target, solver.clamp)
    affine = _AffinePart(block)
    systems = list(
        zip(
            np.array_split(np.arange(wanted.size), block.m),
            np.array_split(np.arange(d_z.size), block.m),
            strict=True,
        )
    )
    side = Side(
        residual=lambda d: wanted - affine.value(d_w, d),
        jacobian=lambda d: affine.input_jacobian(d_w, d),
        systems=systems,
        scale=1.0,
        shared_damping=False,
    )
    exact = type("Cholesky", (), {"damping": solver.damping})()
    return minimise(side, d_z, exact)


def inverse_activation(activation: nn.Module, value: Array, clamp: float) -> Array:
    """phi^-1 of ``value`` moved into phi's range shrunk by ``clamp`` at its finite ends."""
    if isinstance(activation, nn.LeakyReLU):
        return np.where(value >= 0, value, value / activation.negative_slope)
    if isinstance(activation, nn.Tanh):
        return np.arctanh(np.clip(value, -1 + clamp, 1 - clamp))
    if isinstance(activation, nn.Sigmoid):
        inside = np.clip(value, clamp, 1 - clamp)
        return np.log(inside / (1 - inside))
    if isinstance(activation, nn.Softplus):
        beta = activation.beta
        return np.log(np.expm1(beta * np.maximum(value, clamp))) / beta
    if isinstance(activation, nn.ELU):
        alpha = activation.alpha
        inside = np.maximum(value, -alpha + clamp)
        return np.where(inside >= 0, inside, np.log1p(np.minimum(inside, 0.0) / alpha))
    raise TypeError(f"LayerInverse cannot invert {type(activation).__name__}; use Auto")


class _AffinePart(BlockMap):
    """The block without its last module, with the whole block's parameters and displacements."""

    def __init__(self, block: BlockMap) -> None:
        assert isinstance(block.module, nn.Sequential)
        state = torch.get_rng_state()
        block.value(block.zero_w, block.zero_z)  # back to W, which the new map takes as its start
        super().__init__(block.module[:-1], block.z)
        torch.set_rng_state(state)
