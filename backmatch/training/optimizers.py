"""The optimizers that ``--optimizer`` names."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..optim import LayerwiseAdaptiveSGD, ScaleAmendedSGD
from ..partitioning import partition
from .config import TrainConfig

#: Makes the optimizer of a network's parameters.
Factory = Callable[[nn.Sequential, TrainConfig], torch.optim.Optimizer]


def _scaled(kind: type[ScaleAmendedSGD] | type[LayerwiseAdaptiveSGD]) -> Factory:
    def make(model: nn.Sequential, config: TrainConfig) -> torch.optim.Optimizer:
        return kind(
            partition(model, by=config.blocks or "activation"),
            lr=config.lr,
            momentum=config.momentum or 0.0,
            kind=config.scale_kind or "trace",
            estimate=config.scale_estimate or "exact",
            probes=config.scale_probes or 8,
            damping=config.scale_damping or 0.0,
            normalize=config.normalize is not False,
            every=config.scale_every or 10,
            average=config.scale_average or 0.0,
        )

    return make


OPTIMIZERS: dict[str, Factory] = {
    "sgd": lambda m, c: torch.optim.SGD(m.parameters(), lr=c.lr, momentum=c.momentum or 0.0),
    "adam": lambda m, c: torch.optim.Adam(m.parameters(), lr=c.lr),
    "adamw": lambda m, c: torch.optim.AdamW(m.parameters(), lr=c.lr),
    "rmsprop": lambda m, c: torch.optim.RMSprop(
        m.parameters(), lr=c.lr, momentum=c.momentum or 0.0
    ),
    "scale-amended": _scaled(ScaleAmendedSGD),
    "layerwise-adaptive": _scaled(LayerwiseAdaptiveSGD),
}


def takes_scales(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every step needs a pass of its own, caught by hooks."""
    return isinstance(optimizer, (ScaleAmendedSGD, LayerwiseAdaptiveSGD))


def close(optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer's hooks off the forward passes, if it has any."""
    if isinstance(optimizer, (ScaleAmendedSGD, LayerwiseAdaptiveSGD)):
        optimizer.close()
