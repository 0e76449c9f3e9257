"""A run of elementwise and reshaping modules as one map."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..elementwise import apply_diagonal
from .base import LayerMap


class DiagonalMap(LayerMap):
    """out = phi(z) entry by entry, up to a reshape; ``slopes`` of z's shape, ``None`` for ones."""

    def __init__(self, leaves: Sequence[nn.Module], z: Tensor) -> None:
        self.shape = z.shape
        self.output, self.slopes = apply_diagonal(leaves, z)

    def push(self, dz: Tensor) -> Tensor:
        out = dz if self.slopes is None else self.slopes * dz
        return out.reshape(self.output.shape)

    def pull(self, u: Tensor) -> Tensor:
        u = u.reshape(self.shape)
        return u if self.slopes is None else self.slopes * u
