"""Direct routes of :class:`PatchFamily`; all return d of shape (units, n).

- :func:`shared`, neither slopes nor norm: one Cholesky factor per group, primal or dual;
- :func:`solve`: one weighted patch Gram per channel (primal), or one matrix over the active rows
  per channel (dual), whichever costs less.

Patches come in chunks, channels come in chunks: nothing grows with batch * positions * K or with
channels * K^2 beyond the workspace.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import _library, scaled_gram_solve_ex, spd_solve_ex
from ..linalg._library import in_chunks
from ..linalg._normal import cholesky_inverse
from ..linalg._ridge_choice import DUAL_FLOOR
from ..linalg.spd import solve_shared
from ._patch_units import gram_of_units, normed_dual
from .base import Direct, Preconditioner, mean_factor

if TYPE_CHECKING:
    from .patch_family import PatchFamily

#: Flops that are always worth a direct solve.
SMALL = 2e9

Shift = float | Tensor


def fits(family: PatchFamily) -> bool:
    """Whether one system's matrix, primal or dual, can be formed within the workspace."""
    return _primal_fits(family) or _dual_fits(family)


def _primal_fits(family: PatchFamily) -> bool:
    # The matrix, the weighted Gram that it is made from and one more that a chunk adds to it.
    return 3 * family.unknowns**2 * family.residual.element_size() <= _library.WORKSPACE_BYTES


def _dual_fits(family: PatchFamily) -> bool:
    return 2 * family.patches.rows**2 * family.residual.element_size() <= _library.WORKSPACE_BYTES


def cheapest(family: PatchFamily) -> tuple[str, float]:
    """``"primal"`` or ``"dual"``, and its cost in flops."""
    rows, n, units = family.patches.rows, family.unknowns, family.patches.units
    groups = family.patches.groups
    active = _active(family).double()
    systems = groups if family.slopes is None and family.normed is None else units
    primal = systems * (float(active.mean()) * n**2 + n**3 / 3)
    dual = groups * 2.0 * rows**2 * n
    dual += groups * rows**3 / 3 if systems < units else float((active**3 / 3).sum())
    if not _primal_fits(family) or (dual < primal and _dual_fits(family)):
        return "dual", dual
    return "primal", primal


def _active(family: PatchFamily) -> Tensor:
    """Rows per unit whose slope is not 0."""
    if family.slopes is None:
        rows = family.patches.rows
        return torch.full((family.patches.units,), rows, device=family.residual.device)
    return (family.slopes != 0).sum((0, 2, 3))


def _dual_is_accurate(family: PatchFamily, damping: Shift) -> bool:
    """With more rows than unknowns the dual matrix is singular but for its damping."""
    if int(_active(family).max()) <= family.unknowns or not _primal_fits(family):
        return True
    return bool((damping >= DUAL_FLOOR / family.unknowns * family.unit_traces).all())


def shared(family: PatchFamily, damping: Shift) -> Direct:
    """One factor per group for all its channels."""
    route = cheapest(family)[0] if _dual_is_accurate(family, damping) else "primal"
    step = family.residual.new_empty(family.systems, family.unknowns)
    info = torch.empty(family.systems, dtype=torch.int32, device=step.device)
    gradient = family.vjp(family.residual) if route == "primal" else None
    dual = torch.empty_like(family.residual)
    shift = damping if isinstance(damping, Tensor) else step.new_full((), damping)
    for group in range(family.patches.groups):
        part = family.patches.of_group(group)
        if gradient is None:
            matrix = family.patches.dual(group) + float(family.bias)
            solution, info[part] = solve_shared(matrix, family.residual[part].mT, shift)
            dual[part] = solution.mT
        else:
            solution, info[part] = solve_shared(_gram(family, group), gradient[part].mT, shift)
            step[part] = solution.mT
    return Direct(family.vjp(dual) if gradient is None else step, info)


def _gram(family: PatchFamily, group: int) -> Tensor:
    """[P 1]^T [P 1] of one group."""
    n = family.unknowns
    G = family.residual.new_zeros(n, n)
    for _, Z in family.patches.chunks(group, columns=int(family.bias)):
        G.addmm_(Z.t(), Z)
    return G


def solve(family: PatchFamily, damping: Shift) -> Direct:
    """One matrix per channel."""
    route = cheapest(family)[0]
    if route == "dual" and _dual_is_accurate(family, damping):
        return _dual(family, damping) if family.normed is None else normed_dual(family, damping)
    return _primal(family, damping)


def _dual(family: PatchFamily, damping: Shift) -> Direct:
    """(D_j K D_j + damping I) y = r_j; d = [P 1]^T D_j y."""
    assert family.slopes is not None
    slopes = family.patches.to_rows(family.slopes)
    x = torch.empty_like(family.residual)
    info = torch.empty(family.systems, dtype=torch.int32, device=x.device)
    for group in range(family.patches.groups):
        part = family.patches.of_group(group)
        K = family.patches.dual(group) + float(family.bias)
        x[part], info[part] = scaled_gram_solve_ex(
            K, slopes[part], family.residual[part], damping=damping
        )
    return Direct(replace(family, slopes=None).vjp(x), info)


def _primal(family: PatchFamily, damping: Shift) -> Direct:
    """One weighted patch Gram per channel, a few channels at a time."""
    gradient = family.vjp(family.residual)
    step = torch.empty_like(gradient)
    info = torch.empty(family.systems, dtype=torch.int32, device=step.device)
    n, each = family.unknowns, family.patches.units // family.patches.groups
    for group in range(family.patches.groups):
        first = group * each

        def work(local: slice, group: int = group, first: int = first) -> None:
            part = slice(first + local.start, first + local.stop)
            G = gram_of_units(family, group, part)
            found, info[part] = spd_solve_ex(G, gradient[part].unsqueeze(2), damping=damping)
            step[part] = found.squeeze(2)

        in_chunks(each, 3 * n**2 * step.element_size(), work)
    return Direct(step, info)


def mean_preconditioner(family: PatchFamily, damping: Shift) -> Preconditioner:
    """Cholesky of every group's patch Gram at the mean of its channels' squared slopes."""
    inverses = []
    for group in range(family.patches.groups):
        part = family.patches.of_group(group)
        w = torch.ones_like(family.residual[part]).mean(0)
        if family.slopes is not None:
            w = family.patches.to_rows(family.slopes[:, part].square()).mean(0)
        G = family.residual.new_zeros(family.unknowns, family.unknowns)
        for rows, Z in family.patches.chunks(group, columns=int(family.bias)):
            G.addmm_((Z * w[rows].unsqueeze(1)).t(), Z, alpha=family.scale)
        G.diagonal().add_(damping)
        inverses.append(cholesky_inverse(mean_factor(G)))

    def apply(residual: Tensor) -> Tensor:
        parts = residual.chunk(len(inverses))
        return torch.cat([inverse(part) for inverse, part in zip(inverses, parts, strict=True)])

    return apply
