"""Convolutions (or a Linear before a batch norm) among layers that leave their structure intact.

    before (no parameters)  ->  Conv2d or Linear  ->  [batch norm]  ->  elementwise, max pooling

Weights: one system per output channel over shared patches (:class:`PatchFamily`). Inputs of a
convolution among elementwise modules: one operator for all samples (:class:`SharedOperator`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..problems import LeastSquares, Normed, PatchFamily, SharedOperator, averaged, normed_trace
from ..problems.dense import DENSE_ENTRIES
from .base import Named
from .elementwise import is_diagonal
from .inverse import inverted_displacement
from .layers import LayerMap
from .layers.affine import AffineMap, ConvMap, LinearMap
from .layers.batch_norm import BatchNormMap
from .layers.chain import ChainMap
from .layers.diagonal import DiagonalMap
from .layers.pool import AvgPoolMap
from .layers.selection import Selection, selects

#: Windows of an average pooling up to which the weights before it are solved per channel.
MOST_WINDOWS = 64


@dataclass(frozen=True)
class Convolution:
    """The parts of a block that fits the pattern, at one point.

    Attributes:
        before: maps without parameters in front of the layer.
        layer: the convolution or Linear.
        norm: the batch norm right behind it.
        after: the selection behind both.
        average: an average pooling behind that, if there is one.
        output: of the whole block.
        label: the block, for messages.
    """

    before: list[LayerMap]
    layer: AffineMap
    norm: BatchNormMap | None
    after: Selection
    average: AvgPoolMap | None
    output: Tensor
    label: str

    @property
    def solves_weights(self) -> bool:
        """Whether weights fall apart into channels, and Jacobians behind an average fit."""
        if self.layer.weight_name is None or self.average is None:
            return self.layer.weight_name is not None
        # At most the kernel, a bias, gamma and beta.
        unknowns = self.layer.patches.width + 3
        fits = self.average.output.numel() * unknowns <= DENSE_ENTRIES
        # A dense average over many windows costs more than conjugate gradient.
        return fits and self.average.output.shape[2:].numel() <= MOST_WINDOWS

    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        """Systems in the order of the output channels."""
        if self.average is None:
            residual = self.after.pull(displacement)
            outside = self.after.outside(displacement, residual, (0, 2, 3))
            return self._family(self.layer.patches.to_rows(residual), outside)
        residual = displacement.reshape(*self.average.output.shape[:2], -1)
        first, second = (factor.to(residual) for factor in self.average.factors)
        bare = self._family(residual.new_empty(0), None)
        return averaged(bare, torch.kron(first, second), residual)

    def _family(self, rows: Tensor, outside: Tensor | None) -> PatchFamily:
        patches = self.layer.patches
        if self.norm is not None and self.norm.coupled and not self.layer.padded:
            patches = patches.shifted()
        joint = self.norm is not None or self.after.selects
        return PatchFamily(
            patches,
            self.layer.bias_name is not None,
            self.after.slopes,
            rows,
            1.0 / patches.x.shape[0],
            "joint" if joint else "unit",
            damping_group=patches.units,
            cut_group=patches.units if joint else 1,
            normed=None if self.norm is None else _normed(self.layer, self.norm),
            outside=outside,
            label=f"the weight problem of {self.label}",
        )

    def weight_step(self, step: Tensor) -> Named:
        """(units, n) by parameter name: kernel, bias, gamma, beta where trainable."""
        width = self.layer.patches.width
        rest = list(step[:, width:].unbind(1))
        bias = rest.pop(0) if self.layer.bias_name is not None else None
        named = self.layer.weight_step_of(step[:, :width], bias)
        if self.norm is not None:
            for name in (self.norm.gamma_name, self.norm.beta_name):
                if name is not None:
                    named[name] = rest.pop(0)
        return named

    def input_problem(self, displacement: Tensor) -> SharedOperator | None:
        """One system per sample; ``None`` where something else than slopes is around the layer."""
        layer = self.layer
        if not isinstance(layer, ConvMap) or len(self.before) > 1 or self.average is not None:
            return None
        if self.before and not isinstance(self.before[0], DiagonalMap):
            return None
        after = self.after
        if self.norm is not None:
            if self.norm.coupled:
                return None
            after = Selection([self.norm, *after.maps], after.shape)
        residual = after.pull(displacement)
        outside = after.outside(displacement, residual, (1, 2, 3))
        label = f"the input problem of {self.label}"
        return shared_operator(layer, self.before, residual, after.slopes, outside, label)

    def joint_trace(self) -> Callable[[], Tensor] | None:
        """The trace of the input problem of all samples; ``None`` where it must be estimated."""
        norm, layer = self.norm, self.layer
        if norm is None or not norm.coupled or self.before or self.average is not None:
            return None

        def trace() -> Tensor:
            patches = layer.patches
            weight = layer.weight.reshape(patches.units, -1, *patches.kernel)
            sides = (layer.shape[2], layer.shape[3]) if isinstance(layer, ConvMap) else (1, 1)
            xhat = norm.xhat.reshape(norm.xhat.shape[0], patches.units, *patches.map)
            found = normed_trace(patches, weight, sides, xhat, norm.gain, self.after.slopes)
            return found.reshape(1)

        return trace

    def affine_problem(
        self, displacement: Tensor, clamp: float, leaves: Sequence[nn.Module]
    ) -> SharedOperator | None:
        """The convolution's input problem once the activation behind it is inverted."""
        layer = self.layer
        if not isinstance(layer, ConvMap) or self.norm is not None or self.before:
            return None
        post = leaves[[isinstance(leaf, nn.Conv2d) for leaf in leaves].index(True) + 1 :]
        if not all(is_diagonal(leaf) for leaf in post):
            return None
        moved = inverted_displacement(post, layer.output, self.output, displacement, clamp)
        label = f"the input problem of {self.label}"
        return None if moved is None else shared_operator(layer, [], moved, None, None, label)


def shared_operator(
    layer: ConvMap,
    before: list[LayerMap],
    residual: Tensor,
    slopes: Tensor | None,
    outside: Tensor | None,
    label: str,
) -> SharedOperator:
    """diag(slopes) conv diag(slopes of ``before``), per sample."""
    columns = before[0].slopes if before and isinstance(before[0], DiagonalMap) else None
    m = residual.shape[0]
    square = layer.weight.square()

    def forward(v: Tensor) -> Tensor:
        return layer.push(v.view(-1, *layer.shape[1:])).flatten(1)

    def reverse(u: Tensor) -> Tensor:
        return layer.pull(u.view(-1, *residual.shape[1:])).flatten(1)

    def squared(v: Tensor) -> Tensor:
        return layer.push_with(v.view(-1, *layer.shape[1:]), square).flatten(1)

    def squared_reverse(u: Tensor) -> Tensor:
        return layer.pull_with(u.view(-1, *residual.shape[1:]), square).flatten(1)

    return SharedOperator(
        forward,
        reverse,
        squared,
        squared_reverse,
        layer.shape[1:].numel(),
        2.0 * residual[0].numel() * layer.weight[0].numel(),
        residual.flatten(1),
        None if slopes is None else slopes.flatten(1),
        None if columns is None else columns.reshape(m, -1),
        label,
        outside=outside,
    )


def find(layer: LayerMap, label: str) -> Convolution | None:
    """The pattern in a block's map; ``None`` where it does not fit."""
    maps = layer.maps if isinstance(layer, ChainMap) else [layer]
    places = [i for i, part in enumerate(maps) if isinstance(part, AffineMap)]
    if len(places) != 1:
        return None
    at = places[0]
    before, affine, after = maps[:at], maps[at], maps[at + 1 :]
    assert isinstance(affine, AffineMap)
    if any(part.parameters for part in before):
        return None
    if isinstance(affine, LinearMap) and affine.z.dim() != 2:
        return None
    norm = None
    if after and isinstance(after[0], BatchNormMap):
        norm, after = after[0], after[1:]
    after, average = _split(after)
    if not selects(after, affine.output):
        return None
    patches = affine.patches
    shape = torch.Size((affine.output.shape[0], patches.units, *patches.map))
    selection = Selection(after, shape)
    if average is not None and (selection.selects or average.shape != shape):
        return None
    return Convolution(before, affine, norm, selection, average, layer.output, label)


def _split(after: list[LayerMap]) -> tuple[list[LayerMap], AvgPoolMap | None]:
    """What stands before an average pooling at the end (reshapes aside), and that pooling."""
    kept = list(after)
    while kept and isinstance(kept[-1], DiagonalMap) and kept[-1].slopes is None:
        kept.pop()
    if kept and isinstance(kept[-1], AvgPoolMap):
        return kept[:-1], kept[-1]
    return after, None


def _normed(layer: AffineMap, norm: BatchNormMap) -> Normed:
    shape = (norm.xhat.shape[0], layer.patches.units, *layer.patches.map)

    def push(t: Tensor) -> Tensor:
        return norm.push(t.reshape(norm.xhat.shape)).reshape(shape)

    gamma, beta = (name is not None for name in (norm.gamma_name, norm.beta_name))
    return Normed(norm.xhat.reshape(shape), norm.gain, norm.coupled, gamma, beta, push)
