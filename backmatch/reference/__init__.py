"""The slow, plain version of everything: float64, NumPy/SciPy, one system at a time.

It shares no code with the fast path (it imports nothing of ours but the errors), so that an
agreement of the two says something. Tests and benchmarks use it; nothing else should.

>>> import numpy as np
>>> from backmatch import reference
>>> reference.spd_solve(np.diag([2.0, 4.0]), np.ones((2, 1)), damping=2.0).ravel().round(6)
array([0.25    , 0.166667])
"""

from .linalg import (
    CGResult,
    cg,
    min_norm_solve,
    ridge,
    scaled_gram_solve,
    spd_solve,
    weighted_gram,
)
from .sweep import BlockResult, SweepResult, sweep

__all__ = [
    "BlockResult",
    "CGResult",
    "SweepResult",
    "cg",
    "min_norm_solve",
    "ridge",
    "scaled_gram_solve",
    "spd_solve",
    "sweep",
    "weighted_gram",
]
