"""A module on copies of its state, so that looking at it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..blocks.replay import RandomState


@contextmanager
def isolated(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, parameters and buffers are copies; afterwards the originals and the RNG are back.

    What is computed inside keeps the copies: it stays true to the state at this moment when the
    originals move on, and nothing it does reaches them. Tensors that stand in several places
    stay shared. Plain attributes that a forward pass sets, a counter or a cached tensor, are put
    back as well.
    """
    random = RandomState.now(device)
    copies: dict[int, Tensor] = {}
    parts = list(module.modules())
    tables = [(part, dict(part._parameters), dict(part._buffers)) for part in parts]
    attributes = [(part, dict(part.__dict__)) for part in parts]
    try:
        for part, parameters, buffers in tables:
            for key, parameter in parameters.items():
                if parameter is not None:
                    # setattr: recurrent modules keep a list of their weights beside the table.
                    setattr(part, key, copies.setdefault(id(parameter), _copy(parameter)))
            for key, buffer in buffers.items():
                if buffer is not None:
                    part._buffers[key] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        # First, as setting a recurrent module's weights writes to a list among its attributes.
        for part, saved in attributes:
            part.__dict__.clear()
            part.__dict__.update(saved)
        for part, parameters, buffers in tables:
            for key, parameter in parameters.items():
                if parameter is not None:
                    setattr(part, key, parameter)
            part._buffers.clear()
            part._buffers.update(buffers)
        random.restore()


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
