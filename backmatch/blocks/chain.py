"""Blocks made of known layers: products by composition, closed forms where a layer has one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..problems import LeastSquares, Operator
from .base import Block, Linearisation, Named
from .convolution import find
from .layers import LayerMap, Point, compose
from .layers.chain import sole


class ChainLinearisation(Linearisation):
    """One evaluation of a chain of known layers."""

    def __init__(self, block: ChainBlock, z: Tensor, layer: LayerMap) -> None:
        self.block, self.shape, self.layer = block, z.shape, layer
        self.output = layer.output
        self.samples = z.shape[0]
        self.sole = sole(layer)
        self.convolution = find(layer, self._label)
        by_channel = self.convolution is not None and self.convolution.solves_weights
        self._by_channel = self.convolution if by_channel else None

    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        if self.sole.solves_weights:
            return self.sole.weight_problem(displacement.reshape(self.sole.output.shape))
        if self._by_channel is not None:
            return self._by_channel.weight_problem(displacement)

        def forward(step: Tensor) -> Tensor:
            return self.layer.push_parameters(self._named(step)).reshape(1, -1)

        def reverse(u: Tensor) -> Tensor:
            pulled = self.layer.pull_parameters(u.reshape(self.output.shape))
            parts = [pulled[name].reshape(-1) for name in self.block.trainable]
            return torch.cat(parts).unsqueeze(0)

        return Operator(
            forward,
            reverse,
            sum(p.numel() for p in self.block.trainable.values()),
            displacement.reshape(1, -1),
            1.0 / self.samples,
            "joint",
            f"the weight problem of {self._label}",
        )

    def weight_step(self, step: Tensor) -> Named:
        if self._by_channel is not None:
            return self._by_channel.weight_step(step)
        return self.sole.weight_step(step) if self.sole.solves_weights else self._named(step)

    def _named(self, step: Tensor) -> Named:
        """One joint step by parameter name, in the order of ``block.trainable``."""
        trainable = self.block.trainable
        parts = torch.split(step[0], [p.numel() for p in trainable.values()])
        return {k: d.view(p.shape) for (k, p), d in zip(trainable.items(), parts, strict=True)}

    def input_problem(self, displacement: Tensor) -> LeastSquares:
        known = self.sole.input_problem(displacement.reshape(self.sole.output.shape))
        if known is None and self.convolution is not None:
            known = self.convolution.input_problem(displacement)
        if known is not None:
            return known
        systems = 1 if self.layer.coupled else self.samples

        def forward(step: Tensor) -> Tensor:
            return self.layer.push(step.reshape(self.shape)).reshape(systems, -1)

        def reverse(u: Tensor) -> Tensor:
            return self.layer.pull(u.reshape(self.output.shape)).reshape(systems, -1)

        return Operator(
            forward,
            reverse,
            self.shape.numel() // systems,
            displacement.reshape(systems, -1),
            1.0,
            "joint" if self.layer.coupled and self.samples > 1 else "sample",
            f"the input problem of {self._label}",
            known_traces=None if self.convolution is None else self.convolution.joint_trace(),
        )

    def affine_problem(self, displacement: Tensor, clamp: float) -> LeastSquares:
        known = None
        if self.convolution is not None:
            known = self.convolution.affine_problem(displacement, clamp, self.block.leaves)
        return super().affine_problem(displacement, clamp) if known is None else known

    def input_step(self, step: Tensor) -> Tensor:
        return step.reshape(self.shape)

    @property
    def _label(self) -> str:
        return f"block {self.block.name!r} ({type(self.block.module).__name__})"


class ChainBlock(Block):
    """Known layers, one after the other."""

    def __init__(self, name: str, module: nn.Module, leaves: Sequence[nn.Module]) -> None:
        super().__init__(name, module)
        self.leaves = leaves
        self.names = {id(p): key for key, p in self.trainable.items()}

    def _linearise(self, z: Tensor, with_input: bool, parameters: Named | None) -> Linearisation:
        with torch.no_grad():
            layer = compose(self.leaves, z.detach(), Point(self.name, self.names, parameters))
        return ChainLinearisation(self, z, layer)
