"""Solvers for one side of one block, from back-propagation to exact back-matching."""

from .auto import Auto
from .base import Solution, Solver
from .cg import CG
from .cholesky import Cholesky
from .damping import Relative, Resolved
from .gradient import Gradient
from .layer_inverse import LayerInverse
from .record import SolveRecord
from .scalar import KINDS, Scalar, curvature

__all__ = [
    "CG",
    "KINDS",
    "Auto",
    "Cholesky",
    "Gradient",
    "LayerInverse",
    "Relative",
    "Resolved",
    "Scalar",
    "Solution",
    "SolveRecord",
    "Solver",
    "curvature",
]
