"""The learning rates that ``--schedule`` names: functions of the step over all steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

#: (steps taken, steps of the run) -> the factor of ``--lr`` for the next step.
Factor = Callable[[int, int], float]


def cosine(done: int, total: int) -> float:
    """Half a cosine from 1 to 0; the last step has a little more than 0.

    >>> cosine(0, 10), round(cosine(5, 10), 12), cosine(9, 10) > 0
    (1.0, 0.5, True)
    """
    return (1 + math.cos(math.pi * done / total)) / 2


def step(done: int, total: int) -> float:
    """1, from half of the steps on 1/10, from three quarters on 1/100.

    >>> [step(i, 4) for i in range(4)]
    [1.0, 1.0, 0.1, 0.01]
    """
    return 10.0 ** -((2 * done >= total) + (4 * done >= 3 * total))


FACTORS: dict[str, Factor] = {"cosine": cosine, "step": step}


class Constant:
    """The schedule that changes nothing, not even the optimizer's groups."""

    def step(self) -> None: ...

    def rate(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Scheduled:
    """One of :data:`FACTORS` on every group of an optimizer, by torch's ``LambdaLR``."""

    def __init__(self, factor: Factor, optimizer: torch.optim.Optimizer, total: int) -> None:
        self._scheduler = LambdaLR(optimizer, lambda done: factor(min(done, total), total))

    def step(self) -> None:
        """To be called after every step of the optimizer."""
        self._scheduler.step()

    def rate(self) -> dict[str, float]:
        """What the log says of the next step: the ``lr`` of the first group."""
        return {"lr": float(self._scheduler.get_last_lr()[0])}

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


def create(name: str, optimizer: torch.optim.Optimizer, total: int) -> Constant | Scheduled:
    """The schedule of a run of ``total`` steps, at its beginning."""
    if name == "constant":
        return Constant()
    return Scheduled(FACTORS[name], optimizer, total)
