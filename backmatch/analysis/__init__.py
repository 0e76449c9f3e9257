"""The papers' claims as instruments: the local Hessian of a block, and studies of it.

A study (:func:`init`, :func:`skip`, :func:`norm`, :func:`depth`, :func:`width`, :func:`training`)
tests one claim and returns a :class:`Study`: the claim, the options and one row of quantiles per
case. ``backmatch analyze`` runs them, prints their tables and stores ``analysis.json`` and
``analysis.png``.
"""

from __future__ import annotations

from .depths import depth
from .during_training import training
from .hessian import LocalHessian, local_hessian
from .initialisation import init
from .normalisation import norm
from .result import Study
from .skip_connections import skip
from .widths import width

__all__ = [
    "LocalHessian",
    "Study",
    "depth",
    "init",
    "local_hessian",
    "norm",
    "skip",
    "training",
    "width",
]
