"""Where the unknowns of independent systems stand in the flat order that users see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """``systems`` of ``n`` unknowns each, and the same unknowns in flat order.

    Attributes:
        order: entry i of the flat vector stands at ``order[i]`` of the systems laid end to end;
            ``None`` where both orders are the same.
    """

    systems: int
    n: int
    order: Tensor | None = None

    @classmethod
    def of(cls, systems: int, n: int, order: Tensor) -> Layout:
        """From the index of every flat entry."""
        same = torch.equal(order, torch.arange(systems * n, device=order.device))
        return cls(systems, n, None if same else order)

    @property
    def size(self) -> int:
        """Unknowns in all."""
        return self.systems * self.n

    def to_flat(self, step: Tensor) -> Tensor:
        """(systems, n) -> (size,)."""
        flat = step.reshape(-1)
        return flat if self.order is None else flat[self.order]

    def to_systems(self, flat: Tensor) -> Tensor:
        """(size,) -> (systems, n)."""
        if self.order is not None:
            ordered = torch.empty_like(flat)
            ordered[self.order] = flat
            flat = ordered
        return flat.reshape(self.systems, self.n)

    def to_dense(self, blocks: Tensor) -> Tensor:
        """(systems, n, n) on the diagonal -> (size, size) in flat order."""
        dense = blocks.new_zeros(self.systems, self.n, self.systems, self.n)
        each = torch.arange(self.systems, device=blocks.device)
        dense[each, :, each, :] = blocks
        dense = dense.view(self.size, self.size)
        return dense if self.order is None else dense[self.order.unsqueeze(1), self.order]
