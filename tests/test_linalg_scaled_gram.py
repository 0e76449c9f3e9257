"""scaled_gram_solve: against the dense matrix D K D, dropped rows, status, layouts, bits."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch import linalg, reference
from backmatch.errors import NonFiniteError, NotPositiveDefiniteError

pytestmark = pytest.mark.usefixtures("two_threads")

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)


def family(batch: int, n: int, dtype=torch.float64, *, relu: bool = True, seed: int = 0):
    """K = Z Z^T of full rank, slopes, right-hand sides and dampings."""
    Z = lc.normal(n, n + 3, dtype=dtype, seed=seed)
    D = lc.relu_like(batch, n, seed=seed + 1) if relu else lc.normal(batch, n, seed=seed + 1)
    R = lc.normal(batch, n, dtype=dtype, seed=seed + 2)
    damping = lc.normal(batch, dtype=dtype, seed=seed + 3).abs() + 0.1
    return Z @ Z.mT, D.to(dtype), R, damping


def dense(K, D, damping):
    """D K D + damping I, float64."""
    K, D, damping = K.double(), D.double(), damping.double()
    scaled = D.unsqueeze(-1) * K * D.unsqueeze(-2)
    return scaled + damping[:, None, None] * lc.eye_like(K)


@dtypes
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "smooth"])
@pytest.mark.parametrize("n", lc.SIZES)
def test_scaled_gram_solve_sizes(n, relu, dtype):
    K, D, R, damping = family(5, n, dtype, relu=relu, seed=n)
    X = linalg.scaled_gram_solve(K, D, R, damping=damping)
    assert X.shape == (5, n)
    assert torch.equal(X[D == 0], torch.zeros_like(X[D == 0]))
    # Where D = 0 the system reads damping y = r; elsewhere y = x / D.
    y = torch.where(D == 0, R / damping[:, None], X / D).unsqueeze(-1)
    ratio = lc.residual_ratio(dense(K, D, damping), y, R.unsqueeze(-1))
    assert ratio < lc.RESIDUAL_LIMIT


@pytest.mark.parametrize("n", [1, 7, 33, 65])
def test_scaled_gram_solve_oracles(n):
    K, D, R, damping = family(6, n, relu=False, seed=n)
    X = linalg.scaled_gram_solve(K, D, R, damping=damping)
    by_reference = reference.scaled_gram_solve(
        K.numpy(), D.numpy(), R.numpy(), damping=damping.numpy()
    )
    by_numpy = (
        D.numpy() * np.linalg.solve(dense(K, D, damping).numpy(), R.numpy()[..., None])[..., 0]
    )
    np.testing.assert_allclose(X.numpy(), by_reference, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(X.numpy(), by_numpy, rtol=1e-9, atol=1e-11)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 7, 1000])
def test_scaled_gram_solve_batches(batch, dtype):
    K, D, R, damping = family(batch, 6, dtype)
    X, info = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    assert X.shape == (batch, 6)
    assert info.shape == (batch,)
    assert not info.any()
    one = [linalg.scaled_gram_solve_ex(K, D[i], R[i], damping=damping[i])[0] for i in range(batch)]
    assert torch.equal(X, torch.stack(one) if one else X)


@pytest.mark.parametrize(
    ("k", "d", "r", "damping", "lead"),
    [
        ((), (), (), (), ()),
        ((), (4,), (), (), (4,)),
        ((), (), (4,), (4,), (4,)),
        ((), (3, 1), (4,), (3, 4), (3, 4)),
        ((2,), (4,), (2, 4), (), (2, 4)),
        ((2,), (2, 1), (1,), (), (2, 1)),
        ((3, 1), (2, 4), (4,), (4,), (3, 2, 4)),
        ((0,), (0, 4), (4,), (), (0, 4)),
    ],
)
def test_scaled_gram_solve_broadcasts(k, d, r, damping, lead):
    Z = lc.normal(*k, 5, 7)
    K, D, R = Z @ Z.mT, lc.normal(*d, 5, seed=1), lc.normal(*r, 5, seed=2)
    shift = lc.normal(*damping, seed=3).abs() + 0.1
    X = linalg.scaled_gram_solve(K, D, R, damping=shift)
    assert X.shape == (*lead, 5)
    Kb = (K if not k else K.unsqueeze(-3)).expand(*lead, 5, 5)
    A = D.unsqueeze(-1) * Kb * D.unsqueeze(-2) + shift[..., None, None] * torch.eye(5).double()
    y = torch.linalg.solve(A, R.expand(*lead, 5).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(X, D * y, rtol=1e-9, atol=1e-11)


@dtypes
@pytest.mark.parametrize("n", [5, 33, 129])
@pytest.mark.parametrize("layout", lc.LAYOUTS)
def test_scaled_gram_solve_layouts_give_equal_bits(layout, n, dtype):
    K, D, R, damping = family(6, n, dtype)
    view = lc.LAYOUTS[layout]
    lower = K.tril() + torch.full_like(K, torch.nan).triu(1)
    X = linalg.scaled_gram_solve(
        view(lower), view(D), view(R), damping=damping.repeat_interleave(2)[::2]
    )
    assert torch.equal(X, linalg.scaled_gram_solve(K, D, R, damping=damping))
    same = linalg.scaled_gram_solve(K, D[:1].expand_as(D), R[0], damping=damping[0].expand(6))
    one = linalg.scaled_gram_solve(K, D[:1], R[:1], damping=damping[:1])
    assert torch.equal(same, one.expand_as(same))


@dtypes
@pytest.mark.parametrize("n", [2, 8, 33, 65, 130])
def test_zero_slopes_drop_out_exactly(n, dtype):
    """The bits are those of the smaller system, whatever stands in the dropped rows."""
    K, D, R, damping = family(4, n, dtype)
    D = torch.zeros_like(D)
    kept = torch.arange(0, n, 2)
    D[1:, kept] = 1.5
    X = linalg.scaled_gram_solve(K, D, R, damping=damping)
    small = linalg.scaled_gram_solve(
        K[kept][:, kept], D[1:, kept], R[1:, kept], damping=damping[1:]
    )
    assert torch.equal(X[1:, kept], small)
    poisoned = K.clone()
    poisoned[1::2] = torch.nan
    poisoned[:, 1::2] = torch.nan
    R[:, 1::2] = torch.inf
    assert torch.equal(linalg.scaled_gram_solve(poisoned, D, R, damping=damping), X)


@dtypes
@pytest.mark.parametrize("n", [3, 17, 64, 130])
def test_info_counts_rows_of_K(n, dtype):
    K = torch.eye(n, dtype=dtype)
    K[n - 1, n - 1] = -5.0
    D = torch.ones(5, n, dtype=dtype)
    D[1, : n - 1] = 0  # only the bad row is left: still reported as row n
    D[2, n - 1] = 0  # the bad row drops out
    D[3] = 0
    R = lc.normal(5, n, dtype=dtype)
    R[4, 0] = torch.nan
    X, info = linalg.scaled_gram_solve_ex(K, D, R, damping=0.5)
    assert info.tolist() == [n, n, 0, 0, n]
    assert X[[0, 1]].isnan().all()
    assert X[2].isfinite().all()
    assert torch.equal(X[3], torch.zeros_like(X[3]))
    with pytest.raises(NotPositiveDefiniteError) as caught:
        linalg.scaled_gram_solve(K, D[:4], R[:4], damping=0.5)
    assert (caught.value.indices, caught.value.pivots) == ([0, 1], [n, n])


@dtypes
@pytest.mark.parametrize("n", [5, 33, 130])
def test_nonfinite_systems_leave_neighbours_alone(n, dtype):
    K, D, R, damping = family(40, n, dtype, relu=False)
    good = linalg.scaled_gram_solve(K, D, R, damping=damping)
    D[7, n // 2] = torch.nan
    D[21, 0] = torch.inf
    X, info = linalg.scaled_gram_solve_ex(K, D, R, damping=damping)
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[7, 21]] = True
    assert torch.equal(info != 0, bad)
    assert X[bad].isnan().all()
    assert torch.equal(X[~bad], good[~bad])
    with pytest.raises(NonFiniteError, match="D has 2 non-finite"):
        linalg.scaled_gram_solve(K, D, R, damping=damping)
    K[n - 1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="K has 1 non-finite"):
        linalg.scaled_gram_solve(K, D, R, damping=damping)


@dtypes
@pytest.mark.parametrize("n", [7, 65, 130])
def test_bits_do_not_depend_on_threads_split_or_order(n, dtype):
    K, D, R, damping = family(50, n, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linalg.scaled_gram_solve(K, D, R, damping=damping)
        torch.set_num_threads(3)
        three = linalg.scaled_gram_solve(K, D, R, damping=damping)
    finally:
        torch.set_num_threads(threads)
    order = torch.randperm(50, generator=lc.generator(0))
    shuffled = linalg.scaled_gram_solve(K, D[order], R[order], damping=damping[order])
    single = [linalg.scaled_gram_solve(K, D[i], R[i], damping=damping[i]) for i in range(50)]
    assert torch.equal(one, three)
    assert torch.equal(one[order], shuffled)
    assert torch.equal(one, torch.stack(single))


@dtypes
def test_damping_zero_is_the_minimum_norm(dtype):
    """K of rank 4; zeros among the dampings choose the route system by system."""
    Z = lc.normal(9, 4, dtype=dtype)
    D, R = lc.relu_like(6, 9, dtype=dtype, seed=1), lc.normal(6, 9, dtype=dtype, seed=2)
    D[5] = 0
    damping = torch.tensor([0.0, 0.3, 0.0, 0.3, 0.0, 0.0], dtype=dtype)
    X = linalg.scaled_gram_solve(Z @ Z.mT, D, R, damping=damping)
    for i in range(6):
        J = (D[i, :, None] * Z).double().numpy()
        expected = reference.ridge(J, R[i].double().numpy(), damping=float(damping[i]))
        tolerance = 1e3 * torch.finfo(dtype).eps
        np.testing.assert_allclose(
            (X[i].double() @ Z.double()).numpy(), expected, rtol=tolerance, atol=tolerance
        )
    assert torch.equal(X[5], torch.zeros_like(X[5]))
    whole = linalg.scaled_gram_solve(Z @ Z.mT, D[[0, 2]], R[[0, 2]], damping=0.0)
    assert torch.equal(whole, X[[0, 2]])


def test_ex_does_not_treat_damping_zero_specially():
    K = torch.ones(3, 3)
    _, info = linalg.scaled_gram_solve_ex(K, torch.ones(1, 3), torch.ones(1, 3), damping=0.0)
    assert info.tolist() == [2]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 20),
    density=st.floats(0.0, 1.0),
    damping=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10**6),
)
def test_scaled_gram_solve_equals_spd_solve_of_the_dense_matrix(n, batch, density, damping, seed):
    Z, D, R = lc.normal(n, n, seed=seed), lc.normal(batch, n, seed=seed + 1), lc.normal(batch, n)
    D = D * (torch.rand(batch, n, generator=lc.generator(seed + 2)) < density)
    K = Z @ Z.mT
    X = linalg.scaled_gram_solve(K, D, R, damping=damping)
    A = D.unsqueeze(-1) * K * D.unsqueeze(-2)
    y = linalg.spd_solve(A, R.unsqueeze(-1), damping=damping).squeeze(-1)
    largest = float(torch.linalg.matrix_norm(A, ord=2).max())
    limit = 100 * n * (largest / damping + 1) * torch.finfo(X.dtype).eps
    assert float((X - D * y).abs().max()) <= limit * float((D * y).abs().max()) + 1e-300
