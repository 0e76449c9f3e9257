"""spd_solve and spd_solve_ex: answers, status, layouts, batches, bits."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import scipy.linalg
import torch
from cases import NOT_SPD, SPD
from torch.utils._python_dispatch import TorchDispatchMode

from backmatch import linalg, reference
from backmatch.errors import NonFiniteError, NotPositiveDefiniteError
from backmatch.linalg import spd

pytestmark = pytest.mark.usefixtures("two_threads")

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("n", lc.SIZES)
def test_spd_solve_sizes(n, dtype):
    A, B = lc.spd(5, n, dtype=dtype, seed=n), lc.normal(5, n, 2, dtype=dtype, seed=n + 1)
    damping = torch.tensor([0.0, 0.1, 0.0, 3.0, 0.5], dtype=dtype)
    X = linalg.spd_solve(A, B, damping=damping)
    shifted = A + damping[:, None, None] * lc.eye_like(A)
    assert X.shape == B.shape
    assert X.dtype == dtype
    assert lc.residual_ratio(shifted, X, B) < lc.RESIDUAL_LIMIT


@dtypes
@pytest.mark.parametrize("k", [0, 1, 2, 3, 15, 40])
@pytest.mark.parametrize("n", [1, 7, 33, 129])
def test_spd_solve_right_hand_sides(n, k, dtype):
    A, B = lc.spd(3, n, dtype=dtype), lc.normal(3, n, k, dtype=dtype, seed=1)
    X, info = linalg.spd_solve_ex(A, B, damping=0.5)
    assert X.shape == (3, n, k)
    assert info.tolist() == [0, 0, 0]
    assert lc.residual_ratio(A + 0.5 * lc.eye_like(A), X, B) < lc.RESIDUAL_LIMIT


@dtypes
@pytest.mark.parametrize("batch", [(), (0,), (1,), (7,), (3, 0, 2), (2, 3, 4), (1000,)])
def test_spd_solve_batches(batch, dtype):
    A, B = lc.spd(*batch, 6, dtype=dtype), lc.normal(*batch, 6, 2, dtype=dtype, seed=1)
    X, info = linalg.spd_solve_ex(A, B)
    assert X.shape == B.shape
    assert info.shape == batch
    assert info.dtype == torch.int32
    assert not info.any()
    assert lc.residual_ratio(A, X, B) < lc.RESIDUAL_LIMIT


@pytest.mark.parametrize("name", SPD)
def test_spd_solve_oracles(name):
    """Both oracles, with the error that the condition number allows."""
    A, B = SPD[name].make()
    X = linalg.spd_solve(torch.from_numpy(A), torch.from_numpy(B)).numpy()
    by_scipy = np.stack(
        [
            scipy.linalg.cho_solve(scipy.linalg.cho_factor(a, lower=True), b)
            for a, b in zip(A, B, strict=True)
        ]
    )
    allowed = 30 * A.shape[-1] * SPD[name].condition * np.finfo(float).eps
    for oracle in (reference.spd_solve(A, B), by_scipy):
        assert np.linalg.norm(X - oracle) <= allowed * np.linalg.norm(oracle)


@pytest.mark.parametrize(
    ("a", "b", "d", "lead"),
    [
        ((), (4,), (), (4,)),
        ((4,), (), (), (4,)),
        ((), (), (3,), (3,)),
        ((3, 1), (1, 2), (), (3, 2)),
        ((2,), (3, 1), (3, 2), (3, 2)),
        ((1,), (5,), (1,), (5,)),
        ((0,), (1,), (), (0,)),
    ],
)
def test_spd_solve_broadcasts(a, b, d, lead):
    A, B = lc.spd(*a, 5), lc.normal(*b, 5, 2, seed=1)
    damping = lc.normal(*d, seed=2).abs()
    X = linalg.spd_solve(A, B, damping=damping)
    assert X.shape == (*lead, 5, 2)
    dense = A + damping[..., None, None] * torch.eye(5, dtype=A.dtype)
    torch.testing.assert_close(X, torch.linalg.solve(dense, B), rtol=1e-10, atol=1e-12)


@dtypes
@pytest.mark.parametrize("n", [5, 33, 65, 129])
@pytest.mark.parametrize("b_layout", lc.LAYOUTS)
@pytest.mark.parametrize("a_layout", lc.LAYOUTS)
def test_spd_solve_layouts_give_equal_bits(a_layout, b_layout, n, dtype):
    A, B = lc.spd(3, n, dtype=dtype), lc.normal(3, n, 4, dtype=dtype, seed=1)
    expected = linalg.spd_solve(A, B, damping=0.25)
    X = linalg.spd_solve(lc.LAYOUTS[a_layout](A), lc.LAYOUTS[b_layout](B), damping=0.25)
    assert X.is_contiguous()
    assert torch.equal(X, expected)


@dtypes
def test_spd_solve_expanded_views_give_equal_bits(dtype):
    A, B = lc.spd(17, dtype=dtype), lc.normal(17, 1, dtype=dtype, seed=1)
    damping = torch.tensor(0.5, dtype=dtype)
    X = linalg.spd_solve(A.expand(6, 17, 17), B.expand(6, 17, 3), damping=damping.expand(6))
    assert torch.equal(X, linalg.spd_solve(A, B, damping=0.5).expand(6, 17, 3))


@pytest.mark.parametrize("n", [1, 65, spd.KERNEL_SIDE + 1])
def test_spd_solve_factors_a_repeated_matrix_once(n, monkeypatch):
    """One matrix, a batch of right-hand sides, on both sides of the hand-over to the library."""
    A, B = lc.spd(n), lc.normal(2, 3, n, 2, seed=1)
    columns = []
    solve_shared = spd.solve_shared

    def counted(A, B, damping):
        columns.append(B.shape[-1])
        return solve_shared(A, B, damping)

    monkeypatch.setattr(spd, "solve_shared", counted)
    X = linalg.spd_solve(A, B, damping=0.5)
    assert columns == [12]
    torch.testing.assert_close(X, torch.linalg.solve(A + 0.5 * lc.eye_like(A), B))
    _, info = linalg.spd_solve_ex(-A, B)
    assert info.tolist() == [[1] * 3] * 2


@pytest.mark.parametrize("n", [3, spd.KERNEL_SIDE + 1])
def test_a_repeated_bad_matrix_fails_every_system(n):
    A = lc.eye_like(lc.spd(n))
    A[2, 2] = torch.nan
    X, info = linalg.spd_solve_ex(A, torch.ones(4, n, 1).double())
    assert info.tolist() == [3] * 4
    assert X.isnan().all()


def test_operators_are_seen_by_transforms_and_modes():
    """Where somebody watches, the short way past the dispatcher is not taken."""
    A, B = lc.spd(3, 4), lc.normal(3, 4, 1, seed=1)
    expected = linalg.spd_solve(A, B)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.equal(linalg.spd_solve(A, B), expected)
    assert torch.ops.backmatch.spd_solve.default in seen
    with pytest.raises(
        RuntimeError, match="functorch transforms"
    ):  # torch's word on such operators
        torch.func.grad(lambda B: linalg.spd_solve(A, B).sum())(B)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_function_keeps_the_operator():
    A, B = lc.spd(3), lc.normal(3, 1, seed=1)
    damping = torch.tensor(0.5).double()
    traced = torch.jit.trace(
        lambda A, B: linalg.spd_solve(A, B, damping=damping), (A, B), check_trace=False
    )
    torch.testing.assert_close(traced(A, 3 * B), 3 * linalg.spd_solve(A, B, damping=0.5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_is_refused_not_dropped():
    A, B = lc.spd(3), lc.normal(3, 1, seed=1)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda A: linalg.spd_solve(A, B), (A,), (torch.ones_like(A),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(B, torch.ones_like(B))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linalg.spd_solve(A, dual)
        assert torch.equal(linalg.spd_solve(A, B), linalg.spd_solve(A, B))


@pytest.mark.parametrize("n", [1, 5, 33, 64, 130])
def test_spd_solve_reads_the_lower_triangle_only_and_writes_nothing(n):
    A, B = lc.spd(4, n), lc.normal(4, n, 2, seed=1)
    damping = torch.full((4,), 0.5, dtype=A.dtype)
    lower = A.tril() + torch.full_like(A, torch.nan).triu(1)
    before = [value.clone() for value in (lower, B, damping)]
    X = linalg.spd_solve(lower, B, damping=damping)
    assert torch.equal(X, linalg.spd_solve(A, B, damping=0.5))
    for value, copy in zip((lower, B, damping), before, strict=True):
        assert torch.equal(torch.nan_to_num(value, 7.0), torch.nan_to_num(copy, 7.0))


@dtypes
@pytest.mark.parametrize("n", [3, 8, 17, 40, 97, 200])
def test_info_is_lapacks(n, dtype):
    """Indefinite matrices that fail at a chosen pivot."""
    potrf = scipy.linalg.lapack.spotrf if dtype == torch.float32 else scipy.linalg.lapack.dpotrf
    pivots = sorted({1, 2, n // 2 + 1, n})
    A = lc.spd(len(pivots) + 1, n, condition=10.0, dtype=dtype, seed=n)
    for i, pivot in enumerate(pivots):
        A[i, pivot - 1, pivot - 1] -= 2.0
    X, info = linalg.spd_solve_ex(A, lc.normal(len(A), n, 1, dtype=dtype, seed=1))
    assert info.tolist() == [*pivots, 0]
    assert info.tolist() == [potrf(a.numpy(), lower=1)[1] for a in A]
    assert X[:-1].isnan().all()
    assert X[-1].isfinite().all()


@pytest.mark.parametrize("name", NOT_SPD)
def test_catalogue_of_not_spd(name):
    A, pivot = NOT_SPD[name]
    X, info = linalg.spd_solve_ex(torch.from_numpy(A), torch.ones(3, 1, dtype=torch.float64))
    assert int(info) == pivot
    assert X.isnan().all()
    with pytest.raises(NotPositiveDefiniteError) as caught:
        linalg.spd_solve(torch.from_numpy(A), torch.ones(3, 1, dtype=torch.float64))
    assert (caught.value.indices, caught.value.pivots) == ([0], [pivot])


@pytest.mark.parametrize("k", [0, 1])
def test_error_names_every_failed_system(k):
    A = torch.eye(3, dtype=torch.float64).repeat(2, 3, 1, 1)
    A[0, 1, 2, 2] = -1.0
    A[1, 2, 0, 0] = 0.0
    with pytest.raises(NotPositiveDefiniteError, match=r"2 of 6 .* 1 \(pivot 3\), 5 \(pivot 1\)"):
        linalg.spd_solve(A, torch.ones(3, k, dtype=torch.float64))


@dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [1, 6, 33, 65, 130])
def test_nonfinite_matrices_never_pass_and_leave_neighbours_alone(n, bad, dtype):
    A, B = lc.spd(20, n, dtype=dtype), lc.normal(20, n, 2, dtype=dtype, seed=1)
    good = linalg.spd_solve(A, B)
    for i, (row, col) in ((3, (n - 1, 0)), (4, (n - 1, n - 1)), (18, (n // 2, n // 2))):
        A[i, row, col] = bad
    X, info = linalg.spd_solve_ex(A, B)
    failed = torch.zeros(20, dtype=torch.bool)
    failed[[3, 4, 18]] = True
    assert torch.equal(info != 0, failed)
    assert X[failed].isnan().all()
    assert torch.equal(X[~failed], good[~failed])
    with pytest.raises(NonFiniteError, match="A has 3 non-finite"):
        linalg.spd_solve(A, B)


def test_nonfinite_right_hand_side_and_overflow():
    A, B = lc.spd(4, 5), lc.normal(4, 5, 1, seed=1)
    B[2, 1, 0] = torch.inf
    X, info = linalg.spd_solve_ex(A, B)
    assert not info.any()
    assert X[[0, 1, 3]].isfinite().all()
    with pytest.raises(NonFiniteError, match=r"B has 1 non-finite .* of 20"):
        linalg.spd_solve(A, B)
    tiny = torch.full((1, 1), 1e-30)
    with pytest.raises(NonFiniteError, match="result"):
        linalg.spd_solve(tiny, torch.full((1, 1), 1e30))


def test_large_finite_results_are_no_failure():
    """Their sum overflows, they do not."""
    X = linalg.spd_solve(torch.eye(2), torch.full((2, 1), 3e38))
    assert X.isfinite().all()


@dtypes
@pytest.mark.parametrize("n", [4, 33, 65, 140])
def test_bits_do_not_depend_on_threads_split_or_order(n, dtype):
    A, B = lc.spd(37, n, dtype=dtype), lc.normal(37, n, 2, dtype=dtype, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linalg.spd_solve(A, B, damping=0.1)
        torch.set_num_threads(3)
        three = linalg.spd_solve(A, B, damping=0.1)
    finally:
        torch.set_num_threads(threads)
    split = torch.cat([linalg.spd_solve(a, b, damping=0.1) for a, b in zip(A, B, strict=True)])
    order = torch.randperm(37, generator=lc.generator(0))
    shuffled = linalg.spd_solve(A[order], B[order], damping=0.1)
    assert torch.equal(one, three)
    assert torch.equal(one, split.view_as(one))
    assert torch.equal(one[order], shuffled)
