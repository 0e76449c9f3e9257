"""One layer at one point: its output, and the products with its two Jacobians.

Blocks of known layers compose these maps instead of differentiating a graph: no second forward
pass, no double backward, and every layer can offer the closed form of its own problems.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from ...problems import LeastSquares

#: Tensors by the names of ``block.named_parameters()``.
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Point:
    """The parameters at which a block is evaluated.

    Attributes:
        block: the block's name, for messages.
        names: ``id`` of a trainable parameter -> its name in the block.
        values: value of every trainable parameter by name; ``None`` in the one real forward pass,
            which takes the modules' own and moves their buffers.
    """

    block: str
    names: dict[int, str]
    values: Named | None

    @property
    def is_real(self) -> bool:
        """Whether this is the forward pass that moves buffers, once."""
        return self.values is None

    def name(self, parameter: Tensor | None) -> str | None:
        """The parameter's name in the block; ``None`` where it is frozen or absent."""
        return None if parameter is None else self.names.get(id(parameter))

    def value(self, parameter: Tensor | None) -> Tensor | None:
        """The parameter's value here, detached."""
        if parameter is None:
            return None
        name = self.names.get(id(parameter))
        if self.values is None or name is None:
            return parameter.detach()
        return self.values[name]

    def refuse(self, layer: nn.Module, expected: str, z: Tensor) -> ValueError:
        """The error for an input that a layer cannot take."""
        return ValueError(
            f"block {self.block!r}: {type(layer).__name__} expects an input of shape {expected}, "
            f"got {tuple(z.shape)}"
        )


class LayerMap(ABC):
    """A layer T at one (W, z): z of shape (m, ...), output of shape (m, ...).

    Attributes:
        output: T(W, z), detached.
        coupled: whether the output of a sample depends on the input of another one.
        solves_weights: whether :meth:`weight_problem` has more structure than one operator.
        parameters: names (in the block) and shapes of the trainable parameters, in the order in
            which the layer registers them.
    """

    output: Tensor
    coupled: bool = False
    solves_weights: bool = False
    parameters: dict[str, tuple[int, ...]] = {}  # noqa: RUF012 (never written to)

    @abstractmethod
    def push(self, dz: Tensor) -> Tensor:
        """J_z dz: shape of z -> shape of the output."""

    @abstractmethod
    def pull(self, u: Tensor) -> Tensor:
        """J_z^T u: shape of the output -> shape of z."""

    def push_parameters(self, step: Named) -> Tensor:
        """J_W d of a layer with trainable parameters: shape of the output."""
        raise NotImplementedError(f"{type(self).__name__} has no trainable parameters")

    def pull_parameters(self, u: Tensor) -> Named:
        """J_W^T u by name; empty without trainable parameters."""
        return {}

    def input_problem(self, displacement: Tensor) -> LeastSquares | None:
        """The input problem of this layer as a block of its own, where it has a closed form."""
        return None

    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        """The weight problem of this layer as a block of its own, if ``solves_weights``."""
        raise NotImplementedError(f"{type(self).__name__} has no weight problem of its own")

    def weight_step(self, step: Tensor) -> Named:
        """A step (systems, n) of :meth:`weight_problem` by parameter name."""
        raise NotImplementedError(f"{type(self).__name__} has no weight problem of its own")
