"""The update of one parameter group: torch's SGD, on gradients multiplied by a factor each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def update(
    group: dict[str, Any],
    parameters: list[Tensor],
    factors: Sequence[float],
    state: dict[Tensor, Any],
) -> None:
    """Move ``parameters``, which all have a grad; the grads stay as they are.

    With d = factor * grad + weight_decay * p, this is ``torch.optim.SGD``'s rule: the weight decay
    is not divided by the scales, and momentum averages divided gradients.
    """
    lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
    grads = [p.grad for p in parameters if p.grad is not None]
    d = _multiplied(grads, factors)
    if decay != 0:
        torch._foreach_add_(d, parameters, alpha=decay)
    if momentum != 0:
        d = _with_momentum(d, parameters, momentum, group["nesterov"], state)
    torch._foreach_add_(parameters, d, alpha=-lr)


def _multiplied(grads: list[Tensor], factors: Sequence[float]) -> list[Tensor]:
    """factor * grad, also where the factor alone is no float32 (deep chains of small scales)."""
    if all(f == 0 or 1e-37 < f < 1e37 for f in factors):
        return list(torch._foreach_mul(grads, list(factors)))
    halves = [math.sqrt(f) for f in factors]
    d = list(torch._foreach_mul(grads, halves))
    torch._foreach_mul_(d, halves)
    return d


def _with_momentum(
    d: list[Tensor],
    parameters: list[Tensor],
    momentum: float,
    nesterov: bool,
    state: dict[Tensor, Any],
) -> list[Tensor]:
    old = [i for i, p in enumerate(parameters) if "momentum_buffer" in state[p]]
    if old:
        buffers = [state[parameters[i]]["momentum_buffer"] for i in old]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, [d[i] for i in old])
    for p, first in zip(parameters, d, strict=True):
        if "momentum_buffer" not in state[p]:
            state[p]["momentum_buffer"] = first.clone()
    buffers = [state[p]["momentum_buffer"] for p in parameters]
    return list(torch._foreach_add(d, buffers, alpha=momentum)) if nesterov else buffers
