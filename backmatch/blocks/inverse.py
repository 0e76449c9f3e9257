"""Inverses of activations on their shrunk range, for ``LayerInverse``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .elementwise import is_reshape


class Inverse(NamedTuple):
    """phi^-1 and the open range of phi."""

    function: Callable[[Tensor], Tensor]
    low: float
    high: float


def inverse_of(leaf: nn.Module) -> Inverse | None:
    """The inverse of an activation module; ``None`` where it has none."""
    if type(leaf) is nn.Tanh:
        return Inverse(torch.atanh, -1.0, 1.0)
    if type(leaf) is nn.Sigmoid:
        return Inverse(torch.logit, 0.0, 1.0)
    if type(leaf) is nn.LeakyReLU and leaf.negative_slope > 0:
        slope = leaf.negative_slope
        return Inverse(lambda y: torch.where(y >= 0, y, y / slope), -math.inf, math.inf)
    if type(leaf) is nn.ELU and leaf.alpha > 0:
        alpha = leaf.alpha
        return Inverse(
            lambda y: torch.where(y >= 0, y, torch.log1p(y.clamp_max(0) / alpha)),
            -alpha,
            math.inf,
        )
    if type(leaf) is nn.Softplus:
        beta, threshold = leaf.beta, leaf.threshold
        return Inverse(
            lambda y: torch.where(
                beta * y > threshold, y, y + torch.log(-torch.expm1(-beta * y)) / beta
            ),
            0.0,
            math.inf,
        )
    return None


def inverted_displacement(
    post: Sequence[nn.Module],
    pre_activation: Tensor,
    output: Tensor,
    displacement: Tensor,
    clamp: float,
) -> Tensor | None:
    """phi^-1(clamped zhat) - a in the shape of ``a``; ``None`` if phi is not invertible.

    The clamp acts on the target alone: a unit that is saturated beyond it is pulled back.
    """
    active = [leaf for leaf in post if not is_reshape(leaf) and not _is_identity(leaf)]
    displacement = displacement.reshape(pre_activation.shape)
    if not active:
        return displacement
    inverse = inverse_of(active[0])
    if len(active) > 1 or inverse is None:
        return None
    low, high = inverse.low + clamp, inverse.high - clamp
    target = output.reshape(pre_activation.shape) + displacement
    return inverse.function(target.clamp(low, high)) - pre_activation


def _is_identity(leaf: nn.Module) -> bool:
    """Dropout that drops nothing."""
    return type(leaf) is nn.Dropout and (not leaf.training or leaf.p == 0)
