"""From a module to its two local problems: choose the route that fits its structure."""

from __future__ import annotations

from torch import nn

from .base import Block, Linearisation, Named
from .chain import ChainBlock
from .elementwise import DiagonalBlock, is_diagonal
from .generic import GenericBlock
from .layers import is_known
from .leaves import is_plain, leaves_of
from .linear import LinearBlock
from .replay import Snapshot, transaction
from .residual import Residual
from .unwrap import unwrapped

__all__ = [
    "Block",
    "Linearisation",
    "Named",
    "Residual",
    "Snapshot",
    "adapt",
    "leaves_of",
    "transaction",
    "unwrapped",
]


def adapt(name: str, module: nn.Module) -> Block:
    """The block for a module, as its hooks, types and frozen parameters are now."""
    leaves = leaves_of(module)
    if leaves is None or not all(is_plain(leaf) for leaf in leaves):
        return GenericBlock(name, module)
    layers = [i for i, leaf in enumerate(leaves) if not is_diagonal(leaf)]
    if not layers:
        return DiagonalBlock(name, module, leaves)
    at = layers[0]
    layer = leaves[at]
    # A weight that is no parameter (pruned, say) is not in named_parameters().
    if (
        len(layers) == 1
        and type(layer) is nn.Linear
        and layer._parameters.get("weight") is not None
    ):
        return LinearBlock(name, module, leaves[:at], layer, leaves[at + 1 :])
    return _composite(name, module, leaves)


def _composite(name: str, module: nn.Module, leaves: list[nn.Module]) -> Block:
    """Known layers, each with parameters of its own; otherwise generic."""
    owned = [id(p) for leaf in leaves for p in leaf.parameters()]
    if all(is_known(leaf) for leaf in leaves) and len(set(owned)) == len(owned):
        return ChainBlock(name, module, leaves)
    return GenericBlock(name, module)
