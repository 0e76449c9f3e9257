"""A module on copies of its state, so that looking at it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.replay import RandomState

#: Plain attributes, parameters and buffers of one part of a module.
State = tuple[dict[str, Any], dict[str, nn.Parameter | None], dict[str, Tensor | None]]


class Moment:
    """A module's state at one moment: copies of its parameters and buffers.

    What is computed :meth:`inside` sees this state whatever has become of the module meanwhile,
    and nothing it does reaches the module. Tensors that stand in several places stay shared.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.parts, self.device = list(module.modules()), device
        copies: dict[int, Tensor] = {}
        self.states = [_copied(_state_of(part), copies) for part in self.parts]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The module holds the copies; afterwards all is as on entry, the RNG as well.

        Plain attributes that a forward pass sets, a counter or a cached tensor, are put back too.
        """
        random = RandomState.now(self.device)
        entry = [_state_of(part) for part in self.parts]
        try:
            for part, state in zip(self.parts, self.states, strict=True):
                _set(part, state)
            yield
        finally:
            for part, state in zip(self.parts, entry, strict=True):
                _set(part, state)
            random.restore()


def _state_of(part: nn.Module) -> State:
    return dict(part.__dict__), dict(part._parameters), dict(part._buffers)


def _copied(state: State, copies: dict[int, Tensor]) -> State:
    attributes, parameters, buffers = state
    for value in [*parameters.values(), *buffers.values()]:
        if value is not None and id(value) not in copies:
            copies[id(value)] = _copy(value)
    return attributes, _through(copies, parameters), _through(copies, buffers)


def _through(copies: dict[int, Tensor], table: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value is None else copies[id(value)] for key, value in table.items()}


def _copy(value: Tensor) -> Tensor:
    own = value.detach().clone()
    if isinstance(value, nn.Parameter):
        return nn.Parameter(own, requires_grad=value.requires_grad)
    return own


def _set(part: nn.Module, state: State) -> None:
    attributes, parameters, buffers = state
    # Attributes first: recurrent modules keep a list of their weights there, which setattr fills.
    part.__dict__.clear()
    part.__dict__.update(attributes)
    for key in part._parameters.keys() - parameters.keys():
        del part._parameters[key]
    for key, parameter in parameters.items():
        if parameter is None:
            part._parameters[key] = None
        else:
            setattr(part, key, parameter)
    part._buffers.clear()
    part._buffers.update(buffers)
