"""Which of the routes of :mod:`_ridge_routes` solves a family with slopes: by cost, and accuracy.

Costs are in multiply-adds at the speed of the batched solves. With a active rows (slope not 0) out
of m, and c = m - a others, a system costs

- dual: ``a^3 / 6 + 2 a^2``;
- complement (0/1 slopes, one damping, float32): the same in min(a, c), and two products with the
  inverse of K + damping I, which is formed once;
- primal: ``a n^2 / 2 + n^3 / 6 + n^2``.

The first two share K = Z Z^T besides. Products run 2.5 times as fast as the solves, the inverse in
float64 at three quarters of their speed (measured with AVX-512, m = 128 .. 512).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._library import DTYPE_NAMES, native
from ._ridge_routes import complement, dual, primal

Route = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

#: With more active rows than columns the dual matrix is singular but for its damping. It is used
#: only where damping >= DUAL_FLOOR * trace / n, which bounds what rounding is amplified by.
DUAL_FLOOR = 1e-3

#: Largest |Z|^2 / damping for the complement. It bounds the condition of K + damping I, which
#: is that of all rows together, and can be far above that of one system's active rows.
COMPLEMENT_CONDITION = 1e4

#: Time of a multiply-add in a product and in the inverse, where one in a solve takes 1.
PRODUCT, INVERSE = 0.4, 1.33

#: Below this many entries of slopes nothing can be saved that the choice itself would not cost.
SMALL = 4096


def choose(Z: Tensor, slopes: Tensor, damping: Tensor) -> Route:
    """The route for ``Z: (m, n), slopes: (batch, m), damping: () or (batch,)``, all positive."""
    m, n = Z.shape
    common = damping.dim() == 0 and Z.dtype == torch.float32 and not Z.is_cuda
    if m <= n and not (common and slopes.numel() >= SMALL):
        return dual
    if Z.is_cuda:
        return choose_on_device(Z, slopes, damping)
    active, solves, smaller, most, binary = _counts(slopes)
    common_gram = PRODUCT * m * m * n / 2
    route, cost = dual, solves + common_gram
    if common and binary:
        products = PRODUCT * 2 * slopes.shape[0] * m * m
        other = smaller + products + INVERSE * 2.5 * m**3 + common_gram
        if other < cost and _square(Z) <= COMPLEMENT_CONDITION * float(damping):
            route, cost = complement, other
    if m <= n or most <= n:
        return route
    direct = active * n * n / 2 + slopes.shape[0] * (n**3 / 6 + n * n)
    if cost > direct or not _accurate(Z, slopes, damping, binary):
        return primal
    return route


def choose_on_device(Z: Tensor, slopes: Tensor, damping: Tensor) -> Route:
    """:func:`choose` for m > n without the complement, with one transfer from the device."""
    m, n = Z.shape
    active = slopes.count_nonzero(-1).double()
    solves = (active * active * (active / 6 + 2)).sum()
    trace = slopes.square() @ torch.linalg.vecdot(Z, Z, dim=-1)
    accurate = (damping >= DUAL_FLOOR / n * trace).all().double()
    facts = torch.stack([active.sum(), solves, active.max(), accurate]).tolist()
    rows, cost, most, is_accurate = facts
    if most <= n:
        return dual
    direct = rows * n * n / 2 + slopes.shape[0] * (n**3 / 6 + n * n)
    return dual if cost + PRODUCT * m * m * n / 2 <= direct and is_accurate else primal


def _counts(slopes: Tensor) -> tuple[float, float, float, int, bool]:
    """Sums over the systems: active rows, cost in dual form and by the complement; the most active
    rows of one; whether all slopes are 0 or 1."""
    found: tuple[float, float, float, int, bool] = native().ridge_counts(
        DTYPE_NAMES[slopes.dtype], *slopes.shape, slopes.data_ptr(), *slopes.stride()
    )
    return found


def _square(Z: Tensor) -> float:
    return float(torch.linalg.vector_norm(Z)) ** 2


def _accurate(Z: Tensor, slopes: Tensor, damping: Tensor, binary: bool) -> bool:
    floor = DUAL_FLOOR / Z.shape[1]
    if binary and damping.dim() == 0 and float(damping) >= floor * _square(Z):
        return True  # no trace is above |Z|^2
    trace = slopes.square() @ torch.linalg.vecdot(Z, Z)
    return bool((damping >= floor * trace).all())
