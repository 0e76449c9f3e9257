"""What a local Hessian is made of: independent systems, products, and routes to eigenvalues."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .layout import Layout
from .spectrum import Spectrum


class Curvature(ABC):
    """A symmetric matrix, block-diagonal over the systems of ``layout``.

    Attributes:
        layout: its systems and the flat order of its unknowns.
        like: any tensor of its dtype and device.
    """

    def __init__(self, layout: Layout, like: Tensor) -> None:
        self.layout, self.like = layout, like
        self.eps = torch.finfo(like.dtype).eps

    @abstractmethod
    def product(self, step: Tensor) -> Tensor:
        """H d: (systems, n) -> (systems, n)."""

    @abstractmethod
    def trace(self) -> tuple[float, bool]:
        """The trace, and whether it is exact."""

    @abstractmethod
    def all_eigenvalues(self, work: float, rcond: float | None) -> Spectrum | None:
        """All eigenvalues, ``None`` where that takes more than ``work`` multiplications."""

    @abstractmethod
    def extreme_eigenvalues(self, k: int, rcond: float | None) -> Spectrum:
        """The k of largest magnitude by Lanczos; k is below the size."""

    @abstractmethod
    def blocks(self) -> Tensor:
        """The diagonal blocks, (systems, n, n)."""

    def _largest(self, values: Tensor, k: int, copies: int, rcond: float | None) -> Spectrum:
        """What Lanczos found, each ``copies`` times, cut to k."""
        sizes = values.abs()
        relative = self.layout.n * self.eps if rcond is None else rcond**2
        counted = sizes > relative * sizes.max()
        found = Spectrum.of_values(values, counted, "lanczos", copies=copies, complete=False)
        return found.extreme(k)
