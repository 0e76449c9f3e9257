"""Evaluating a block again as if for the first time, without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Hook tables of a module that act in a forward pass.
_HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_BACKWARD_TABLES = ("_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class RandomState:
    """RNG state of the CPU and of the device that a model lives on."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@dataclass(frozen=True)
class Replay:
    """What a block's forward pass started from: RNG state and buffers."""

    random: RandomState
    buffers: dict[str, Tensor]

    @classmethod
    def before(cls, module: nn.Module, device: torch.device) -> Replay:
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        return cls(RandomState.now(device), buffers)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the RNG is as before the forward pass; afterwards as on entry."""
        entry = RandomState.now(self.random.device)
        self.random.restore()
        try:
            yield
        finally:
            entry.restore()

    def fresh_buffers(self) -> dict[str, Tensor]:
        """Copies for an evaluation to move: the module's own are not touched."""
        return {name: b.clone() for name, b in self.buffers.items()}


@contextmanager
def transaction(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Undo every change of RNG and buffers when the body fails, interrupts included."""
    random = RandomState.now(device)
    buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    try:
        yield
    except BaseException:
        random.restore()
        for buffer, saved in buffers:
            buffer.data.copy_(saved)
        raise


class HookRecorder:
    """Finds out, in the real forward pass, which forward hooks changed what they saw.

    User hooks fire once. A re-evaluation must leave out those that only observe (a counter, a
    logger), but not those that are part of the function: hooks that returned a value, and the
    re-parametrising pre-hooks of ``torch.nn.utils`` (weight_norm, spectral_norm).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.essential: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Fire every forward hook and note which return something; no backward hook fires."""
        with ExitStack() as stack:
            for module in self.module.modules():
                for table in _BACKWARD_TABLES:
                    stack.enter_context(_swapped(module, table, {}))
                for table in ("_forward_pre_hooks", "_forward_hooks"):
                    hooks = getattr(module, table)
                    if hooks:
                        wrapped = {key: self._noting(hook) for key, hook in hooks.items()}
                        stack.enter_context(_swapped(module, table, wrapped))
            yield

    @contextmanager
    def essential_only(self) -> Iterator[None]:
        """Only hooks that are part of the function fire."""
        with ExitStack() as stack:
            for module in self.module.modules():
                for table in _HOOK_TABLES:
                    hooks = getattr(module, table)
                    if hooks:
                        kept = {k: h for k, h in hooks.items() if id(h) in self.essential}
                        stack.enter_context(_swapped(module, table, kept))
            yield

    def _noting(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        if type(hook).__module__.startswith("torch.nn.utils"):
            self.essential.add(id(hook))

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = hook(*args, **kwargs)
            if result is not None:
                self.essential.add(id(hook))
            return result

        return noted


@contextmanager
def _swapped(module: nn.Module, table: str, hooks: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Replace the entries of a hook table in place: its identity and handles stay valid."""
    current = getattr(module, table)
    saved = dict(current)
    try:
        current.clear()
        current.update(hooks)
        yield
    finally:
        # A hook may have removed itself or added another while it ran: keep that.
        added = {k: h for k, h in current.items() if k not in saved}
        kept = {k: h for k, h in saved.items() if k in current or k not in hooks}
        current.clear()
        current.update({**kept, **added})
