"""The residual module whose structure a sweep knows."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """``activation(body(z) + shortcut(z))``.

    As a block of its own, or a leaf of one, its two problems are posed from the products of its
    parts' Jacobians; a residual module written by hand gives the same steps by differentiating
    a graph, which is slower.

    Args:
        body: z of shape (m, ...) -> shape of the output. What in it works in place
            (``inplace=True``) gets a copy of z, so that the shortcut sees z as it was.
        shortcut: z -> shape of the output; ``None`` is the identity. A copy of z likewise.
        activation: applied to the sum; ``None`` for none.

    Shapes:
        input (m, ...), output that of ``body``; dimension 0 is the sample.

    Raises:
        TypeError: a part is no ``nn.Module``.
        ValueError: when called, if body and shortcut give different shapes.

    >>> import torch
    >>> body = nn.Linear(3, 3)
    >>> z = torch.ones(2, 3)
    >>> bool((Residual(body, activation=nn.ReLU())(z) == torch.relu(body(z) + z)).all())
    True
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("body", body), ("shortcut", shortcut), ("activation", activation)):
            if not isinstance(part, nn.Module) and (part is not None or name == "body"):
                expected = "an nn.Module" + (" or None" if name != "body" else "")
                raise TypeError(f"Residual {name} must be {expected}, got {type(part).__name__}")
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, z: Tensor) -> Tensor:
        out = self.body(_protected(self.body, z))
        skip = z if self.shortcut is None else self.shortcut(_protected(self.shortcut, z))
        total = added(out, skip)
        return total if self.activation is None else self.activation(total)


def added(out: Tensor, skip: Tensor) -> Tensor:
    """The sum of the two branches, never broadcast."""
    if out.shape != skip.shape:
        raise ValueError(
            f"Residual: body and shortcut must give the same shape, got {tuple(out.shape)} from "
            f"the body and {tuple(skip.shape)} from the shortcut; give a shortcut that projects"
        )
    return out + skip


def _protected(part: nn.Module, z: Tensor) -> Tensor:
    in_place = any(getattr(child, "inplace", False) for child in part.modules())
    return z.clone() if in_place else z
