"""The loss at the top of the chain: its value and the first target displacement."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks


def top_displacement(
    output: Tensor, loss: Callable[[Tensor], Tensor], *, factor: float
) -> tuple[Tensor, Tensor]:
    """``(J, r_B)`` with ``r_B = -factor * dJ/dz_B``, both detached.

    Raises:
        TypeError: the loss is no tensor, or no float32/float64.
        ValueError: it is no scalar, does not depend on the output, or reaches other leaves.
        NonFiniteError: it or its gradient holds NaN or Inf.
    """
    if not callable(loss):
        raise TypeError(f"loss must be a callable output -> scalar, got {type(loss).__name__}")
    with torch.enable_grad():
        leaf = output.detach().clone().requires_grad_()  # the loss may write to it
        value = loss(leaf)
        scalar = value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
    checks.finite("loss", value)
    if not value.requires_grad:
        raise ValueError("loss must depend on the network's output by differentiable operations")
    _refuse_other_leaves(value, leaf)
    (gradient,) = torch.autograd.grad(scalar, leaf, allow_unused=True)
    if gradient is None:
        raise ValueError("loss must depend on the network's output, got one that does not")
    checks.finite("gradient of the loss", gradient)
    return scalar.detach(), gradient.detach() * -factor


def _refuse_other_leaves(value: Tensor, output: Tensor) -> None:
    """A gradient that flows to other leaves has nowhere to go in the sweep: say so."""
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not output:
            raise ValueError(
                f"loss reaches a tensor of shape {tuple(leaf.shape)} that requires grad other than "
                "through the output; its gradient would be lost: detach it, or put weight decay "
                "and the like into the optimizer"
            )
        stack.extend(parent for parent, _ in node.next_functions)
