"""``nn.BatchNorm1d`` and ``nn.BatchNorm2d``, on batch statistics or on running ones."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...problems import BatchNormInputs, Diagonal, LeastSquares
from .base import LayerMap, Point
from .norm import (
    Gradients,
    NormMap,
    along_channels,
    by_channel,
    has_own_parameters,
    require_dtype,
)

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class BatchNormMap(NormMap):
    """What both kinds share; z of shape (m, C, ...).

    Attributes:
        gain: k = gamma / s, shape (C,).
        mean, rate: the mean and 1 / s, shape (C,).
        variance: the running one; ``None`` on batch statistics.
    """

    gain: Tensor
    mean: Tensor
    rate: Tensor
    variance: Tensor | None = None

    def __init__(self, layer: BatchNorm, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        # The fused kernels are at their best on one layout.
        self.z = z.contiguous()
        self.eps = layer.eps

    def _scaled(self, rate: Tensor) -> Tensor:
        return rate if self.gamma is None else self.gamma * rate

    def _spread(self, parameter: Tensor) -> Tensor:
        return along_channels(parameter, self.z.dim())

    def _by_unit(self, value: Tensor) -> Tensor:
        return by_channel(value)

    def _normalise(self) -> Tensor:
        return (self.z - self._spread(self.mean)).mul_(self._spread(self.rate))

    def _backward(self, u: Tensor, mask: list[bool]) -> Gradients:
        fixed = self.variance is not None
        found: Gradients = torch.ops.aten.native_batch_norm_backward(
            u.contiguous(),
            self.z,
            self.gamma,
            self.mean if fixed else None,
            self.variance,
            None if fixed else self.mean,
            None if fixed else self.rate,
            not fixed,
            self.eps,
            mask,
        )
        return found


class BatchStatistics(BatchNormMap):
    """Normalised by the batch's own mean and variance: J is symmetric and couples the samples."""

    coupled = True

    def __init__(self, layer: BatchNorm, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        output, self.mean, self.rate = torch.native_batch_norm(
            self.z, self.gamma, self.beta, None, None, True, 0.0, layer.eps
        )
        if point.is_real:  # the layer's own forward pass moves its running statistics
            output = layer.forward(z).detach()
        elif output.stride() != z.stride():
            # Dropout behind it draws its mask in the order of memory: the same in every pass.
            output = nnf.batch_norm(z, None, None, self.gamma, self.beta, True, 0.0, layer.eps)
        self.output = output
        self.gain = self._scaled(self.rate)

    def push(self, dz: Tensor) -> Tensor:
        return self.pull(dz)

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        shape = self.z.shape
        return BatchNormInputs(
            lambda step: self.pull(step.reshape(shape)).reshape(1, -1),
            self.xhat.reshape(*shape[:2], -1),
            self.gain,
            self.eps * self.rate.square(),
            displacement.reshape(1, -1),
            "joint" if self.samples > 1 else "sample",
        )


class RunningStatistics(BatchNormMap):
    """Normalised by fixed statistics: one factor per channel."""

    def __init__(self, layer: BatchNorm, z: Tensor, point: Point) -> None:
        super().__init__(layer, z, point)
        mean, variance = layer.running_mean, layer.running_var
        assert mean is not None and variance is not None  # noqa: PT018 (for the type checker)
        self.mean, self.variance = mean.detach(), variance.detach()
        self.output = nnf.batch_norm(
            z, self.mean, self.variance, self.gamma, self.beta, eps=layer.eps
        )
        self.rate = (self.variance + layer.eps).rsqrt()
        self.gain = self._scaled(self.rate)

    def push(self, dz: Tensor) -> Tensor:
        return dz * self._spread(self.gain)

    def pull(self, u: Tensor) -> Tensor:
        return u * self._spread(self.gain)

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        residual = displacement.reshape(self.samples, -1)
        positions = residual.shape[1] // len(self.gain)
        slopes = self.gain.repeat_interleave(positions)
        return Diagonal(slopes.expand_as(residual), residual)


def supports_batch_norm(layer: nn.Module) -> bool:
    """Own parameters, and running statistics both there or both absent."""
    has_mean = getattr(layer, "running_mean", None) is not None
    has_variance = getattr(layer, "running_var", None) is not None
    return has_own_parameters(layer) and has_mean == has_variance


def batch_norm(layer: nn.Module, z: Tensor, point: Point) -> LayerMap:
    """The map of a batch norm at z of shape (m, C), (m, C, L) or (m, C, H, W)."""
    assert isinstance(layer, BatchNorm)
    flat = isinstance(layer, nn.BatchNorm1d)
    channels = layer.num_features
    if z.dim() not in ((2, 3) if flat else (4,)) or z.shape[1] != channels:
        expected = f"(batch, {channels}) or (batch, {channels}, length)"
        raise point.refuse(layer, expected if flat else f"(batch, {channels}, height, width)", z)
    require_dtype(layer, z, point)
    if not (layer.training or layer.running_mean is None):
        return RunningStatistics(layer, z, point)
    if z.numel() <= channels:
        what = f"(batch, {channels}, ...) with more than one value per channel for batch statistics"
        raise point.refuse(layer, what, z)
    return BatchStatistics(layer, z, point)
