"""A block as the sweep sees it, and its linearisation at one point (W, z)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..problems import LeastSquares
from .replay import Replay

#: Steps or parameters of a block, by the names of ``block.named_parameters()``.
Named = dict[str, Tensor]


class Linearisation(ABC):
    """T and its derivatives at one (W, z).

    Attributes:
        output: T(W, z), detached.
    """

    output: Tensor

    @abstractmethod
    def weight_problem(self, displacement: Tensor) -> LeastSquares:
        """The weight problem for a target displacement of the output's shape."""

    @abstractmethod
    def weight_step(self, step: Tensor) -> Named:
        """(systems, n) -> one tensor per trainable parameter."""

    @abstractmethod
    def input_problem(self, displacement: Tensor) -> LeastSquares:
        """The input problem for a target displacement of the output's shape."""

    @abstractmethod
    def input_step(self, step: Tensor) -> Tensor:
        """(systems, n) -> shape of z."""

    def affine_problem(self, displacement: Tensor, clamp: float) -> LeastSquares:
        """The affine part's input problem once the activation is inverted."""
        raise ValueError(
            "LayerInverse needs a block of one Linear or Conv2d and at most one LeakyReLU, Tanh, "
            "Sigmoid, Softplus or ELU; use Auto(damping) for this block"
        )


class Block(ABC):
    """A module of the chain with the state of the sweep under way.

    Attributes:
        name: as in the reports.
        module: the user's module.
        parameters: all its parameters, by name.
        trainable: those that require grad.
    """

    #: Whether a linearisation may have to evaluate the block again.
    always_replayable = False

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.parameters = dict(module.named_parameters())
        self.trainable = {key: p for key, p in self.parameters.items() if p.requires_grad}
        self.replay: Replay | None = None

    def forward(self, z: Tensor, *, with_input: bool, replayable: bool) -> Linearisation:
        """The one real forward pass: moves buffers and RNG, fires the user's hooks."""
        if replayable or self.always_replayable:
            self.replay = Replay.before(self.module, z.device)
        with torch.enable_grad():
            return self._linearise(z, with_input, None)

    def evaluate(self, z: Tensor, parameters: Named, *, with_input: bool) -> Linearisation:
        """T at other parameters or inputs, as if in place of the forward pass: same dropout
        masks, buffers and RNG left as they are, no user hook fired."""
        assert self.replay is not None, "forward() was not asked to be replayable"
        with torch.enable_grad(), self.replay.again():
            return self._linearise(z, with_input, parameters)

    def parameters_plus(self, step: Named | None) -> Named:
        """Trainable parameters, detached, moved by ``step``."""
        if not step:
            return {name: p.detach() for name, p in self.trainable.items()}
        return {name: p.detach() + step[name] for name, p in self.trainable.items()}

    @abstractmethod
    def _linearise(self, z: Tensor, with_input: bool, parameters: Named | None) -> Linearisation:
        """Evaluate and differentiate; ``parameters`` is ``None`` in the one real forward pass."""
