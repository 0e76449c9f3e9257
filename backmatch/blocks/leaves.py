"""A module as the flat list of what it runs, and whether each part runs its class's forward."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _globals

from .observer import is_foreign
from .unwrap import has_behaviour, unwrapped


def leaves_of(module: nn.Module) -> list[nn.Module] | None:
    """The modules of nested plain Sequentials in order; ``None`` where one is not plain."""
    module = unwrapped(module)
    if type(module) is not nn.Sequential:
        return [module]
    if not is_plain(module):
        return None
    found: list[nn.Module] = []
    # Not .children(): that leaves out a module that stands twice.
    for child in module._modules.values():
        inner = None if child is None else leaves_of(child)
        if inner is None:
            return None
        found += inner
    return found


def is_plain(module: nn.Module) -> bool:
    """No hooks, no replaced forward: calling it runs its class's forward, compiled or not."""
    return not (
        has_behaviour(module)
        or is_foreign(_globals._global_forward_hooks)
        or is_foreign(_globals._global_forward_pre_hooks)
        or _globals._global_backward_hooks
        or _globals._global_backward_pre_hooks
    )
