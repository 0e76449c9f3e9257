"""``nn.LayerNorm`` and ``nn.GroupNorm``: every group of entries normalised by itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...problems import LayerNormInputs, LeastSquares
from .base import LayerMap, Point
from .norm import (
    Gradients,
    NormMap,
    along_channels,
    by_channel,
    has_own_parameters,
    require_dtype,
)


class LayerNormMap(NormMap):
    """z of shape (m, ..., *shape), normalised over ``shape``."""

    def __init__(self, layer: nn.LayerNorm, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        self.shape, self.eps = list(layer.normalized_shape), layer.eps
        self.z = z.contiguous()
        self.output, self.mean, self.rate = torch.native_layer_norm(
            self.z, self.shape, self.gamma, self.beta, layer.eps
        )
        self.coupled = z.dim() == len(self.shape)

    def push(self, dz: Tensor) -> Tensor:
        pushed = self._standardise(dz, None, [True, False, False])[0]
        return pushed if self.gamma is None else pushed.mul_(self.gamma)

    def _backward(self, u: Tensor, mask: list[bool]) -> Gradients:
        return self._standardise(u, self.gamma, mask)

    def _standardise(self, u: Tensor, gamma: Tensor | None, mask: list[bool]) -> Gradients:
        """Without gamma the fused backward pass is 1/s times the symmetric projection."""
        found: Gradients = torch.ops.aten.native_layer_norm_backward(
            u.contiguous(),
            self.z,
            self.shape,
            self.mean,
            self.rate,
            gamma,
            None if gamma is None else gamma,
            mask,
        )
        return found

    def _normalise(self) -> Tensor:
        return (self.z - self.mean).mul_(self.rate)

    def _spread(self, parameter: Tensor) -> Tensor:
        return parameter

    def _by_unit(self, value: Tensor) -> Tensor:
        return value.reshape(-1, math.prod(self.shape)).t()

    def input_problem(self, displacement: Tensor) -> LeastSquares | None:
        if self.coupled:
            return None
        normed = self.xhat.reshape(-1, math.prod(self.shape))
        slopes = self.rate.reshape(-1, 1)
        groups = normed.shape[0] // self.samples
        return LayerNormInputs(
            normed,
            slopes if self.gamma is None else slopes * self.gamma.reshape(1, -1),
            self.eps * self.rate.reshape(-1).square(),
            displacement.reshape(normed.shape),
            self.label,
            damping_group=groups,
            cut_group=groups,
        )


class GroupNormMap(NormMap):
    """z of shape (m, C, ...), normalised over ``groups`` runs of channels and all positions."""

    def __init__(self, layer: nn.GroupNorm, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        self.groups, self.eps = layer.num_groups, layer.eps
        self.z = z.contiguous()
        self.size = (z.shape[0], z.shape[1], math.prod(z.shape[2:]))
        self.output, self.mean, self.rate = torch.native_group_norm(
            self.z, self.gamma, self.beta, *self.size, self.groups, layer.eps
        )
        if self.z is not z:  # dropout behind it draws its mask in the order of memory
            self.output = nnf.group_norm(z, self.groups, self.gamma, self.beta, layer.eps)

    def push(self, dz: Tensor) -> Tensor:
        pushed = self._standardise(dz, None, [True, False, False])[0]
        return pushed if self.gamma is None else pushed.mul_(self._spread(self.gamma))

    def _backward(self, u: Tensor, mask: list[bool]) -> Gradients:
        return self._standardise(u, self.gamma, mask)

    def _standardise(self, u: Tensor, gamma: Tensor | None, mask: list[bool]) -> Gradients:
        found: Gradients = torch.ops.aten.native_group_norm_backward(
            u.contiguous(),
            self.z,
            self.mean,
            self.rate,
            gamma,
            *self.size,
            self.groups,
            mask,
        )
        return found

    def _normalise(self) -> Tensor:
        grouped = self.z.reshape(*self.mean.shape, -1) - self.mean.unsqueeze(-1)
        return grouped.mul_(self.rate.unsqueeze(-1)).reshape(self.z.shape)

    def _spread(self, parameter: Tensor) -> Tensor:
        return along_channels(parameter, self.z.dim())

    def _by_unit(self, value: Tensor) -> Tensor:
        return by_channel(value)

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        normed = self.xhat.reshape(self.mean.numel(), -1)
        return LayerNormInputs(
            normed,
            self._slopes(),
            self.eps * self.rate.reshape(-1).square(),
            displacement.reshape(normed.shape),
            self.label,
            damping_group=self.groups,
            cut_group=self.groups,
        )

    def _slopes(self) -> Tensor:
        """gamma / s of every entry, (m * groups, entries); one column where it is one number."""
        slopes = self.rate.unsqueeze(-1)
        if self.gamma is not None:
            slopes = slopes * self.gamma.view(self.groups, -1)
        if slopes.shape[-1] > 1:
            slopes = slopes.repeat_interleave(self.size[2], -1)
        return slopes.reshape(self.mean.numel(), -1)


def supports_norm(layer: nn.Module) -> bool:
    """Own parameters."""
    return has_own_parameters(layer)


def layer_norm(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    """The map of a layer norm at z of shape (m, ..., *normalized_shape)."""
    assert isinstance(layer, nn.LayerNorm)
    shape = tuple(layer.normalized_shape)
    if tuple(z.shape[-len(shape) :]) != shape:
        raise point.refuse(layer, f"(batch, ..., {', '.join(map(str, shape))})", z)
    require_dtype(layer, z, point)
    return LayerNormMap(layer, z, point)


def group_norm(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    """The map of a group norm at z of shape (m, C, ...)."""
    assert isinstance(layer, nn.GroupNorm)
    channels = layer.num_channels
    if z.dim() < 2 or z.shape[1] != channels:
        raise point.refuse(layer, f"(batch, {channels}, ...)", z)
    if z.numel() <= layer.num_groups:
        what = f"(batch, {channels}, ...) with more than one value per group"
        raise point.refuse(layer, what, z)
    require_dtype(layer, z, point)
    return GroupNormMap(layer, z, point)
