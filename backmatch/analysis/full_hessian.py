"""The full local Hessian, residual term included, by differentiating the local loss twice.

scale/2 |T - (T_0 + r)|^2      scale (J^T J - sum_i r_i grad^2 T_i)     at T = T_0
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..blocks.generic import GenericLinearisation
from ..problems.dense import DENSE_ENTRIES
from ..problems.operator import DENSE_PASSES, PROBE_SEED, PROBES
from .curvature import Curvature
from .lanczos import extreme_eigenvalues
from .layout import Layout
from .spectrum import Spectrum

#: Relative asymmetry of the product beyond which a second derivative is wrong.
SYMMETRY_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


class FullHessian(Curvature):
    """Hessian of the local loss over some leaves of one evaluation's graph.

    Args:
        at: the evaluation; its graph must be twice differentiable.
        leaves: parameters in their order, or the input.
        displacement: r, shape of the output.
        scale: 1/m for weights, 1 for inputs.
        layout: independent systems of T; T's second derivatives fall apart as its first do.
    """

    def __init__(
        self,
        at: GenericLinearisation,
        leaves: list[Tensor],
        displacement: Tensor,
        scale: float,
        layout: Layout,
    ) -> None:
        super().__init__(layout, displacement)
        self.leaves, self.scale, self.at = leaves, scale, at
        self.sizes = [leaf.numel() for leaf in leaves]
        self.gradients: list[tuple[int, Tensor]] = []
        if at.graph.requires_grad:
            self._differentiate(displacement)

    def _differentiate(self, displacement: Tensor) -> None:
        with torch.enable_grad():
            # At T = T_0 this is -r; its derivative is J.
            residual = self.at.graph - (self.at.output + displacement)
            try:
                found = torch.autograd.grad(
                    self.at.graph, self.leaves, residual, create_graph=True, allow_unused=True
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise self._refusal(error) from error
        pairs = [(i, _strided(g)) for i, g in enumerate(found) if g is not None]
        self.gradients = [(i, g) for i, g in pairs if g.requires_grad]
        self._check_symmetry()

    def _refusal(self, error: object) -> TypeError:
        block = self.at.block
        return TypeError(
            f"block {block.name!r} ({type(block.module).__name__}) has no second derivative, so "
            f"that only its Gauss-Newton Hessian (displacement=None) can be had: {error}"
        )

    def _check_symmetry(self) -> None:
        """A backward pass that differentiates wrongly would give no symmetric product."""
        generator = torch.Generator().manual_seed(PROBE_SEED)
        shape = (2, self.layout.systems, self.layout.n)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        u, v = noise.to(self.like)
        Hu, Hv = self.product(u), self.product(v)
        norm = torch.linalg.vector_norm
        size = norm(u) * norm(Hv) + norm(v) * norm(Hu)
        wrong = ((u * Hv).sum() - (v * Hu).sum()).abs() > SYMMETRY_TOLERANCE[u.dtype] * size
        if bool(wrong & (size > self._noise() * norm(u) * norm(v))):
            raise self._refusal("its second derivative is not symmetric")

    def _noise(self) -> Tensor:
        """What rounding may leave of a Hessian that is 0: the mean of a normalised map, say."""
        norm = torch.linalg.vector_norm
        output, displacement = norm(self.at.output), norm(self.like)
        point = sum(norm(leaf.detach()).square() for leaf in self.leaves)
        natural = self.scale * output * (output + displacement) / (point + 1.0)
        noise: Tensor = 1e4 * self.eps * natural
        return noise

    def product(self, step: Tensor) -> Tensor:
        flat = self.layout.to_flat(step)
        if not self.gradients:
            return torch.zeros_like(step)
        parts = torch.split(flat, self.sizes)
        directions = [parts[i].view(self.leaves[i].shape) for i, _ in self.gradients]
        try:
            found = torch.autograd.grad(
                [g for _, g in self.gradients],
                self.leaves,
                directions,
                retain_graph=True,
                allow_unused=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._refusal(error) from error
        out = [
            torch.zeros_like(leaf) if g is None else _strided(g)
            for leaf, g in zip(self.leaves, found, strict=True)
        ]
        return self.scale * self.layout.to_systems(torch.cat([g.reshape(-1) for g in out]))

    def _unit(self, k: int) -> Tensor:
        vector = self.like.new_zeros(self.layout.systems, self.layout.n)
        vector[:, k] = 1.0
        return vector

    def blocks(self) -> Tensor:
        H = torch.stack([self.product(self._unit(k)) for k in range(self.layout.n)], 2)
        checks.finite("the local Hessian", H)
        return (H + H.mT) / 2

    def _fits(self, work: float) -> bool:
        systems, n = self.layout.systems, self.layout.n
        small = n <= DENSE_PASSES and systems * n**2 <= DENSE_ENTRIES
        return small and systems * n**3 <= work

    def all_eigenvalues(self, work: float, rcond: float | None) -> Spectrum | None:
        if not self._fits(work):
            return None
        values = torch.linalg.eigvalsh(self.blocks().double())
        relative = self.layout.n * self.eps if rcond is None else rcond**2
        return Spectrum.of_systems(values, relative, "eigh")

    def extreme_eigenvalues(self, k: int, rcond: float | None) -> Spectrum:
        def product(v: Tensor) -> Tensor:
            out = self.product(v.view(self.layout.systems, -1)).reshape(-1)
            checks.finite("the local Hessian's product", out)
            return out

        values = extreme_eigenvalues(product, self.like.new_empty(self.layout.size), k)
        return self._largest(values.double(), k, 1, rcond)

    def trace(self) -> tuple[float, bool]:
        """By the diagonal where all blocks are small, else by probes with signs (Hutchinson)."""
        if self.layout.n <= PROBES or self._fits(1e9):
            total = sum(
                float(self.product(self._unit(k))[:, k].double().sum())
                for k in range(self.layout.n)
            )
            return total, True
        generator = torch.Generator().manual_seed(PROBE_SEED)
        total = 0.0
        for _ in range(PROBES):
            signs = torch.randint(0, 2, (self.layout.n,), generator=generator, device="cpu")
            probe = (signs * 2 - 1).to(self.like).expand(self.layout.systems, -1)
            total += float((probe * self.product(probe)).double().sum())
        return total / PROBES, False


def _strided(gradient: Tensor) -> Tensor:
    """``nn.Embedding(sparse=True)`` has sparse ones."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
