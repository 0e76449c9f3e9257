"""min_norm_solve: rank decisions, both oracles, batches."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import torch
from cases import SINGULAR, SPD

from backmatch import linalg, reference
from backmatch.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("name", [*SPD, *SINGULAR])
def test_min_norm_solve_oracles(name):
    case = (SPD | SINGULAR)[name]
    A, B = case.make()
    X = linalg.min_norm_solve(torch.from_numpy(A), torch.from_numpy(B)).numpy()
    cut = max(case.n, 32) * np.finfo(float).eps
    pinv = np.linalg.pinv(A, rcond=cut, hermitian=True) @ B
    allowed = 100 * case.n * case.condition * np.finfo(float).eps * np.linalg.norm(B)
    for oracle in (reference.min_norm_solve(A, B), pinv):
        assert np.linalg.norm(X - oracle) <= allowed * max(1.0, case.condition)


@pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 7), (7, 3), (16, 33), (64, 65), (5, 129)])
def test_rounding_of_a_gram_matrix_is_cut(m, n, dtype):
    """J^T J of a wide J has n - m eigenvalues that are rounding noise."""
    J, r = lc.normal(m, n, dtype=dtype, seed=m), lc.normal(m, 2, dtype=dtype, seed=n)
    X = linalg.min_norm_solve(J.mT @ J, J.mT @ r)
    exact = np.linalg.lstsq(J.double().numpy(), r.double().numpy(), rcond=None)[0]
    condition = float(torch.linalg.cond(J.double())) ** 2
    error = np.linalg.norm(X.double().numpy() - exact)
    assert error <= 30 * condition * torch.finfo(dtype).eps * np.linalg.norm(exact)


def test_rcond_cuts_relative_to_the_largest_eigenvalue_of_each_matrix():
    A = torch.stack([torch.diag(torch.tensor(v).double()) for v in ([1.0, 0.05], [100.0, 11.0])])
    X = linalg.min_norm_solve(A, torch.ones(2, 2, 1, dtype=A.dtype), rcond=0.1)
    torch.testing.assert_close(X.squeeze(-1), torch.tensor([[1, 0], [0.01, 1 / 11]]).double())
    X = linalg.min_norm_solve(A, torch.ones(2, 2, 1, dtype=A.dtype), rcond=0.11)
    assert X[1, 1, 0] == 0  # equal to the cut counts as zero


@pytest.mark.parametrize(
    ("a", "b", "lead"),
    [
        ((), (), ()),
        ((), (4,), (4,)),
        ((3, 1), (2,), (3, 2)),
        ((0,), (), (0,)),
        ((), (2, 3), (2, 3)),
    ],
)
@pytest.mark.parametrize(("n", "k"), [(5, 2), (5, 0), (0, 2), (1, 1)])
def test_min_norm_solve_batches(a, b, lead, n, k):
    A, B = lc.spd(*a, n), lc.normal(*b, n, k, seed=1)
    X = linalg.min_norm_solve(A, B)
    assert X.shape == (*lead, n, k)
    expected = np.broadcast_to(reference.min_norm_solve(A.numpy(), B.numpy()), X.shape)
    np.testing.assert_allclose(X.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", lc.LAYOUTS)
def test_min_norm_solve_layouts(layout):
    J, B = lc.normal(3, 4, 6), lc.normal(3, 6, 2, seed=1)
    A = J.mT @ J
    lower = A.tril() + torch.full_like(A, torch.nan).triu(1)
    X = linalg.min_norm_solve(lc.LAYOUTS[layout](lower), lc.LAYOUTS[layout](B))
    torch.testing.assert_close(X, linalg.min_norm_solve(A, B), rtol=1e-12, atol=1e-12)


def test_min_norm_solve_refuses_indefinite_and_nonfinite():
    A = torch.diag(torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match=r"A must be positive semi-definite, got .* -0.5 at batch"):
        linalg.min_norm_solve(A, torch.ones(2, 1))
    A[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="A has 1 non-finite"):
        linalg.min_norm_solve(A, torch.ones(2, 1))
    with pytest.raises(NonFiniteError, match="B has 1 non-finite"):
        linalg.min_norm_solve(torch.eye(2), torch.tensor([[1.0], [torch.inf]]))
