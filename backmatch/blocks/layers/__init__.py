"""The layers whose maps are known, by exact type."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..elementwise import is_diagonal
from ..residual import Residual
from .affine import conv2d, linear, supports_conv, supports_linear
from .base import LayerMap, Point
from .batch_norm import batch_norm, supports_batch_norm
from .chain import ChainMap
from .diagonal import DiagonalMap
from .group_norm import group_norm, layer_norm, supports_norm
from .pool import pool, supports_pool
from .residual import ResidualMap, is_transparent

__all__ = ["LayerMap", "Point", "compose", "is_known"]

#: type -> (whether this instance's options are supported, how to build its map).
Entry = tuple[Callable[[nn.Module], bool], Callable[[nn.Module, Tensor, Point], LayerMap]]
KNOWN: dict[type[nn.Module], Entry] = {
    nn.AdaptiveAvgPool1d: (supports_pool, pool),
    nn.AdaptiveAvgPool2d: (supports_pool, pool),
    nn.AdaptiveMaxPool1d: (supports_pool, pool),
    nn.AdaptiveMaxPool2d: (supports_pool, pool),
    nn.AvgPool1d: (supports_pool, pool),
    nn.AvgPool2d: (supports_pool, pool),
    nn.BatchNorm1d: (supports_batch_norm, batch_norm),
    nn.BatchNorm2d: (supports_batch_norm, batch_norm),
    nn.Conv2d: (supports_conv, conv2d),
    nn.GroupNorm: (supports_norm, group_norm),
    nn.LayerNorm: (supports_norm, layer_norm),
    nn.Linear: (supports_linear, linear),
    nn.MaxPool1d: (supports_pool, pool),
    nn.MaxPool2d: (supports_pool, pool),
}


def is_known(leaf: nn.Module) -> bool:
    """Whether the leaf is diagonal, or of a known type with supported options."""
    if is_diagonal(leaf):
        return True
    entry = KNOWN.get(type(leaf))
    return entry is not None and entry[0](leaf)


def compose(leaves: Sequence[nn.Module], z: Tensor, point: Point) -> LayerMap:
    """The map of known leaves applied one after the other; diagonal runs become one map."""
    maps: list[LayerMap] = []
    run: list[nn.Module] = []
    for leaf in [leaf for leaf in leaves if type(leaf) is not nn.Identity] or leaves:
        if is_diagonal(leaf):
            run.append(leaf)
            continue
        if run:
            maps.append(DiagonalMap(run, z))
            z, run = maps[-1].output, []
        maps.append(KNOWN[type(leaf)][1](leaf, z, point))
        z = maps[-1].output
    if run:
        maps.append(DiagonalMap(run, z))
    return maps[0] if len(maps) == 1 else ChainMap(maps)


# A Residual is made of leaves of this very table.
KNOWN[Residual] = (
    lambda module: is_transparent(module, is_known),
    lambda module, z, point: ResidualMap(module, z, point, compose),
)
