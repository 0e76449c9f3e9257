"""Types of least-squares problems that a block's two sides take."""

from .base import Direct, LeastSquares, Preconditioner
from .dense import DenseBatch
from .diagonal import Diagonal
from .operator import Operator
from .scaled_gram import ScaledGram

__all__ = [
    "DenseBatch",
    "Diagonal",
    "Direct",
    "LeastSquares",
    "Operator",
    "Preconditioner",
    "ScaledGram",
]
