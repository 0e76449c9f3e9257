"""Studies of the local Hessian: the papers' claims, with seeds, quantiles and figures.

A study returns a :class:`Study`: its claim, its options and one row per case. ``backmatch analyze``
runs them, prints their tables and stores ``analysis.json`` and ``analysis.png``.
"""

from __future__ import annotations

from .initialisation import init
from .normalisation import norm
from .result import Study
from .skip_connections import skip

__all__ = ["Study", "init", "norm", "skip"]
