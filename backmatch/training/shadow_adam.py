"""The step that Adam would make: its moments, fed with the gradients of a run that it never moves.

Kingma and Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1, with the constants
that they propose, which are torch's defaults too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Kingma and Ba's constants.
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8


class ShadowAdam:
    """Adam's moments over the gradients of some parameters.

    Args:
        parameters: whose steps are wanted; never written.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> shadow = ShadowAdam([weight])
    >>> shadow.feed([torch.tensor([2.0, -0.5])])
    >>> [round(value, 6) for value in shadow.steps()[weight].tolist()]
    [-0.001, 0.001]
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._fed = 0
        self._first = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self._second = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def feed(self, gradients: Sequence[Tensor]) -> None:
        """Take up one gradient per parameter."""
        self._fed += 1
        for gradient, first, second in zip(gradients, self._first, self._second, strict=True):
            first.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)

    @torch.no_grad()
    def steps(self) -> dict[nn.Parameter, Tensor]:
        """Adam's next step of every parameter, the last gradient included, at lr 1e-3."""
        first_share, second_share = 1 - BETA1**self._fed, 1 - BETA2**self._fed
        return {
            p: -LR * (first / first_share) / ((second / second_share).sqrt() + EPS)
            for p, first, second in zip(self.parameters, self._first, self._second, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        first, second = dict(enumerate(self._first)), dict(enumerate(self._second))
        return {"fed": self._fed, "first": first, "second": second}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state`.

        Raises:
            LookupError, AttributeError, TypeError, ValueError: it is none, or of other parameters.
        """
        for name, mine in (("first", self._first), ("second", self._second)):
            for tensor, saved in zip(mine, state[name].values(), strict=True):
                if tensor.shape != saved.shape:
                    raise ValueError(f"{name} moment of another shape")
                tensor.copy_(saved)
        self._fed = int(state["fed"])
