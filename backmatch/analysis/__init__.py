"""The papers' claims as instruments: the local Hessian of a block, and what builds upon it."""

from __future__ import annotations

from .hessian import LocalHessian, local_hessian

__all__ = ["LocalHessian", "local_hessian"]
