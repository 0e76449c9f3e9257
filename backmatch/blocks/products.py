"""J v and J^T u of an autograd graph.

J^T u is a backward pass. J v is the derivative of the linear map u -> J^T u: a backward pass
through the backward pass, on the same graph. Some backward passes cannot be differentiated, a few
of them silently; one check of <u, J v> = <J^T u, v> finds out, and forward mode takes over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Relative mismatch of the two sides beyond which the double backward pass is wrong.
ADJOINT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


class NoPushforwardError(TypeError):
    """A module offers no way to J v: no second derivative of its backward, no forward mode."""


class Products:
    """Products with the Jacobian of ``output`` with respect to some leaves of its graph.

    Args:
        output: with its graph.
        leaves: by name.
        pushforward: J v by forward mode, from one tensor per name.
    """

    def __init__(
        self,
        output: Tensor,
        leaves: dict[str, Tensor],
        pushforward: Callable[[dict[str, Tensor]], Tensor],
    ) -> None:
        self.output, self.pushforward = output, pushforward
        self.names, self.leaves = list(leaves), list(leaves.values())
        self._pullback: _Pullback | None = None
        self._checked = False

    def vjp(self, u: Tensor) -> list[Tensor]:
        """J^T u, one tensor per leaf."""
        if not self.output.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        grads = torch.autograd.grad(
            self.output, self.leaves, u, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(leaf) if grad is None else _dense(grad)
            for leaf, grad in zip(self.leaves, grads, strict=True)
        ]

    def jvp(self, v: list[Tensor]) -> Tensor:
        """J v from one tensor per leaf."""
        if not self.output.requires_grad:
            return torch.zeros_like(self.output)
        if not self._checked:
            self._checked = True
            self._pullback = self._sound_pullback()
        if self._pullback is None:
            return self.pushforward(dict(zip(self.names, v, strict=True)))
        return self._pullback(v)

    def _sound_pullback(self) -> _Pullback | None:
        """The differentiable pullback if it is right, else ``None``."""
        generator = torch.Generator().manual_seed(0)

        def noise(like: Tensor) -> Tensor:
            return torch.randn(
                like.shape, generator=generator, dtype=torch.float64, device="cpu"
            ).to(like)

        u, v = noise(self.output), [noise(leaf) for leaf in self.leaves]
        try:
            pullback = _Pullback(self.output, self.leaves)
            tangent = pullback(v)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # "derivative not implemented", "once_differentiable": each says it in its own words.
            return None
        pulled = self.vjp(u)
        left = (u * tangent).sum()
        right = torch.stack([(p * x).sum() for p, x in zip(pulled, v, strict=True)]).sum()
        sizes = [
            torch.linalg.vector_norm(p) * torch.linalg.vector_norm(x)
            for p, x in zip(pulled, v, strict=True)
        ]
        size = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(tangent) + sum(sizes)
        # Not "<=": infinite slopes give NaN here, and a NonFiniteError of their own later.
        wrong = bool((left - right).abs() > ADJOINT_TOLERANCE[u.dtype] * size)
        return None if wrong else pullback


def _dense(grad: Tensor) -> Tensor:
    """``nn.Embedding(sparse=True)`` returns sparse gradients."""
    return grad.to_dense() if grad.layout != torch.strided else grad


class _Pullback:
    """u -> J^T u as a graph in u; linear, so it is built once, at u = 0."""

    def __init__(self, output: Tensor, leaves: list[Tensor]) -> None:
        self.zero = torch.zeros_like(output)
        with torch.enable_grad():
            self.cotangent = torch.zeros_like(output).requires_grad_()
            grads = torch.autograd.grad(
                output, leaves, self.cotangent, create_graph=True, allow_unused=True
            )
            pulled = [(i, _dense(g)) for i, g in enumerate(grads) if g is not None]
        self.pulled = [(i, g) for i, g in pulled if g.requires_grad]

    def __call__(self, v: list[Tensor]) -> Tensor:
        """J v: the derivative of <J^T u, v> with respect to u."""
        if not self.pulled:
            return self.zero
        (tangent,) = torch.autograd.grad(
            [g for _, g in self.pulled],
            self.cotangent,
            [v[i] for i, _ in self.pulled],
            retain_graph=True,
            allow_unused=True,
        )
        return self.zero if tangent is None else tangent
