"""The gradients of a step: what they must be, and how long they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import checks
from ..errors import NonFiniteError

#: The parameters that have a grad, group by group.
Moving = Sequence[Sequence[Tensor]]


def _pairs(moving: Moving) -> Iterator[tuple[Tensor, Tensor]]:
    for part in moving:
        for p in part:
            assert p.grad is not None
            yield p, p.grad


def refuse_sparse(moving: Moving) -> None:
    """Embeddings may give sparse gradients, which have no place in the update."""
    for p, grad in _pairs(moving):
        if grad.layout != torch.strided:
            raise TypeError(
                f"the grad of a parameter of shape {tuple(p.shape)} must be dense, got "
                f"{grad.layout}; make the embedding with sparse=False"
            )


def sizes(moving: Moving, owners: Mapping[int, int], names: Sequence[str]) -> dict[int, float]:
    """Norm of every block's gradient.

    Args:
        owners: ``id`` of a parameter -> index of its block.
        names: of the blocks.

    Raises:
        NonFiniteError: a gradient holds NaN or Inf.
    """
    pairs = list(_pairs(moving))
    if not pairs:
        return {}
    # In float64: squares of a vanishing float32 gradient are not 0 there.
    found = torch._foreach_norm([grad for _, grad in pairs], 2, torch.float64)
    squares: dict[int, float] = {}
    for (p, grad), norm in zip(pairs, torch.stack(list(found)).tolist(), strict=True):
        b = owners[id(p)]
        if not norm < float("inf"):
            checks.finite(f"grad of shape {tuple(p.shape)}", grad, block=names[b])
        squares[b] = squares.get(b, 0.0) + norm * norm
    return {b: square**0.5 for b, square in squares.items()}


def refuse_overflow(
    moving: Moving,
    owners: Mapping[int, int],
    names: Sequence[str],
    sizes: Mapping[int, float],
    factors: Mapping[int, float],
) -> None:
    """A step that its dtype cannot hold is an error before anything moves."""
    for p, _ in _pairs(moving):
        b = owners[id(p)]
        if not sizes[b] * factors[b] <= torch.finfo(p.dtype).max:
            raise NonFiniteError("divided gradient", 1, 1, block=names[b])
