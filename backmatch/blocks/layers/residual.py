"""Two branches added, as one map: J = J_activation (J_body + J_shortcut)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..leaves import is_plain, leaves_of
from ..residual import Residual, added
from .base import LayerMap, Named, Point

#: Leaves, input and point -> the map of the leaves one after the other.
Compose = Callable[[Sequence[nn.Module], Tensor, Point], LayerMap]


def is_transparent(module: nn.Module, is_known: Callable[[nn.Module], bool]) -> bool:
    """Whether a Residual is made of known plain leaves, each with parameters of its own."""
    assert isinstance(module, Residual)
    leaves: list[nn.Module] = []
    for part in (module.body, module.shortcut, module.activation):
        inner = [] if part is None else leaves_of(part)
        if inner is None or (part is not None and not inner):
            return False
        leaves += inner
    if not all(is_plain(leaf) and is_known(leaf) for leaf in leaves):
        return False
    owned = [id(p) for leaf in leaves for p in leaf.parameters()]
    # A parameter of the Residual itself stands in no leaf.
    return sorted(owned) == sorted(id(p) for p in module.parameters())


class ResidualMap(LayerMap):
    """A Residual at one point, its parts composed by ``compose``."""

    def __init__(self, module: nn.Module, z: Tensor, point: Point, compose: Compose) -> None:
        assert isinstance(module, Residual)
        self.body = _part(module.body, z, point, compose)
        self.shortcut = _part(module.shortcut, z, point, compose)
        skip = z if self.shortcut is None else self.shortcut.output
        assert self.body is not None
        total = added(self.body.output, skip)
        self.activation = _part(module.activation, total, point, compose)
        self.output = total if self.activation is None else self.activation.output
        parts = [p for p in (self.body, self.shortcut, self.activation) if p is not None]
        self.coupled = any(part.coupled for part in parts)
        self.parameters = {k: shape for part in parts for k, shape in part.parameters.items()}

    def push(self, dz: Tensor) -> Tensor:
        assert self.body is not None
        skip = dz if self.shortcut is None else self.shortcut.push(dz)
        total = self.body.push(dz) + skip
        return total if self.activation is None else self.activation.push(total)

    def pull(self, u: Tensor) -> Tensor:
        assert self.body is not None
        u = u if self.activation is None else self.activation.pull(u)
        return self.body.pull(u) + (u if self.shortcut is None else self.shortcut.pull(u))

    def push_parameters(self, step: Named) -> Tensor:
        branches = [b for b in (self.body, self.shortcut) if b is not None and b.parameters]
        out = sum((b.push_parameters(step) for b in branches), self.output.new_zeros(()))
        if self.activation is None:
            return out
        out = self.activation.push(out) if branches else out
        if self.activation.parameters:
            out = out + self.activation.push_parameters(step)
        return out

    def pull_parameters(self, u: Tensor) -> Named:
        pulled: Named = {}
        if self.activation is not None:
            if self.activation.parameters:
                pulled.update(self.activation.pull_parameters(u))
            u = self.activation.pull(u)
        for branch in (self.body, self.shortcut):
            if branch is not None and branch.parameters:
                pulled.update(branch.pull_parameters(u))
        return pulled


def _part(module: nn.Module | None, z: Tensor, point: Point, compose: Compose) -> LayerMap | None:
    if module is None:
        return None
    leaves = leaves_of(module)
    assert leaves, "checked by is_transparent"
    return compose(leaves, z, point)
