"""The normalisations' closed forms at every rank and with weak damping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_checks import deviation, sweep
from torch import nn

import backmatch as bm
from backmatch import problems

EPS = float(np.finfo(np.float64).eps)


def test_undamped_slopes_below_the_cut_need_dense_jacobians():
    torch.manual_seed(0)
    layer = nn.LayerNorm(5000).double()
    layer.weight.data[0] = 0.0
    z, r = torch.randn(2, 5000).double(), torch.randn(2, 5000).double()
    with pytest.raises(ValueError, match=r"block '1' \(LayerNorm\).*use CG\(0.0\)"):
        sweep(layer, z, r, bm.Cholesky(0.0))
    layer.weight.data.fill_(1.0)
    assert sweep(layer, z, r, bm.Cholesky(0.0)).input.rank == 2 * 4999


@pytest.mark.parametrize("eps", [1e-5, 0.3, 1e-12])
@pytest.mark.parametrize("rcond", [None, 1e-4, 0.3, 0.8])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 40])
def test_every_rank_of_a_layer_norm(n, rcond, eps):
    """Slopes above and below the cut, and the direction of the input on either side of it."""
    if n == 2 and eps == 1e-12:
        pytest.skip("J = e/2 [[1, -1], [-1, 1]] is but rounding when formed densely")
    rng = np.random.default_rng(n)
    torch.manual_seed(n)
    z = torch.randn(4, n).double()
    z[1] = 0.5
    rate = (z.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    x = (z - z.mean(-1, keepdim=True)) * rate
    gamma = torch.from_numpy(rng.uniform(0.5, 2.0, (4, n)))
    gamma[2:, : n // 3] = 0.0
    J = torch.eye(n).double() - 1 / n - x.unsqueeze(-1) * x.unsqueeze(-2) / n
    J = ((rate * gamma).unsqueeze(-1) * J).numpy()
    r = torch.randn(4, n).double()
    problem = problems.LayerNormInputs(x, rate * gamma, (eps * rate.square())[:, 0], r, "a test")
    found = problem.direct(0.0, rcond)
    cut = np.sqrt(n * np.finfo(np.float64).eps) if rcond is None else rcond
    norms = [np.linalg.norm(one, 2) for one in J]
    least = 1e-14 if n > 1 else 1.0  # n = 1: J is 0, up to rounding
    ranks = [
        np.linalg.matrix_rank(one, tol=max(cut * norm, least))
        for one, norm in zip(J, norms, strict=True)
    ]
    assert found.rank == sum(ranks)
    for i in range(4):
        want = np.linalg.pinv(J[i], rcond=max(cut, least)) @ r[i].numpy() * (n > 1)
        assert deviation(found.step[i], want) < 1e-8
    assert float(problem.largest_eigenvalue()) == pytest.approx(max(norms) ** 2 * (n > 1))


@pytest.mark.parametrize("scale", [1e-10, 1e-8, 1e-3])
def test_weak_damping_of_a_layer_norm(scale):
    """The normal equations hold to rounding, however weak the damping: no J^T J is inverted."""
    torch.manual_seed(0)
    layer = nn.LayerNorm(50).double()
    nn.init.normal_(layer.weight)
    layer.weight.data[3] = 0.0
    found = sweep(layer, torch.randn(4, 50).double(), torch.randn(4, 50).double(), bm.Auto(scale))
    assert found.input.residual < 1e-12


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("rcond", [None, 1e-4, 0.0])
def test_every_rank_of_scale_and_shift(spread, rcond):
    """Rows close to constant: the smaller singular value of [x 1] on either side of the cut."""
    torch.manual_seed(0)
    x = 1.3 + spread * torch.randn(3, 20).double()
    r = torch.randn(3, 20).double()
    found = problems.ScaleShift(x, r, 1.0).direct(0.0, rcond)
    cut = np.sqrt(60 * EPS) if rcond is None else rcond
    J = torch.stack([x, torch.ones_like(x)], -1).numpy()
    values = np.linalg.svd(J, compute_uv=False)
    cut = max(cut, 1e-14) * values.max()
    rank = 0
    for i in range(3):
        rank += np.linalg.matrix_rank(J[i], tol=cut)
        want = np.linalg.pinv(J[i], rcond=cut / values[i, 0]) @ r[i].numpy()
        assert deviation(found.step[i], want) < max(1e-10, 100 * EPS * values[i, 0] / cut)
    assert found.rank == rank


@pytest.mark.parametrize("damping", [1e-12, 1e-4, 10.0])
def test_damped_scale_and_shift_hold_their_normal_equations(damping):
    torch.manual_seed(0)
    x = torch.tensor([1.3, 0.0, -2.0]).double().unsqueeze(1) + torch.randn(3, 20).double()
    x[1] = 0.7
    problem = problems.ScaleShift(x, torch.randn(3, 20).double(), 1.0)
    step = problem.direct(damping, None).step
    residual = problem.normal(step) + damping * step - problem.gradient()
    assert float(residual.abs().max()) < 1e-12 * float(problem.gradient().abs().max())
