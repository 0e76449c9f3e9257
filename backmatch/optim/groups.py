"""From ``params_or_blocks`` to a chain of blocks and torch's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..model import chain

#: A parameter group as torch takes it.
Group = dict[str, Any]

#: Options of the whole chain, which no group can have for itself.
CHAIN_OPTIONS = ("kind", "damping", "normalize", "estimate", "probes", "every", "average")

_HINT = (
    "a scale belongs to a block: pass the blocks (an nn.Sequential or "
    "backmatch.partition(model)), groups like {'blocks': [...], 'lr': 0.1}, or the parameters "
    "together with blocks=..."
)


def read(
    params_or_blocks: object, blocks: nn.Module | Iterable[nn.Module] | None
) -> tuple[dict[str, nn.Module], list[Group] | list[Any]]:
    """The chain, bottom first, and what torch's ``Optimizer`` takes as ``params``.

    Raises:
        TypeError, ValueError: neither blocks nor parameters with ``blocks=``, or no chain.
    """
    if blocks is not None:
        if isinstance(params_or_blocks, (nn.Module, Tensor)):
            raise TypeError(
                "params_or_blocks must be parameters or parameter groups where blocks= is given, "
                f"got {type(params_or_blocks).__name__}; use model.parameters()"
            )
        return chain(blocks), _listed(params_or_blocks)
    if isinstance(params_or_blocks, nn.Module):
        named = chain(params_or_blocks)
        return named, [{"params": parameters_of(named.values())}]
    items = _listed(params_or_blocks)
    if items and all(isinstance(item, Mapping) for item in items):
        return _read_groups([dict(item) for item in items])
    for item in items:
        if isinstance(item, (Tensor, tuple)):
            raise TypeError(f"params_or_blocks must be blocks, got parameters; {_HINT}")
        if not isinstance(item, nn.Module):
            raise TypeError(
                f"params_or_blocks must hold blocks, got {type(item).__name__}; {_HINT}"
            )
    named = chain(items)
    return named, [{"params": parameters_of(named.values())}]


def _read_groups(groups: list[Group]) -> tuple[dict[str, nn.Module], list[Group]]:
    """Groups of blocks: the chain is all of them, in the order of the groups."""
    modules: list[nn.Module] = []
    for i, group in enumerate(groups):
        if "blocks" not in group:
            raise TypeError(f"parameter group {i} must have 'blocks', got {sorted(group)}; {_HINT}")
        own = modules_of(group.pop("blocks"))
        group.setdefault("params", parameters_of(own))
        modules += own
    return chain(modules), groups


def _listed(value: object) -> list[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"params_or_blocks must be blocks, got {type(value).__name__}; {_HINT}")
    return list(value)


def modules_of(blocks: Any) -> list[nn.Module]:
    """The blocks of one group: a single module that is no Sequential is one block."""
    if isinstance(blocks, nn.Module) and not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        blocks = [blocks]
    return list(chain(blocks).values())


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters, frozen ones too (they may be unfrozen later), each once."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse option values that a step cannot work with."""
    mixed = [name for name in CHAIN_OPTIONS if name in group]
    if mixed:
        raise ValueError(
            f"{mixed[0]} is one for the whole chain: give it to the optimizer, not to a group"
        )
    lr = group["lr"]
    checks.non_negative("lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr)
    momentum = checks.non_negative("momentum", group["momentum"])
    checks.non_negative("weight_decay", group["weight_decay"])
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be a bool, got {type(group['nesterov']).__name__}")
    if group["nesterov"] and momentum == 0:
        raise ValueError("nesterov=True needs momentum > 0, got momentum=0")


def check_parameters(parameters: Iterable[Any], owners: Mapping[int, int]) -> None:
    """Every parameter is in a block, and of a dtype that scales can be found in."""
    for item in parameters:
        p = item[1] if isinstance(item, tuple) else item
        if not isinstance(p, Tensor):
            continue  # torch says what is wrong with it
        checks.tensor("a parameter", p)
        if id(p) not in owners:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is in none of the blocks; {_HINT}"
            )
