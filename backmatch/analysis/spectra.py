"""Spectra of many small local Hessians at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectra:
    """Eigenvalues of a batch of local Hessians scale J^T J, one system each.

    From the singular values of J itself, and with the rank cut of :func:`backmatch.local_hessian`:
    a singular value counts as zero at or below min(rows, n) eps times the largest of its system.
    Condition numbers are those on the range.

    Attributes:
        eigenvalues: shape (systems, n), descending.
        cut: relative to the largest of its system, an eigenvalue up to this counts as zero.

    >>> spectra = Spectra.of_jacobians(torch.diag(torch.tensor([2.0, 1.0, 0.0])).unsqueeze(0))
    >>> spectra.condition_numbers, spectra.ranks, spectra.spectral_norms
    (tensor([4.]), tensor([2]), tensor([4.]))
    """

    eigenvalues: Tensor
    cut: float

    @classmethod
    def of_jacobians(cls, jacobians: Tensor, scale: float = 1.0) -> Spectra:
        """Of scale J^T J, ``jacobians`` of shape (systems, rows, n)."""
        rows, n = jacobians.shape[1:]
        values = torch.linalg.svdvals(jacobians)
        padded = torch.nn.functional.pad(scale * values.square(), (0, n - values.shape[1]))
        return cls(padded, (min(rows, n) * torch.finfo(values.dtype).eps) ** 2)

    @classmethod
    def joined(cls, parts: list[Spectra]) -> Spectra:
        """The systems of all parts, which must have n and the cut in common."""
        (cut,) = {part.cut for part in parts}
        return cls(torch.cat([part.eigenvalues for part in parts]), cut)

    @property
    def ranks(self) -> Tensor:
        """Eigenvalues that do not count as zero, int64 (systems,)."""
        return (self.eigenvalues > self.cut * self.eigenvalues[:, :1]).sum(-1)

    @property
    def condition_numbers(self) -> Tensor:
        """Largest over smallest eigenvalue on the range, (systems,); NaN for a zero matrix."""
        ranks = self.ranks
        last = self.eigenvalues.gather(-1, (ranks - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
        none = self.eigenvalues.new_tensor(torch.nan)
        return torch.where(ranks > 0, self.eigenvalues[:, 0] / last, none)

    @property
    def spectral_norms(self) -> Tensor:
        """The largest eigenvalues, (systems,)."""
        return self.eigenvalues[:, 0]

    @property
    def trace_means(self) -> Tensor:
        """tr(H) / n, (systems,)."""
        return self.eigenvalues.mean(-1)

    def whole(self) -> dict[str, float]:
        """The quantities of the block-diagonal matrix of all systems."""
        counted = self.eigenvalues > self.cut * self.eigenvalues[:, :1]
        values = self.eigenvalues[counted]
        return {
            "kappa": float(values.max() / values.min()) if len(values) else math.nan,
            "spectral_norm": float(self.spectral_norms.max()),
            "trace_mean": float(self.eigenvalues.mean()),
        }

    def without_smallest(self) -> Spectra:
        """The smallest nonzero eigenvalue of every system set to 0.

        Under batch norm without gamma that is the unit's own scale, along its weights: the norm
        takes it back but for eps / (variance + eps), which is all that a condition number would
        show.
        """
        at = (self.ranks - 1).clamp_min(0).unsqueeze(-1)
        return Spectra(self.eigenvalues.scatter(-1, at, 0.0), self.cut)
