"""Evaluating a block again as if for the first time, without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _globals

from .observer import Observer

Hooks = dict[int, Callable[..., Any]]

_HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOK_TABLES = tuple(f"_global{table}" for table in _HOOK_TABLES)


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


class Snapshot:
    """RNG and buffers of some modules, to be put back; buffers that were reassigned too.

    Grads are put back where :meth:`hold_grads` has seen them.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self.random = RandomState.now(device)
        self.buffers = [
            (part._buffers, key, buffer, buffer.detach().clone())
            for module in modules
            for part in module.modules()
            for key, buffer in part._buffers.items()
            if buffer is not None
        ]
        self.grads: list[tuple[nn.Parameter, Tensor | None, Tensor | None]] = []

    def hold_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before they are written: an interrupt may come between two of them."""
        self.grads = [
            (p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in parameters
        ]

    def restore(self) -> None:
        self.random.restore()
        for parameter, grad, value in self.grads:
            parameter.grad = grad
            if grad is not None and value is not None:
                grad.data.copy_(value)
        for table, key, buffer, value in self.buffers:
            table[key] = buffer
            # .data: graphs that saved the buffer need not know.
            buffer.data.copy_(value)


@contextmanager
def transaction(modules: Iterable[nn.Module], device: torch.device) -> Iterator[Snapshot]:
    """Undo every change of RNG and buffers, and of the grads that the body had held, when the body
    fails, interrupts included."""
    before = Snapshot(modules, device)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


class HookRecorder:
    """Finds out, in the real forward pass, which forward hooks changed what they saw.

    User hooks fire once. A re-evaluation must leave out those that only observe (a counter, a
    logger), but not those that are part of the function: hooks that returned a value or changed
    what they were given, and the re-parametrising pre-hooks of ``torch.nn.utils`` (weight_norm,
    spectral_norm).
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.essential: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Fire every forward hook and note which take part; no backward hook fires."""
        with ExitStack() as stack:
            for owner, table, hooks in self._tables():
                # Ours watch the user's own passes, and this is none.
                wrapped = {k: self._noting(h) for k, h in hooks.items() if type(h) is not Observer}
                kept = {} if "backward" in table else wrapped
                stack.enter_context(_swapped(owner, table, kept))
            yield

    @contextmanager
    def essential_only(self) -> Iterator[None]:
        """Only hooks that are part of the function fire."""
        with ExitStack() as stack:
            for owner, table, hooks in self._tables():
                kept = {k: h for k, h in hooks.items() if id(h) in self.essential}
                stack.enter_context(_swapped(owner, table, kept))
            yield

    def _tables(self) -> Iterator[tuple[object, str, Hooks]]:
        """All tables that hold hooks: owner, attribute and content."""
        owners = [(part, _HOOK_TABLES) for part in self.module.modules()]
        for owner, tables in [*owners, (_globals, _GLOBAL_HOOK_TABLES)]:
            for table in tables:
                hooks = getattr(owner, table)
                if hooks:
                    yield owner, table, hooks

    def _noting(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        if type(hook).__module__.startswith("torch.nn.utils"):
            self.essential.add(id(hook))

        def noted(*args: Any, **kwargs: Any) -> Any:
            before = _versions(args)
            result = hook(*args, **kwargs)
            if result is not None or _versions(args) != before:
                self.essential.add(id(hook))
            return result

        return noted


def _versions(args: tuple[Any, ...]) -> list[int]:
    """Counts of in-place changes of the tensors that a hook was given."""
    flat = [a for arg in args for a in (arg if isinstance(arg, tuple) else (arg,))]
    return [a._version for a in flat if isinstance(a, Tensor)]


@contextmanager
def _swapped(owner: object, table: str, hooks: Hooks) -> Iterator[None]:
    """Replace the entries of a hook table in place: its identity and handles stay valid."""
    current = getattr(owner, table)
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
