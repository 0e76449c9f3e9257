"""Maps applied one after the other, as one map."""

from __future__ import annotations

from torch import Tensor

from .base import LayerMap, Named
from .diagonal import DiagonalMap


class ChainMap(LayerMap):
    """maps[-1] after ... after maps[0]; at least one."""

    def __init__(self, maps: list[LayerMap]) -> None:
        self.maps = maps
        self.output = maps[-1].output
        self.coupled = any(layer.coupled for layer in maps)
        self.parameters = {k: shape for layer in maps for k, shape in layer.parameters.items()}

    def push(self, dz: Tensor) -> Tensor:
        for layer in self.maps:
            dz = layer.push(dz)
        return dz

    def pull(self, u: Tensor) -> Tensor:
        for layer in reversed(self.maps):
            u = layer.pull(u)
        return u

    def push_parameters(self, step: Named) -> Tensor:
        out: Tensor | None = None
        for layer in self.maps:
            out = None if out is None else layer.push(out)
            if layer.parameters:
                own = layer.push_parameters(step)
                out = own if out is None else out + own
        assert out is not None, "no layer of the chain has trainable parameters"
        return out

    def pull_parameters(self, u: Tensor) -> Named:
        pulled: Named = {}
        first = next(i for i, layer in enumerate(self.maps) if layer.parameters)
        for i in range(len(self.maps) - 1, first - 1, -1):
            pulled.update(self.maps[i].pull_parameters(u))
            if i > first:
                u = self.maps[i].pull(u)
        return pulled


def sole(layer: LayerMap) -> LayerMap:
    """The one map of a chain that does more than reshape, else the chain itself."""
    if not isinstance(layer, ChainMap):
        return layer
    acting = [m for m in layer.maps if not (isinstance(m, DiagonalMap) and m.slopes is None)]
    return acting[0] if len(acting) == 1 else layer
