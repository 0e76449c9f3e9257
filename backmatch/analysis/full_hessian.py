"""The full local Hessian, residual term included, by differentiating the local loss twice.

scale/2 |T - (T_0 + r)|^2      scale (J^T J - sum_i r_i grad^2 T_i)     at T = T_0
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..blocks.generic import GenericLinearisation
from ..blocks.products import NoPushforwardError
from ..problems import LeastSquares
from ..problems.dense import DENSE_ENTRIES
from ..problems.operator import DENSE_PASSES, PROBE_SEED, PROBES
from .curvature import Curvature
from .lanczos import extreme_eigenvalues
from .layout import Layout
from .spectrum import Spectrum

#: Relative mismatch beyond which a second derivative is wrong.
MISMATCH = {torch.float32: 1e-3, torch.float64: 1e-9}
#: A gradient with its graph, and the leaf that it belongs to.
Gradients = list[tuple[int, Tensor]]


class FullHessian(Curvature):
    """Hessian of the local loss over some leaves of one evaluation's graph.

    Some backward passes cannot be differentiated, and a few of them give 0 instead of an error.
    So the second derivative is checked once, on a random direction: at r = 0 it must be the
    Gauss-Newton product, and at r it must be symmetric.

    Args:
        at: the evaluation; its graph must be twice differentiable.
        leaves: parameters in their order, or the input.
        displacement: r, shape of the output.
        problem: the side's Gauss-Newton problem at the same evaluation.
        layout: independent systems of T; T's second derivatives fall apart as its first do.
    """

    def __init__(
        self,
        at: GenericLinearisation,
        leaves: list[Tensor],
        displacement: Tensor,
        problem: LeastSquares,
        layout: Layout,
    ) -> None:
        super().__init__(layout, displacement)
        self.leaves, self.scale, self.at = leaves, problem.scale, at
        self.sizes = [leaf.numel() for leaf in leaves]
        self.gradients: Gradients = []
        if at.graph.requires_grad:
            self.gradients = self._gradients(displacement)
            self._check(problem)

    def _gradients(self, displacement: Tensor) -> Gradients:
        """Of the local loss, scale left out."""
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
        return [(i, g) for i, g in pairs if g.requires_grad]

    def _refusal(self, error: object) -> TypeError:
        block = self.at.block
        return TypeError(
            f"block {block.name!r} ({type(block.module).__name__}) has no second derivative, so "
            f"that only its Gauss-Newton Hessian (displacement=None) can be had: {error}"
        )

    def _check(self, problem: LeastSquares) -> None:
        generator = torch.Generator().manual_seed(PROBE_SEED)
        shape = (2, self.layout.size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        u, v = noise.to(self.like)
        try:
            want = problem.normal(v.view(problem.systems, -1)).reshape(-1)
        except NoPushforwardError as error:
            raise self._refusal(error) from error
        got = self._second(self._gradients(torch.zeros_like(self.like)), v)
        self._compare(got - want, want, v)
        Hu, Hv = self._second(self.gradients, u), self._second(self.gradients, v)
        self._compare(torch.dot(u, Hv) - torch.dot(v, Hu), torch.cat([Hu, Hv]), v)

    def _compare(self, difference: Tensor, product: Tensor, v: Tensor) -> None:
        norm = torch.linalg.vector_norm
        relative = MISMATCH[v.dtype] * norm(product)
        if difference.dim() == 0:
            relative = relative * norm(v)
        # What rounding may leave of a Hessian that is 0: the mean of a normalised map, say.
        point = sum(norm(leaf.detach()).square() for leaf in self.leaves) + 1.0
        output = norm(self.at.output)
        floor = 1e4 * self.eps * self.scale * output * (output + norm(self.like)) / point
        if bool((norm(difference) > relative) & (norm(product) > floor * norm(v))):
            raise self._refusal("its backward pass cannot be differentiated")

    def product(self, step: Tensor) -> Tensor:
        flat = self._second(self.gradients, self.layout.to_flat(step))
        return self.layout.to_systems(flat)

    def _second(self, gradients: Gradients, v: Tensor) -> Tensor:
        """Derivative of the gradients in the flat direction v."""
        if not gradients:
            return torch.zeros_like(v)
        parts = torch.split(v, self.sizes)
        directions = [parts[i].view(self.leaves[i].shape) for i, _ in gradients]
        try:
            found = torch.autograd.grad(
                [g for _, g in gradients],
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
        return self.scale * torch.cat([g.reshape(-1) for g in out])

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
