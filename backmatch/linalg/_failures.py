"""From a status back to its cause: which tensor is not finite, which matrix not definite.

The good path costs one reduction over the result; inputs are looked at only after a failure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from .. import checks
from ..errors import NotPositiveDefiniteError


def raise_failures(
    what: str,
    result: Tensor,
    info: Tensor | None,
    *,
    lower: Mapping[str, Tensor] | None = None,
    full: Mapping[str, Tensor] | None = None,
) -> None:
    """Return if every system was solved, else raise for the first cause in the list below.

    Args:
        what: the matrix, for the message.
        result: the solution; a failed system is filled with NaN.
        info: shape (*lead,), LAPACK's meaning; ``None`` for a solver that has none.
        lower: matrices read in their lower triangle only.
        full: the other inputs.

    Raises:
        NonFiniteError: an input holds NaN or Inf (named), or the result overflowed.
        NotPositiveDefiniteError: some ``info`` is not 0.
    """
    if result.numel():
        if math.isfinite(result.sum().item()):
            return
    elif info is None or not bool(info.any()):
        return
    for name, value in (lower or {}).items():
        checks.finite(name, value.tril())
    for name, value in (full or {}).items():
        checks.finite(name, value)
    if info is not None:
        flat = info.flatten()
        failed = flat.nonzero().flatten()
        if failed.numel():
            raise NotPositiveDefiniteError(
                what, failed.tolist(), flat[failed].tolist(), flat.numel()
            )
    checks.finite("the result", result)
