"""From a model to its chain of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from . import checks
from .blocks.unwrap import has_behaviour, refuse_hooks, unwrapped

#: A new block starts at each of these.
LAYERS = (nn.Linear, nn.Bilinear, _ConvNd)
#: Normalisations belong to the layer before them.
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


def partition(model: nn.Module, by: str = "activation") -> list[nn.Module]:
    """Regroup (nested) ``nn.Sequential`` modules into blocks that share the model's modules.

    Args:
        model: an ``nn.Sequential``; a compiled one is unwrapped.
        by: ``"activation"``: a block starts at each Linear or convolution, norms and modules
            without parameters follow it, those before the first layer join the first block, and
            any other module with parameters is a block of its own. ``"layer"``: every module that
            is not a Sequential is a block.

    Returns:
        The blocks in order: modules of the model, or new ``nn.Sequential`` around them.

    Raises:
        TypeError: ``model`` is not an ``nn.Sequential``.
        ValueError: ``by`` is unknown, the model is empty, or it has hooks of its own (its forward
            is not called, so they would not fire).

    >>> from torch import nn
    >>> [len(b) for b in partition(nn.Sequential(
    ...     nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2), nn.Tanh()))]
    [3, 2]
    """
    checks.choice("by", by, ("activation", "layer"))
    model = unwrapped(model)
    if not plain_sequential(model):
        raise TypeError(
            f"partition expects an nn.Sequential, got {type(model).__name__}; pass "
            "BackMatching an iterable of modules, each of them a block"
        )
    refuse_hooks(model)
    leaves = list(_flattened(model._modules.values()))
    if not leaves:
        raise ValueError("partition expects at least one module, got an empty Sequential")
    if by == "layer":
        return leaves
    return [group[0] if len(group) == 1 else nn.Sequential(*group) for group in _grouped(leaves)]


def plain_sequential(model: nn.Module) -> bool:
    """Whether calling ``model`` runs its children one after the other and nothing else."""
    return (
        isinstance(model, nn.Sequential)
        and type(model).forward is nn.Sequential.forward
        and "forward" not in model.__dict__
    )


def _flattened(children: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    # Not .children() of the parent: that leaves out a module that stands twice.
    for child in children:
        assert child is not None
        child = unwrapped(child)
        if type(child) is nn.Sequential and not has_behaviour(child):
            yield from _flattened(child._modules.values())
        else:
            yield child


def _grouped(leaves: list[nn.Module]) -> list[list[nn.Module]]:
    groups: list[list[nn.Module]] = []
    # Whether the last group takes more: it has its layer, or still waits for the first one.
    is_open = False
    seen_layer = False
    for leaf in leaves:
        if isinstance(leaf, LAYERS):
            if is_open and not seen_layer:
                groups[-1].append(leaf)
            else:
                groups.append([leaf])
            is_open = seen_layer = True
        elif isinstance(leaf, NORMS) or next(leaf.parameters(), None) is None:
            if is_open:
                groups[-1].append(leaf)
            else:
                groups.append([leaf])
                is_open = True
        else:
            groups.append([leaf])
            is_open = False
    return groups
