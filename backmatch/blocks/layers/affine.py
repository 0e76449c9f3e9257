"""Linear layers and convolutions: out = W * z + b."""

from __future__ import annotations

from abc import abstractmethod

import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from ...problems import Patches
from .base import LayerMap, Named, Point

Pair = tuple[int, int]


class AffineMap(LayerMap):
    """What Linear and Conv2d share.

    Attributes:
        weight: the weight at this point.
        weight_name, bias_name: names of the trainable ones in the block, else ``None``.
        patches: the rows that all output units share, as :class:`Patches`.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, point: Point) -> None:
        self.weight_name, self.bias_name = point.name(layer.weight), point.name(layer.bias)
        weight, self.bias = point.value(layer.weight), point.value(layer.bias)
        assert weight is not None
        self.weight = weight
        self.parameters = {}
        for name, value in ((self.weight_name, weight), (self.bias_name, self.bias)):
            if name is not None and value is not None:
                self.parameters[name] = tuple(value.shape)

    #: Whether zeros stand around the input.
    padded = False

    @property
    @abstractmethod
    def patches(self) -> Patches:
        """The shared rows."""

    def weight_step_of(self, kernel: Tensor, bias: Tensor | None) -> Named:
        """Steps (units, K) and (units,) by parameter name."""
        named: Named = {}
        if self.weight_name is not None:
            named[self.weight_name] = kernel.reshape(self.weight.shape)
        if self.bias_name is not None:
            assert bias is not None
            named[self.bias_name] = bias
        return named


class LinearMap(AffineMap):
    """``nn.Linear`` on (m, ..., features)."""

    def __init__(self, layer: nn.Linear, z: Tensor, point: Point) -> None:
        super().__init__(layer, point)
        if z.dim() < 2 or z.shape[-1] != layer.in_features:
            raise point.refuse(layer, f"(batch, ..., {layer.in_features})", z)
        self.z = z
        self.output = nnf.linear(z, self.weight, self.bias)

    @property
    def patches(self) -> Patches:
        """Of inputs (m, features) only: a kernel of one entry on a map of one position."""
        return Patches(self.z[:, :, None, None], self.weight.shape[0], (1, 1))

    def push(self, dz: Tensor) -> Tensor:
        return dz @ self.weight.t()

    def pull(self, u: Tensor) -> Tensor:
        return u @ self.weight

    def push_parameters(self, step: Named) -> Tensor:
        out = step.get(self.bias_name) if self.bias_name is not None else None
        if self.weight_name is not None:
            return nnf.linear(self.z, step[self.weight_name], out)
        assert out is not None
        return out.expand(self.output.shape)

    def pull_parameters(self, u: Tensor) -> Named:
        rows = u.reshape(-1, u.shape[-1])
        kernel, bias = self.weight, None
        if self.weight_name is not None:
            kernel = rows.t() @ self.z.reshape(-1, self.z.shape[-1])
        if self.bias_name is not None:
            bias = rows.sum(0)
        return self.weight_step_of(kernel, bias)


class ConvMap(AffineMap):
    """``nn.Conv2d`` with zero padding, on (m, channels, height, width)."""

    def __init__(self, layer: nn.Conv2d, z: Tensor, point: Point) -> None:
        super().__init__(layer, point)
        self._check(layer, z, point)
        self.shape, self.kernel = z.shape, _pair(layer.kernel_size)
        self.stride, self.dilation = _pair(layer.stride), _pair(layer.dilation)
        self.groups = layer.groups
        self.padding, self.extra = _padding(layer, self.kernel, self.dilation)
        self.padded = any((*self.padding, *self.extra))
        self.x = self._padded(z)
        self.output = self._conv(self.x, self.weight, self.bias)

    def _check(self, layer: nn.Conv2d, z: Tensor, point: Point) -> None:
        expected = f"(batch, {layer.in_channels}, height, width)"
        if z.dim() != 4 or z.shape[1] != layer.in_channels:
            raise point.refuse(layer, expected, z)
        if z.dtype != layer.weight.dtype:
            raise TypeError(
                f"block {point.block!r}: Conv2d expects an input of dtype {layer.weight.dtype}, "
                f"got {z.dtype}"
            )
        (top, left), below = _padding(layer, _pair(layer.kernel_size), _pair(layer.dilation))
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sizes = (z.shape[2] + 2 * top + below[0], z.shape[3] + 2 * left + below[1])
        if z.numel() == 0 or sizes[0] < reach[0] or sizes[1] < reach[1]:
            at_least = f"height >= {reach[0] - 2 * top}, width >= {reach[1] - 2 * left}"
            raise point.refuse(layer, f"(batch, {layer.in_channels}, {at_least})", z)

    @property
    def patches(self) -> Patches:
        units, options = self.weight.shape[0], (self.stride, self.padding, self.dilation)
        return Patches(self.x, units, self.kernel, *options, self.groups)

    def push(self, dz: Tensor) -> Tensor:
        return self._conv(self._padded(dz), self.weight, None)

    def pull(self, u: Tensor) -> Tensor:
        return self.pull_with(u, self.weight)

    def pull_with(self, u: Tensor, weight: Tensor) -> Tensor:
        """The adjoint of the convolution with another kernel of the same shape."""
        shape = (u.shape[0], *self.x.shape[1:])
        options = (self.stride, self.padding, self.dilation, self.groups)
        dx: Tensor = conv2d_input(shape, weight, u, *options)  # type: ignore[no-untyped-call]
        return dx[:, :, : self.shape[2], : self.shape[3]] if any(self.extra) else dx

    def push_with(self, z: Tensor, weight: Tensor) -> Tensor:
        """The convolution with another kernel of the same shape, no bias."""
        return self._conv(self._padded(z), weight, None)

    def push_parameters(self, step: Named) -> Tensor:
        bias = step[self.bias_name] if self.bias_name is not None else None
        if self.weight_name is not None:
            return self._conv(self.x, step[self.weight_name], bias)
        assert bias is not None
        return bias.view(1, -1, 1, 1).expand(self.output.shape)

    def pull_parameters(self, u: Tensor) -> Named:
        kernel = self.patches.adjoint(u) if self.weight_name is not None else self.weight
        bias = u.sum((0, 2, 3)) if self.bias_name is not None else None
        return self.weight_step_of(kernel, bias)

    def _padded(self, z: Tensor) -> Tensor:
        return nnf.pad(z, (0, self.extra[1], 0, self.extra[0])) if any(self.extra) else z

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nnf.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def supports_conv(layer: nn.Module) -> bool:
    """Zero padding and a weight that is a parameter of the layer."""
    assert isinstance(layer, nn.Conv2d)
    return layer.padding_mode == "zeros" and layer._parameters.get("weight") is not None


def supports_linear(layer: nn.Module) -> bool:
    """A weight that is a parameter of the layer; some inputs and outputs."""
    assert isinstance(layer, nn.Linear)
    return layer._parameters.get("weight") is not None and layer.weight.numel() > 0


def linear(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    """The map of an ``nn.Linear``."""
    assert isinstance(layer, nn.Linear)
    return LinearMap(layer, z, point)


def conv2d(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    """The map of an ``nn.Conv2d``."""
    assert isinstance(layer, nn.Conv2d)
    return ConvMap(layer, z, point)


def _pair(value: tuple[int, ...]) -> Pair:
    first, second = value
    return first, second


def _padding(layer: nn.Conv2d, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Padding on both sides, and what ``"same"`` adds below and to the right (even kernels)."""
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    if layer.padding == "same":
        high, wide = (d * (k - 1) for k, d in zip(kernel, dilation, strict=True))
        return (high // 2, wide // 2), (high % 2, wide % 2)
    assert not isinstance(layer.padding, str)
    return _pair(layer.padding), (0, 0)
