"""Damped least squares with one matrix and many row scalings: the local problem itself.

    min_d  1/2 |diag(s_j) Z d - r_j|^2 + damping_j/2 |d|^2,    j = 1..batch

This file checks the arguments and brings them to one batch of systems per matrix;
``_ridge_routes`` has the routes and ``_ridge_choice`` the choice between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Size, Tensor

from .. import checks
from ._failures import raise_failures
from ._layout import damping_tensor, family_lead, flat, require_damping
from ._library import define, not_differentiable
from ._ridge_choice import choose
from ._ridge_routes import minimum_norm, shared

#: d, info and, where every system is undamped, rank.
Solved = tuple[Tensor, Tensor, Tensor | None]


def ridge(
    Z: Tensor,
    R: Tensor,
    *,
    slopes: Tensor | None = None,
    damping: float | Tensor,
    rcond: float | None = None,
) -> Tensor:
    """The d_j that minimise ``1/2 |diag(s_j) Z d - r_j|^2 + damping_j/2 |d|^2``.

    Primal or dual form by cost; at damping 0 the minimum-norm solution ``pinv(diag(s_j) Z) r_j``.
    No 1/m: a mean over m rows needs m times the damping.

    Args:
        Z: shape (..., m, n).
        R: shape (..., batch, m), or (m,) for one system.
        slopes: the s_j, shape (..., batch, m); ``None`` means ones.
        damping: a number >= 0, or a tensor of shape (..., batch).
        rcond: at damping 0, singular values of diag(s_j) Z up to rcond times their largest count
            as zero; ``None`` means sqrt(max(m, n) * eps).

    Returns:
        d of shape (..., batch, n), or (n,).

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: wrong shape or device, or damping or rcond negative, NaN or infinite.
        NonFiniteError: ``Z``, ``R`` or ``slopes`` holds NaN or Inf, or the result overflowed.
        NotPositiveDefiniteError: the damping is lost in the rounding of the normal matrix.
        MissingExtensionError: the compiled module is not there.

    Example:
        >>> Z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> ridge(Z, torch.tensor([4.0, 5.0]), damping=1.0).round(decimals=4)
        tensor([2., 2.])
        >>> ridge(Z, torch.tensor([4.0, 5.0]), slopes=torch.tensor([0.0, 1.0]), damping=0.0)
        tensor([0.0000, 2.5000])
    """
    checks.tensor("Z", Z)
    checks.tensor("R", R)
    if slopes is not None:
        checks.tensor("slopes", slopes)
    cut = None if rcond is None else checks.non_negative("rcond", rcond)
    d: Tensor = _op(Z, R, slopes, damping_tensor(damping, Z), cut)
    return d


class Systems(NamedTuple):
    """Systems that share one Z.

    Attributes:
        R: shape (batch, m).
        slopes: shape (batch, m), or ``None`` for ones.
        damping: a number, or shape (batch,).
    """

    R: Tensor
    slopes: Tensor | None
    damping: float | Tensor

    def take(self, index: slice | Tensor) -> Systems:
        slopes = None if self.slopes is None else self.slopes[index]
        damping = self.damping[index] if isinstance(self.damping, Tensor) else self.damping
        return Systems(self.R[index], slopes, damping)


@torch.no_grad()
def ridge_ex(
    Z: Tensor,
    R: Tensor,
    *,
    slopes: Tensor | None,
    damping: float | Tensor,
    rcond: float | None = None,
    group: int = 1,
) -> Solved:
    """:func:`ridge` that reports failures instead of raising them; the sweep's entry.

    The values of a damping tensor are looked at for zeros only.

    Args:
        Z, R, slopes, damping, rcond: as for :func:`ridge`.
        group: number of consecutive systems that share one largest singular value for the cut at
            damping 0, and one damping (the samples of one sequence, say); it divides the batch.

    Returns:
        d of shape (..., batch, n); ``info`` of shape (..., batch), int32, 0 where the matrix was
        factored, with d all NaN elsewhere (NaN or Inf
        in an active row of R shows in d alone); the numerical rank, int64, of the same shape, if
        every damping is 0.
    """
    lead = _lead(Z, R, slopes, damping)
    systems = Systems(
        flat(R, lead, 1),
        None if slopes is None else flat(slopes, lead, 1),
        flat(damping, lead, 0) if isinstance(damping, Tensor) else damping,
    )
    if Z.dim() == 2:
        d, info, rank = _solve(Z, systems, rcond, group)
    else:
        d, info, rank = _solve_each(flat(Z, lead[:-1], 2), systems, lead[-1], rcond, group)
    return d.reshape(*lead, Z.shape[-1]), info.view(lead), None if rank is None else rank.view(lead)


def _solve_each(Z: Tensor, systems: Systems, batch: int, rcond: float | None, group: int) -> Solved:
    """One matrix after the other. Z: (count, m, n); systems: (count * batch)."""
    if systems.R.shape[0] == 0:
        return _zeros(systems.R, Z.shape[-1])
    parts = (systems.take(slice(i * batch, (i + 1) * batch)) for i in range(Z.shape[0]))
    solved = [_solve(matrix, part, rcond, group) for matrix, part in zip(Z, parts, strict=True)]
    ranks = [rank for _, _, rank in solved if rank is not None]
    return (
        torch.cat([d for d, _, _ in solved]),
        torch.cat([info for _, info, _ in solved]),
        torch.cat(ranks) if len(ranks) == len(solved) else None,
    )


def _solve(Z: Tensor, systems: Systems, rcond: float | None, group: int) -> Solved:
    """Z: (m, n). Choose the route."""
    R, slopes, damping = systems
    if 0 in (*Z.shape, R.shape[0]):
        return _zeros(R, Z.shape[-1])
    if isinstance(damping, Tensor):
        undamped = damping == 0
        if bool(undamped.any()):
            if not bool(undamped.all()):
                return _solve_mixed(Z, systems, undamped, rcond, group)
            return minimum_norm(Z, R, slopes, rcond, group)
    elif damping == 0:
        return minimum_norm(Z, R, slopes, rcond, group)
    return *damped(Z, R, slopes, damping), None


def damped(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The route for dampings that are all positive, nothing empty; no argument is checked.

    ``Z: (m, n), R and slopes: (batch, m), damping: number, () or (batch,)``. Returns d (batch, n)
    and info (batch,) as :func:`ridge_ex` does.
    """
    if not isinstance(damping, Tensor):
        damping = Z.new_full((), damping)  # a fill does not synchronise, a copy does
    elif damping.dim() and (damping.stride(0) == 0 or damping.shape[0] == 1):
        damping = damping[0]
    if slopes is None:
        if damping.dim() == 0:
            return shared(Z, R, damping)
        slopes = R.new_ones(()).expand_as(R)
    return choose(Z, slopes, damping)(Z, R, slopes, damping)


def _solve_mixed(
    Z: Tensor, systems: Systems, undamped: Tensor, rcond: float | None, group: int
) -> Solved:
    """Undamped and damped systems apart. A group has one damping, so it stays together."""
    d, info, _ = _zeros(systems.R, Z.shape[-1])
    for part in (undamped.nonzero().flatten(), (~undamped).nonzero().flatten()):
        d[part], info[part], _ = _solve(Z, systems.take(part), rcond, group)
    return d, info, None


def _zeros(R: Tensor, n: int) -> Solved:
    """The answer where there is nothing to solve; rank 0."""
    batch = R.shape[0]
    rank = R.new_zeros(batch, dtype=torch.int64)
    return R.new_zeros(batch, n), R.new_zeros(batch, dtype=torch.int32), rank


def _lead(Z: Tensor, R: Tensor, slopes: Tensor | None, damping: float | Tensor) -> Size:
    """Check all against Z; return the leading shape of the systems."""
    checks.shape("Z", Z, ("m", "n"))
    m = Z.shape[-2]
    tail: tuple[int | str, ...] = (m,) if Z.dim() == 2 else ("batch", m)
    leads = {"R": R.shape[:-1]}
    checks.same("R", R, "Z", Z)
    checks.shape("R", R, tail)
    if slopes is not None:
        checks.same("slopes", slopes, "Z", Z)
        checks.shape("slopes", slopes, tail)
        leads["slopes"] = slopes.shape[:-1]
    if isinstance(damping, Tensor):
        checks.same("damping", damping, "Z", Z)
        leads["damping"] = damping.shape
    return family_lead("Z", Z, **leads)


def _checked(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, rcond: float | None = None
) -> Tensor:
    require_damping(damping)
    d, info, _ = ridge_ex(Z, R, slopes=slopes, damping=damping, rcond=rcond)
    inputs = {"Z": Z, "R": R} if slopes is None else {"Z": Z, "R": R, "slopes": slopes}
    raise_failures("the normal matrix", d, info, full=inputs)
    return d.contiguous()


def _fake(
    Z: Tensor, R: Tensor, slopes: Tensor | None, damping: Tensor, rcond: float | None = None
) -> Tensor:
    return Z.new_empty((*_lead(Z, R, slopes, damping), Z.shape[-1]))


_op = define(
    "ridge(Tensor Z, Tensor R, Tensor? slopes, Tensor damping, float? rcond=None) -> Tensor",
    cpu=_checked,
    cuda=_checked,
    fake=_fake,
    backward=not_differentiable("ridge"),
)
