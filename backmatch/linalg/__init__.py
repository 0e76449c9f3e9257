"""Batched solvers for the local problems: torch tensors in and out, CPU and CUDA.

float32 and float64; leading batch dimensions broadcast; any strides, expanded views included;
inputs are never modified; ``damping`` is a number or a tensor with one value per system. The dense
forms are operators, ``torch.ops.backmatch.*``, and work under ``torch.compile``.

The names ending in ``_ex`` return ``(x, info)`` and neither raise on numerical failure nor
synchronise; the plain names check and raise typed errors.
"""

from .dense_cg import cg
from .krylov import CGResult
from .min_norm import min_norm_solve
from .ridge import ridge
from .scaled_gram import scaled_gram_solve, scaled_gram_solve_ex
from .scaled_gram_cg import scaled_gram_cg
from .spd import spd_solve, spd_solve_ex
from .weighted_gram import weighted_gram

__all__ = [
    "CGResult",
    "cg",
    "min_norm_solve",
    "ridge",
    "scaled_gram_cg",
    "scaled_gram_solve",
    "scaled_gram_solve_ex",
    "spd_solve",
    "spd_solve_ex",
    "weighted_gram",
]
