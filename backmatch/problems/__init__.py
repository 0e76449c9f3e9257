"""Types of least-squares problems that a block's two sides take."""

from .averaged import averaged
from .base import Direct, LeastSquares, Preconditioner
from .batch_norm import BatchNormInputs
from .dense import DenseBatch
from .diagonal import Diagonal
from .kronecker import Kronecker
from .layer_norm import LayerNormInputs
from .normed_trace import normed_trace
from .operator import Operator
from .patch_family import Normed, PatchFamily
from .patches import Patches
from .scale_shift import ScaleShift
from .scaled_gram import ScaledGram
from .shared_operator import SharedOperator

__all__ = [
    "BatchNormInputs",
    "DenseBatch",
    "Diagonal",
    "Direct",
    "Kronecker",
    "LayerNormInputs",
    "LeastSquares",
    "Normed",
    "Operator",
    "PatchFamily",
    "Patches",
    "Preconditioner",
    "ScaleShift",
    "ScaledGram",
    "SharedOperator",
    "averaged",
    "normed_trace",
]
