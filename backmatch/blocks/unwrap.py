"""Modules inside wrappers."""

from __future__ import annotations

from torch import nn

#: Wrappers for several devices or processes, by class name: importing FSDP costs a second.
_DISTRIBUTED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper.

    Raises:
        ValueError: the wrapper has hooks, which would be lost.
        TypeError: the module is wrapped for several devices or processes.
    """
    while isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
        refuse_hooks(module)
        module = inner
    for kind in type(module).__mro__:
        if kind.__name__ in _DISTRIBUTED and kind.__module__.startswith("torch."):
            raise TypeError(
                f"{kind.__name__} is not supported: pass the module inside it; a sweep over "
                "several processes is the business of BackMatching's process_group"
            )
    return module


def refuse_hooks(module: nn.Module) -> None:
    """A chain is run part by part: hooks on the whole would silently not fire."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"this {type(module).__name__} has forward hooks of its own, which would not fire: "
            "its parts are run one by one; register them on the parts"
        )


def has_behaviour(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward, or couples the batch."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _declares_coupling(module)
    )


def _declares_coupling(module: nn.Module) -> bool:
    # Looked for before it is asked for: a miss in nn.Module's own lookup is slow.
    declared = "batch_coupled" in module.__dict__ or hasattr(type(module), "batch_coupled")
    return declared and bool(getattr(module, "batch_coupled", False))
