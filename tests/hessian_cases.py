"""Dense local Hessians by torch.autograd, and the blocks of the catalogues to compare them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from cases import Net
from torch import Tensor, nn
from torch.func import functional_call

SEED = 7


def blocks_of(net: Net, dtype: torch.dtype = torch.float64) -> Iterator[tuple[nn.Module, Tensor]]:
    """Every block with the input that reaches it; the blocks themselves have not run."""
    blocks, z, _ = net.make(dtype)
    for block in blocks:
        yield block, z
        torch.manual_seed(SEED)
        with torch.no_grad():
            z = copy.deepcopy(block)(z.clone())


def has_side(block: nn.Module, z: Tensor, side: str) -> bool:
    """Whether there is anything to differentiate by."""
    if side == "input":
        return z.is_floating_point()
    return any(p.requires_grad for p in block.parameters())


def displacement_for(block: nn.Module, z: Tensor) -> Tensor:
    """A seeded displacement of the output's shape."""
    with torch.no_grad():
        out = copy.deepcopy(block)(z.clone())
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)


def dense_hessian(block: nn.Module, z: Tensor, side: str, displacement: Tensor | None) -> Tensor:
    """J^T J, or the second derivative of the local loss; dropout masks are those of ``SEED``."""
    function, at = _function(block, z, side)
    scale = 1.0 / len(z) if side == "weight" else 1.0
    sizes = [a.numel() for a in at]
    if displacement is None:
        rows = torch.autograd.functional.jacobian(function, at)
        J = torch.cat([j.reshape(-1, n) for j, n in zip(rows, sizes, strict=True)], 1)
        return scale * J.T @ J
    target = function(*at).detach() + displacement
    found = torch.autograd.functional.hessian(
        lambda *values: scale / 2 * (function(*values) - target).square().sum(), at
    )
    lines = [
        torch.cat([h.reshape(n, k) for h, k in zip(line, sizes, strict=True)], 1)
        for line, n in zip(found, sizes, strict=True)
    ]
    return torch.cat(lines)


def _function(
    block: nn.Module, z: Tensor, side: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    own = copy.deepcopy(block)
    names = [name for name, p in own.named_parameters() if p.requires_grad]

    def of_parameters(*values: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        named = dict(zip(names, values, strict=True))
        return functional_call(copy.deepcopy(own), named, (z.clone(),))

    def of_input(value: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return copy.deepcopy(own)(value.clone())

    if side == "input":
        return of_input, (z.detach(),)
    return of_parameters, tuple(own.get_parameter(name).detach() for name in names)
