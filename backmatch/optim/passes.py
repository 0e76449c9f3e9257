"""Catching what every block was given in the user's own forward pass, ``model(x)``.

The user calls the model, not the blocks (a block of :func:`backmatch.partition` may be a wrapper
that nobody calls), so the *places* watched are the modules that get called whichever way the chain
is run: the blocks with their plain Sequentials taken apart. Calls are told apart by their order,
which also settles a module that stands at several places.

A pass counts once its output is back-propagated: its record lives in a hook on the output's graph
and reaches the watcher when the gradient does. A pass that is never back-propagated (evaluation,
with or without gradients, in whatever mode) disturbs nothing, and its record dies with its graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules

from ..blocks.elementwise import ELEMENTWISE, RESHAPES
from ..blocks.observer import Observer
from ..blocks.replay import Replay
from ..blocks.unwrap import has_behaviour

#: Leaves that never write to their input, unless they say ``inplace``.
_READ_ONLY = (
    *ELEMENTWISE,
    *RESHAPES,
    nn.Linear,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Embedding,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)

#: Leaves of those whose output may be their input, or a view of it.
_MAY_HAND_ON = (
    *RESHAPES,
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class Entry:
    """What one block's forward pass started from.

    Attributes:
        z: its input, detached; a copy where the block might write to it.
        version: count of in-place changes of ``z`` at that moment.
        replay: RNG state and buffers.
        training: mode of every part of the block.
        autocast: whether torch was asked to compute in half precision.
    """

    z: Tensor
    version: int
    replay: Replay
    training: list[bool]
    autocast: bool


@dataclass
class Pass:
    """One forward pass through (the upper part of) the chain.

    Attributes:
        entries: by index of the block; blocks that ran without gradients are missing.
        output: of the top block, detached, and its count of in-place changes.
        pulled: dJ/dz of a block's output by index of the block, where it was asked for.
        trouble: why a block's input could not be caught.
    """

    entries: dict[int, Entry] = field(default_factory=dict)
    output: tuple[Tensor, int] | None = None
    pulled: dict[int, Tensor] = field(default_factory=dict)
    trouble: str | None = None

    def pull(self, block: int, gradient: Tensor) -> None:
        """Add what a backward pass brings; several through one graph add up, as grads do."""
        before, gradient = self.pulled.get(block), gradient.detach()
        self.pulled[block] = gradient if before is None else before + gradient


class Watcher:
    """Hooks that catch the passes of one chain of blocks.

    Attributes:
        wanted: whether the next pass is needed; hooks do next to nothing otherwise.
        found: the last pass that was back-propagated while wanted.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, pulls: bool) -> None:
        self.wanted = True
        self.found: Pass | None = None
        self._trained: list[bool] = []
        self._pulls = pulls
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._running: Pass | None = None
        self._inside: nn.Module | None = None
        self.watch(blocks)

    def watch(self, blocks: Sequence[nn.Module]) -> None:
        """Take these blocks as the chain."""
        self._blocks = list(blocks)
        self._copies = copied(blocks)
        self._order: list[nn.Module] = []
        self._starts: dict[int, int] = {}
        for b, block in enumerate(blocks):
            self._starts[len(self._order)] = b
            self._order += called(block)
        self._places: dict[int, list[int]] = {}
        for place, module in enumerate(self._order):
            self._places.setdefault(id(module), []).append(place)
        self._at, self._inside, self._running = -1, None, None

    def rest(self, *, wanted: bool) -> None:
        """Let go of the pass found; catch the next one if ``wanted``, or if parameters are
        frozen or unfrozen before it."""
        self.found, self.wanted = None, wanted
        if not wanted:
            self._trained = self._trains()

    def _trains(self) -> list[bool]:
        return [p.requires_grad for block in self._blocks for p in block.parameters()]

    @property
    def is_open(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def open(self) -> None:
        """Put the hooks in place."""
        if not self._handles:
            enter, leave = Observer(self._enter), Observer(self._leave)
            self._handles = [
                _modules.register_module_forward_pre_hook(enter),
                # Also when the module raises: what it was inside of is over.
                _modules.register_module_forward_hook(leave, always_call=True),
            ]

    def close(self) -> None:
        """Take the hooks off and let go of what they caught."""
        while self._handles:
            self._handles.pop().remove()
        self.found = self._running = self._inside = None

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        places = self._places.get(id(module))
        if places is None or self._is_part(module) or _is_no_pass():
            return
        self._inside = module
        if self._at + 1 in places:
            self._at += 1
        else:
            self._at, self._running = places[0], None
        block = self._starts.get(self._at)
        if block == 0:
            self._running = None
        if self._running is None and not self.wanted:
            self.wanted = block is not None and self._trains() != self._trained
        if block is None or not self.wanted or not torch.is_grad_enabled():
            return
        if self._running is None:
            self._running = Pass()
        self._catch(self._running, block, args)

    def _is_part(self, module: nn.Module) -> bool:
        """Whether this call is one within the place that runs, not a place of its own.

        An interrupt leaves a place without notice: then calls of others show that it is over.
        """
        inside = self._inside
        return inside is not None and any(part is module for part in _below(inside))

    def _catch(self, run: Pass, block: int, args: tuple[object, ...]) -> None:
        if len(args) != 1 or not isinstance(args[0], Tensor):
            run.trouble = f"block {block} was not called with one tensor"
            return
        z, module = args[0], self._blocks[block]
        kept = z.detach().clone() if self._copies[block] else z.detach()
        training = [part.training for part in module.modules()]
        replay = Replay.before(module, z.device)
        autocast = torch.is_autocast_enabled(z.device.type)
        run.entries[block] = Entry(kept, kept._version, replay, training, autocast)
        if self._pulls and block > 0 and z.requires_grad:
            _on_gradient(z, partial(run.pull, block - 1))

    def _leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if self._inside is not module:
            return
        self._inside = None
        if self._at != len(self._order) - 1:
            return
        run, self._running = self._running, None
        if run is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        kept = output.detach()
        run.output = kept, kept._version
        if self._pulls:
            _on_gradient(output, partial(run.pull, len(self._blocks) - 1))
        _on_gradient(output, _Report(self, run))


class _Report:
    """Hands a pass over once it is back-propagated; does not keep the watcher alive."""

    def __init__(self, watcher: Watcher, run: Pass) -> None:
        self.watcher, self.run = weakref.ref(watcher), run

    def __call__(self, gradient: Tensor) -> None:
        watcher = self.watcher()
        if watcher is not None and watcher.is_open and watcher.wanted:
            watcher.found = self.run


def _on_gradient(tensor: Tensor, look: Callable[[Tensor], None]) -> None:
    """Show the gradient of a tensor, in every backward pass through it."""
    tensor.register_hook(look)  # type: ignore[no-untyped-call]


def _below(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is not None:
            yield child
            yield from _below(child)


def called(block: nn.Module) -> list[nn.Module]:
    """The modules that get called when a block runs, plain Sequentials taken apart.

    >>> [type(m).__name__ for m in called(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()))]
    ['ReLU', 'Tanh']
    """
    if type(block) is not nn.Sequential or has_behaviour(block) or not block._modules:
        return [block]
    # Not .children(): that leaves out a module that stands twice.
    return [
        part for child in block._modules.values() if child is not None for part in called(child)
    ]


def may_write(block: nn.Module) -> bool:
    """Whether a block might change its input in place."""
    return any(
        type(part) not in _READ_ONLY or getattr(part, "inplace", False)
        for part in block.modules()
        if type(part) is not nn.Sequential
    )


def copied(blocks: Sequence[nn.Module]) -> list[bool]:
    """Whose inputs must be copied: of blocks that might write to them, or that might hand them on
    to one that does (an Identity, a Flatten, a Dropout that is off).

    >>> copied([nn.Linear(2, 2), nn.Identity(), nn.ReLU(inplace=True), nn.Identity()])
    [False, True, True, False]
    """
    found: list[bool] = []
    for block in reversed(blocks):
        found.append(may_write(block) or bool(found and found[-1] and may_hand_on(block)))
    return found[::-1]


def may_hand_on(block: nn.Module) -> bool:
    """Whether a block's output may share the memory of its input."""
    return all(
        type(part) in _MAY_HAND_ON for part in block.modules() if type(part) is not nn.Sequential
    )


def _is_no_pass() -> bool:
    """Whether this is no forward pass of a training loop.

    Checkpointing runs modules again in the backward pass; torch.func and torch.jit run them on
    tensors that stand for others.
    """
    return bool(
        torch._C._current_graph_task_id() != -1
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )
