"""Linear layers with elementwise modules around them: the scaled-Gram family.

    T(W, z) = post(W pre(z) + b),    slopes D of post at the pre-activation a

Weight problem of output unit j: J_j = diag(D_j) [pre(z) 1] / rows of all samples and positions.
Input problem of sample i:       J_i = diag(D_i) W diag(slopes of pre), per position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..problems import LeastSquares, ScaledGram
from .base import Block, Linearisation, Named
from .elementwise import apply_diagonal
from .inverse import inverted_displacement


class LinearLinearisation(Linearisation):
    """One Linear at one (W, z); everything is stored as (samples * positions, features)."""

    def __init__(
        self,
        block: LinearBlock,
        weight: Tensor,
        z_shape: torch.Size,
        layer_input: Tensor,
        layer_output: Tensor,
        output: Tensor,
        slopes: Tensor | None,
        columns: Tensor | None,
    ) -> None:
        self.block, self.weight, self.z_shape, self.output = block, weight, z_shape, output
        self.samples = z_shape[0]
        self.inputs = layer_input.reshape(-1, layer_input.shape[-1])
        self.pre_activation = layer_output.reshape(-1, layer_output.shape[-1])
        self.positions = self.inputs.shape[0] // self.samples
        self.slopes = None if slopes is None else slopes.reshape(self.pre_activation.shape)
        self.columns = None if columns is None else columns.reshape(self.inputs.shape)

    def weight_problem(self, displacement: Tensor) -> ScaledGram:
        rows = displacement.reshape(self.pre_activation.shape)
        return ScaledGram(
            self._augmented(),
            # Contiguous: every pass over them reads a system's row.
            None if self.slopes is None else self.slopes.t().contiguous(),
            rows.t().contiguous(),
            1.0 / self.samples,
            "unit",
            damping_group=rows.shape[1],
        )

    def _augmented(self) -> Tensor:
        """[z 1], less what is frozen."""
        ones = self.inputs.new_ones(self.inputs.shape[0], 1)
        if not self.block.trains_weight:
            return ones
        return torch.cat([self.inputs, ones], 1) if self.block.trains_bias else self.inputs

    def weight_step(self, step: Tensor) -> Named:
        named: Named = {}
        width = self.inputs.shape[1] if self.block.trains_weight else 0
        if self.block.trains_weight:
            named[self.block.weight_name] = step[:, :width]
        if self.block.trains_bias:
            named[self.block.bias_name] = step[:, width]
        return named

    def input_problem(self, displacement: Tensor) -> ScaledGram:
        return self._input_family(displacement, self.slopes)

    def _input_family(self, displacement: Tensor, slopes: Tensor | None) -> ScaledGram:
        rows = displacement.reshape(self.pre_activation.shape)
        return ScaledGram(
            self.weight,
            slopes,
            rows,
            1.0,
            "sample",
            damping_group=self.positions,
            cut_group=self.positions,
            columns=self.columns,
        )

    def input_step(self, step: Tensor) -> Tensor:
        return step.reshape(self.z_shape)

    def affine_problem(self, displacement: Tensor, clamp: float) -> LeastSquares:
        if self.columns is not None:
            return super().affine_problem(displacement, clamp)
        moved = inverted_displacement(
            self.block.post, self.pre_activation, self.output, displacement, clamp
        )
        if moved is None:
            return super().affine_problem(displacement, clamp)
        return self._input_family(moved, None)


class LinearBlock(Block):
    """``pre`` (diagonal leaves), one ``nn.Linear``, ``post`` (diagonal leaves)."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        pre: Sequence[nn.Module],
        linear: nn.Linear,
        post: Sequence[nn.Module],
    ) -> None:
        super().__init__(name, module)
        self.pre, self.linear, self.post = pre, linear, post
        names = {id(p): key for key, p in self.parameters.items()}
        self.weight_name = names[id(linear.weight)]
        self.bias_name = "" if linear.bias is None else names[id(linear.bias)]
        self.trains_weight = linear.weight.requires_grad
        self.trains_bias = linear.bias is not None and linear.bias.requires_grad

    def _linearise(
        self, z: Tensor, with_input: bool, parameters: Named | None
    ) -> LinearLinearisation:
        layer_input, columns = apply_diagonal(self.pre, z, with_slopes=with_input)
        self._check(layer_input)
        weight: Tensor = self.linear.weight.detach()
        bias: Tensor | None = self.linear.bias
        with torch.no_grad():
            if parameters is not None:
                weight = parameters.get(self.weight_name, weight)
                bias = parameters[self.bias_name] if self.trains_bias else bias
            layer_output = nnf.linear(layer_input, weight, bias)
        output, slopes = apply_diagonal(self.post, layer_output)
        return LinearLinearisation(
            self, weight, z.shape, layer_input, layer_output, output, slopes, columns
        )

    def _check(self, layer_input: Tensor) -> None:
        if layer_input.dtype != self.linear.weight.dtype:
            raise TypeError(
                f"block {self.name!r}: Linear expects an input of dtype "
                f"{self.linear.weight.dtype}, got {layer_input.dtype}"
            )
        features = self.linear.in_features
        if layer_input.dim() < 2 or layer_input.shape[-1] != features:
            raise ValueError(
                f"block {self.name!r}: Linear expects an input of shape (batch, ..., {features}), "
                f"got {tuple(layer_input.shape)}"
            )
        if layer_input.numel() == 0 or self.linear.out_features == 0:
            raise ValueError(
                f"block {self.name!r}: Linear must have inputs and outputs, got "
                f"{tuple(layer_input.shape)} -> {self.linear.out_features}"
            )
