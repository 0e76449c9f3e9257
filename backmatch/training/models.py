"""The networks that ``--model`` names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

#: A factory takes the shape of one sample, the hidden sizes and the number of outputs.
Factory = Callable[[Sequence[int], Sequence[int], int], nn.Sequential]


def mlp(shape: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with ReLU between them, torch's default initialisation.

    >>> mlp((8, 8), [128, 128], 10)
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=64, out_features=128, bias=True)
      (2): ReLU()
      (3): Linear(in_features=128, out_features=128, bias=True)
      (4): ReLU()
      (5): Linear(in_features=128, out_features=10, bias=True)
    )
    """
    layers: list[nn.Module] = [] if len(shape) == 1 else [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, outputs))


MODELS: dict[str, Factory] = {"mlp": mlp}
