"""backmatch: exact back-matching propagation and a batched least-squares engine.

The public names are loaded on first use (PEP 562), so that ``import backmatch`` and the
command line's ``--help`` answer without importing torch.

>>> import backmatch as bm
>>> bm.Relative(0.1)
Relative(factor=0.1)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

#: Public name -> module that defines it; modules themselves map to ``None``.
_PUBLIC: dict[str, str | None] = {
    "Auto": "solvers",
    "BackMatchError": "errors",
    "BackMatching": "matching",
    "BlockReport": "sweep",
    "CG": "solvers",
    "Cholesky": "solvers",
    "ConvergenceWarning": "errors",
    "Gradient": "solvers",
    "LayerInverse": "solvers",
    "MissingExtensionError": "errors",
    "NonFiniteError": "errors",
    "NotConvergedError": "errors",
    "NotPositiveDefiniteError": "errors",
    "Relative": "solvers",
    "Scalar": "solvers",
    "SolveRecord": "solvers",
    "Step": "sweep",
    "audit": "auditing",
    "blocks": None,
    "linalg": None,
    "models": None,
    "optim": None,
    "partition": "partitioning",
    "reference": None,
}

__all__ = [*sorted(_PUBLIC), "__version__"]

if TYPE_CHECKING:
    from . import blocks as blocks
    from . import linalg as linalg
    from . import models as models
    from . import optim as optim
    from . import reference as reference
    from .auditing import audit as audit
    from .errors import (
        BackMatchError as BackMatchError,
    )
    from .errors import (
        ConvergenceWarning as ConvergenceWarning,
    )
    from .errors import (
        MissingExtensionError as MissingExtensionError,
    )
    from .errors import (
        NonFiniteError as NonFiniteError,
    )
    from .errors import (
        NotConvergedError as NotConvergedError,
    )
    from .errors import (
        NotPositiveDefiniteError as NotPositiveDefiniteError,
    )
    from .matching import BackMatching as BackMatching
    from .partitioning import partition as partition
    from .solvers import CG as CG
    from .solvers import Auto as Auto
    from .solvers import Cholesky as Cholesky
    from .solvers import Gradient as Gradient
    from .solvers import LayerInverse as LayerInverse
    from .solvers import Relative as Relative
    from .solvers import Scalar as Scalar
    from .solvers import SolveRecord as SolveRecord
    from .sweep import BlockReport as BlockReport
    from .sweep import Step as Step


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'backmatch' has no attribute {name!r}")
    home = _PUBLIC[name]
    if home is None:
        value: object = importlib.import_module(f".{name}", __name__)
    else:
        value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
