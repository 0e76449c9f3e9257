"""Elementwise modules and max pooling behind a layer: every output follows one entry of it.

    out_k = phi_k(a_source(k)),    slope sigma_k

On the grid of ``a`` this is a diagonal (derived here): J = E diag(s) with orthonormal columns E,
s_i^2 = sum of sigma_k^2 over the k with source i. A problem with J A has the same solutions, damped
or of minimum norm, as one with diag(s) A and E^T r; |r|^2 - |E^T r|^2 is out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import LayerMap
from .batch_norm import RunningStatistics
from .diagonal import DiagonalMap
from .pool import MaxPoolMap


class Selection:
    """What follows a layer with output ``a`` of shape (m, channels, height, width).

    A batch norm on running statistics is elementwise too, as far as inputs go.

    Attributes:
        maps, shape: as given.
        slopes: s, shape of ``a``; ``None`` for ones.
        selects: whether some max pooling is part of it.
    """

    def __init__(self, maps: Sequence[LayerMap], shape: torch.Size) -> None:
        self.maps, self.shape = maps, shape
        self.selects = any(isinstance(layer, MaxPoolMap) for layer in maps)
        self._source: Tensor | None = None  # flat index into a channel's map, (m, channels, ..)
        self._sigma: Tensor | None = None
        for layer in maps:
            if isinstance(layer, MaxPoolMap):
                self._pool(layer)
            elif isinstance(layer, RunningStatistics):
                self._scale(layer.gain.view(1, -1, 1, 1).expand(layer.output.shape))
            else:
                assert isinstance(layer, DiagonalMap)
                self._scale(layer.slopes)
        self.slopes = self._sigma
        if self._source is not None:
            sigma = torch.ones_like(self._source, dtype=maps[-1].output.dtype)
            self._sigma = sigma if self._sigma is None else self._sigma
            self.slopes = self._scatter(self._sigma.square()).sqrt_()

    def _pool(self, layer: MaxPoolMap) -> None:
        flat = layer.source.flatten(2)
        if self._sigma is not None:
            self._sigma = self._sigma.flatten(2).gather(2, flat).view(layer.source.shape)
        if self._source is not None:
            flat = self._source.flatten(2).gather(2, flat)
        self._source = flat.view(layer.source.shape)

    def _scale(self, slopes: Tensor | None) -> None:
        if slopes is None:
            return
        slopes = slopes.reshape(self.shape if self._source is None else self._source.shape)
        self._sigma = slopes if self._sigma is None else self._sigma * slopes

    def _scatter(self, values: Tensor) -> Tensor:
        """Sum over the outputs of each entry of ``a``."""
        assert self._source is not None
        total = values.new_zeros(self.shape).flatten(2)
        total.scatter_add_(2, self._source.flatten(2), values.flatten(2))
        return total.view(self.shape)

    def pull(self, displacement: Tensor) -> Tensor:
        """E^T r on the grid of ``a``."""
        if self._source is None:
            return displacement.reshape(self.shape)
        assert self._sigma is not None
        assert self.slopes is not None
        summed = self._scatter(self._sigma * displacement.reshape(self._source.shape))
        return torch.where(self.slopes > 0, summed / self.slopes, 0)

    def outside(self, displacement: Tensor, pulled: Tensor, dims: tuple[int, ...]) -> Tensor | None:
        """The part of |r|^2 that E^T r leaves out, summed over ``dims`` of (m, channels, h, w)."""
        if self._source is None:
            return None
        whole = displacement.reshape(self._source.shape).square().sum(dims)
        missed: Tensor = whole - pulled.square().sum(dims)
        return missed.clamp_min_(0)


def selects(maps: Sequence[LayerMap], output: Tensor) -> bool:
    """Whether maps behind a layer with this output form a :class:`Selection`.

    Max pooling must run over the layer's own maps: not over what a Flatten made of them.
    """
    reshaped = output.dim() != 4
    for layer in maps:
        if isinstance(layer, DiagonalMap):
            reshaped = reshaped or layer.output.shape != layer.shape
        elif reshaped or not isinstance(layer, MaxPoolMap):
            return False
    return True
