"""Max and average pooling over the last one or two dimensions, adaptive ones too.

The one-dimensional modules are the two-dimensional ones on maps of height 1.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...problems import Diagonal, Kronecker, LeastSquares
from .base import LayerMap, Point

#: Longest side of a map whose pooling matrix is decomposed; beyond it the problem is an operator.
LONGEST_AXIS = 1024

MaxPool = nn.MaxPool1d | nn.MaxPool2d
AdaptiveMaxPool = nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d
AvgPool = nn.AvgPool1d | nn.AvgPool2d
AdaptiveAvgPool = nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d
FLAT = (nn.MaxPool1d, nn.AdaptiveMaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)

Pair = tuple[int, int]


class PoolMap(LayerMap):
    """Pooling of z of shape (m, ..., height, width), or (m, ..., width) for the flat modules.

    Attributes:
        grid: z of shape (m, ..., height, width).
        pooled: the output, (m, ..., pooled height, pooled width).
    """

    pooled: Tensor

    def __init__(self, layer: nn.Module, z: Tensor, point: Point) -> None:
        self.flat = isinstance(layer, FLAT)
        least = 2 if self.flat else 3
        if not least <= z.dim() <= least + 1 or not z.is_floating_point():
            sides = "length" if self.flat else "height, width"
            raise point.refuse(layer, f"(batch, channels, {sides}), floating", z)
        self.shape, self.grid = z.shape, self._lift(z)

    def _lift(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-2) if self.flat else value

    def _lower(self, value: Tensor) -> Tensor:
        return value.squeeze(-2) if self.flat else value

    def _pair(self, option: int | tuple[int, ...], own: int) -> Pair:
        """An option of the layer per axis; ``own`` on the axis that flat layers lack."""
        axes = 1 if self.flat else 2
        values = tuple(option) if isinstance(option, (tuple, list)) else (option,) * axes
        return (own, values[0]) if self.flat else (values[0], values[-1])

    def pull(self, u: Tensor) -> Tensor:
        return self._lower(self._reverse(self._lift(u)))

    @abstractmethod
    def _reverse(self, u: Tensor) -> Tensor:
        """J^T u, shapes of ``pooled`` and ``grid``."""


class MaxPoolMap(PoolMap):
    """Every output is one entry of its map.

    Attributes:
        source: int64 flat index into the input map (height * width) of each output entry, shape
            of the output.
        overlapping: whether one entry may be selected more than once.
    """

    overlapping: bool

    def _set(self, pooled: Tensor, source: Tensor) -> None:
        self.pooled, self.source = pooled, self._lower(source)
        self.output = self._lower(pooled)

    def push(self, dz: Tensor) -> Tensor:
        maps = self._lift(dz).flatten(-2)
        chosen = maps.gather(-1, self._lift(self.source).flatten(-2))
        return chosen.view(self.output.shape)

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        """J^T J = diag(c), c the number of windows that select an entry: the problem with slopes
        sqrt(c) has the same normal equations."""
        counts, summed = self.pull(torch.ones_like(self.output)), self.pull(displacement)
        if not self.overlapping:
            return Diagonal(self._by_sample(counts), self._by_sample(summed))
        mean, slopes = summed / counts.clamp_min(1.0), counts.sqrt()
        missed = self._by_sample(displacement - self.push(mean))
        return Diagonal(
            self._by_sample(slopes),
            self._by_sample(slopes * mean),
            outside=missed.square().sum(-1),
        )

    def _by_sample(self, value: Tensor) -> Tensor:
        return value.reshape(self.shape[0], -1)


class WindowMaxPool(MaxPoolMap):
    """``nn.MaxPool1d`` and ``nn.MaxPool2d``."""

    def __init__(self, layer: MaxPool, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        kernel = self._pair(layer.kernel_size, 1)
        stride = self._pair(layer.stride, 1)
        padding = self._pair(layer.padding, 0)
        dilation = self._pair(layer.dilation, 1)
        self.options = (kernel, stride, padding, dilation, layer.ceil_mode)
        extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        self.overlapping = any(e > s for e, s in zip(extents, stride, strict=True))
        self._set(*nnf.max_pool2d_with_indices(self.grid, *self.options))

    def _reverse(self, u: Tensor) -> Tensor:
        source = self._lift(self.source)
        pulled: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            u, self.grid, *self.options, source
        )
        return pulled


class AdaptiveMax(MaxPoolMap):
    """``nn.AdaptiveMaxPool1d`` and ``nn.AdaptiveMaxPool2d``."""

    overlapping = True

    def __init__(self, layer: AdaptiveMaxPool, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        size = _adaptive_size(layer, self.grid, self.flat)
        self._set(*nnf.adaptive_max_pool2d_with_indices(self.grid, size))

    def _reverse(self, u: Tensor) -> Tensor:
        source = self._lift(self.source)
        pulled: Tensor = torch.ops.aten.adaptive_max_pool2d_backward(u, self.grid, source)
        return pulled


class AvgPoolMap(PoolMap):
    """A linear layer: J is the Kronecker product of one matrix per axis, alike on all maps."""

    def __init__(self, layer: AvgPool | AdaptiveAvgPool, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        self.layer = layer
        self.output = layer.forward(z)
        self.pooled = self._lift(self.output)

    def push(self, dz: Tensor) -> Tensor:
        return self.layer.forward(dz)

    @cached_property
    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices of height and width, (pooled side, side) each."""

    def input_problem(self, displacement: Tensor) -> LeastSquares | None:
        if max(self.grid.shape[-2:]) > LONGEST_AXIS:
            return None
        maps = self.grid.shape[:-2].numel()
        first, second = self.factors
        return Kronecker(
            first.to(self.grid),
            second.to(self.grid),
            displacement.reshape(maps, -1),
            maps // self.shape[0],
        )


class WindowAvgPool(AvgPoolMap):
    """``nn.AvgPool1d`` and ``nn.AvgPool2d``."""

    def __init__(self, layer: AvgPool, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        self.windows = (
            self._pair(layer.kernel_size, 1),
            self._pair(layer.stride, 1),
            self._pair(layer.padding, 0),
        )
        self.include_pad = layer.count_include_pad
        self.divisor = getattr(layer, "divisor_override", None)
        self.ceil_mode = layer.ceil_mode

    def _reverse(self, u: Tensor) -> Tensor:
        pulled: Tensor = torch.ops.aten.avg_pool2d_backward(
            u, self.grid, *self.windows, self.ceil_mode, self.include_pad, self.divisor
        )
        return pulled

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        first, second = (
            window_matrix(self.grid.shape[i], self.pooled.shape[i], k, s, p, rule)
            for i, k, s, p, rule in zip((-2, -1), *self.windows, self._rules, strict=True)
        )
        return (first, second) if self.divisor is None else (first / self.divisor, second)

    @property
    def _rules(self) -> tuple[str, str]:
        """What an axis divides by: nothing, its window with padding, or without."""
        rule = "sum" if self.divisor is not None else "padded" if self.include_pad else "inside"
        return rule, rule


class AdaptiveAvg(AvgPoolMap):
    """``nn.AdaptiveAvgPool1d`` and ``nn.AdaptiveAvgPool2d``."""

    def _reverse(self, u: Tensor) -> Tensor:
        pulled: Tensor = torch.ops.aten._adaptive_avg_pool2d_backward(u, self.grid)
        return pulled

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        first, second = (
            adaptive_matrix(self.grid.shape[i], self.pooled.shape[i]) for i in (-2, -1)
        )
        return first, second


@lru_cache(maxsize=64)
def window_matrix(
    side: int, pooled: int, kernel: int, stride: int, padding: int, rule: str
) -> Tensor:
    """One axis of average pooling, (pooled, side) in float64, by torch's rules for the divisor.

    >>> window_matrix(3, 2, 2, 2, 1, "inside")
    tensor([[1.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    matrix = torch.zeros(pooled, side, dtype=torch.float64)
    for i in range(pooled):
        start = i * stride - padding
        end = min(start + kernel, side + padding)
        first, last = max(start, 0), min(end, side)
        if first < last:
            divisor = {"sum": 1, "padded": end - start, "inside": last - first}[rule]
            matrix[i, first:last] = 1.0 / divisor
    return matrix


@lru_cache(maxsize=64)
def adaptive_matrix(side: int, pooled: int) -> Tensor:
    """One axis of adaptive average pooling, (pooled, side) in float64.

    >>> adaptive_matrix(3, 2)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    matrix = torch.zeros(pooled, side, dtype=torch.float64)
    for i in range(pooled):
        first, last = i * side // pooled, -(-(i + 1) * side // pooled)
        matrix[i, first:last] = 1.0 / (last - first)
    return matrix


def _adaptive_size(layer: AdaptiveMaxPool, grid: Tensor, flat: bool) -> Pair:
    """The output's sides: one number stands for both axes, ``None`` for the input's own."""
    option = layer.output_size
    sides = option if isinstance(option, (tuple, list)) else (option,) * (1 if flat else 2)
    height, width = (1, sides[0]) if flat else (sides[0], sides[-1])
    return (
        grid.shape[-2] if height is None else height,
        grid.shape[-1] if width is None else width,
    )


def supports_pool(layer: nn.Module) -> bool:
    """All options but ``return_indices``, with which a layer returns two tensors."""
    return not getattr(layer, "return_indices", False)


def pool(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    """The map of a pooling layer at z of shape (m, channels, height, width) or (m, channels,
    length); without channels the maps of a batch are what torch takes for channels.

    Raises:
        ValueError: torch refuses the options on maps of this size; its reason is given.
    """
    try:
        return _pool(layer, z, point)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"block {point.block!r}: {type(layer).__name__} cannot pool an input of shape "
            f"{tuple(z.shape)}: {error}"
        ) from error


def _pool(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    if isinstance(layer, MaxPool):
        return WindowMaxPool(layer, z, point)
    if isinstance(layer, AdaptiveMaxPool):
        return AdaptiveMax(layer, z, point)
    if isinstance(layer, AvgPool):
        return WindowAvgPool(layer, z, point)
    assert isinstance(layer, AdaptiveAvgPool)
    return AdaptiveAvg(layer, z, point)
