"""What the normalisations share: gamma x + beta after x = (z - mean) / s, and its parameters."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor, nn

from ...problems import LeastSquares, ScaleShift
from .base import LayerMap, Named, Point

#: Gradients of z, gamma and beta as torch's fused backward passes give them.
Gradients = tuple[Tensor, Tensor, Tensor]


class NormMap(LayerMap):
    """A normalisation at one point.

    Attributes:
        gamma, beta: their values, ``None`` without.
        gamma_name, beta_name: names of the trainable ones in the block, else ``None``.
    """

    def __init__(self, layer: nn.Module, z: Tensor, point: Point) -> None:
        gamma, beta = _parameter(layer, "weight"), _parameter(layer, "bias")
        self.z, self.samples = z, z.shape[0]
        self.gamma, self.beta = point.value(gamma), point.value(beta)
        self.gamma_name, self.beta_name = point.name(gamma), point.name(beta)
        named = ((self.gamma_name, gamma), (self.beta_name, beta))
        self.parameters = {k: tuple(p.shape) for k, p in named if k is not None and p is not None}
        self.solves_weights = bool(self.parameters)
        self.label = f"the input problem of block {point.block!r} ({type(layer).__name__})"

    @abstractmethod
    def _backward(self, u: Tensor, mask: list[bool]) -> Gradients:
        """J_z^T u and J_W^T u, where ``mask`` asks for them."""

    @abstractmethod
    def _normalise(self) -> Tensor:
        """x, shape of z."""

    @abstractmethod
    def _spread(self, parameter: Tensor) -> Tensor:
        """A view of a parameter that broadcasts against z."""

    @abstractmethod
    def _by_unit(self, value: Tensor) -> Tensor:
        """Shape of z -> (units, rows), one unit for every entry of gamma."""

    @cached_property
    def xhat(self) -> Tensor:
        """x, shape of z."""
        return self._normalise()

    def pull(self, u: Tensor) -> Tensor:
        return self._backward(u, [True, False, False])[0]

    def push_parameters(self, step: Named) -> Tensor:
        if self.gamma_name is None:
            assert self.beta_name is not None
            return self._spread(step[self.beta_name]).expand(self.z.shape)
        gamma = self._spread(step[self.gamma_name])
        if self.beta_name is None:
            return self.xhat * gamma
        return torch.addcmul(self._spread(step[self.beta_name]), self.xhat, gamma)

    def pull_parameters(self, u: Tensor) -> Named:
        if not self.parameters:
            return {}
        mask = [False, self.gamma_name is not None, self.beta_name is not None]
        _, gamma, beta = self._backward(u, mask)
        pulled = {self.gamma_name: gamma, self.beta_name: beta}
        shapes = self.parameters
        return {k: g.reshape(shapes[k]) for k, g in pulled.items() if k is not None}

    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        return ScaleShift(
            self._by_unit(self.xhat),
            self._by_unit(displacement),
            1.0 / self.samples,
            scales=self.gamma_name is not None,
            shifts=self.beta_name is not None,
        )

    def weight_step(self, step: Tensor) -> Named:
        columns = zip(self.parameters.items(), step.unbind(1), strict=True)
        return {name: column.reshape(shape) for (name, shape), column in columns}


def has_own_parameters(layer: nn.Module) -> bool:
    """Whether gamma and beta are parameters or absent: a pruned one is neither."""
    values = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return all(value is None or isinstance(value, nn.Parameter) for value in values)


def require_dtype(layer: nn.Module, z: Tensor, point: Point) -> None:
    """Refuse an input whose dtype is not that of the layer, or no floating one."""
    tensors = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
    expected = tensors[0].dtype if tensors else None
    if z.dtype != expected and (expected is not None or not z.is_floating_point()):
        raise TypeError(
            f"block {point.block!r}: {type(layer).__name__} expects an input of dtype "
            f"{expected or 'float32 or float64'}, got {z.dtype}"
        )


def by_channel(value: Tensor) -> Tensor:
    """(m, C, ...) -> (C, m * positions)."""
    return value.transpose(0, 1).reshape(value.shape[1], -1)


def along_channels(parameter: Tensor, dims: int) -> Tensor:
    """(C,) -> a view that broadcasts against (m, C, ...) of ``dims`` dimensions."""
    return parameter.view(-1, *[1] * (dims - 2))


def _parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    value = getattr(layer, name, None)
    return value if isinstance(value, nn.Parameter) else None
