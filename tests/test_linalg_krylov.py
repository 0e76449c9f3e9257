"""cg, scaled_gram_cg and the loop behind them: stopping rules, per system, both routes."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import torch
from cases import SPD
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch import linalg, reference
from backmatch.errors import NonFiniteError, NotPositiveDefiniteError
from backmatch.linalg.krylov import conjugate_gradient

pytestmark = pytest.mark.usefixtures("two_threads")

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)


def as_tensor(A):
    return A


def as_callable(A):
    """The same operator by the generic loop."""
    return lambda P: A @ P


routes = pytest.mark.parametrize("route", [as_tensor, as_callable])


def relative_residual(A, X, B):
    R = torch.linalg.vector_norm(A.double() @ X.double() - B.double(), dim=-2)
    return R / torch.linalg.vector_norm(B.double(), dim=-2)


@routes
@dtypes
@pytest.mark.parametrize("n", [1, 2, 5, 8, 17, 33, 65, 129])
def test_cg_reaches_its_tolerance(n, route, dtype):
    A, B = lc.spd(3, n, dtype=dtype, seed=n), lc.normal(3, n, 2, dtype=dtype, seed=1)
    result = linalg.cg(route(A), B, damping=0.1)
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    shifted = A + 0.1 * lc.eye_like(A)
    rounding = 10 * torch.finfo(dtype).eps * 11
    assert result.converged.all()
    assert result.x.dtype == result.residual.dtype == dtype
    assert result.iterations.dtype == torch.int64
    assert (relative_residual(shifted, result.x, B) <= rtol + rounding).all()
    torch.testing.assert_close(
        result.residual.double(),
        relative_residual(shifted, result.x, B),
        rtol=1e-3,
        atol=rounding,
    )


@routes
@pytest.mark.parametrize("name", SPD)
def test_cg_oracles(name, route):
    case = SPD[name]
    A, B = case.make()
    result = linalg.cg(route(torch.from_numpy(A)), torch.from_numpy(B), rtol=1e-12)
    oracle = reference.cg(A, B, rtol=1e-12)
    np.testing.assert_array_equal(result.converged.numpy(), oracle.converged)
    error = np.abs(result.x.numpy() - np.linalg.solve(A, B)).max()
    if oracle.converged.all():
        assert error <= 1e-11 * case.condition * np.abs(B).max() * case.n
        difference = np.abs(result.iterations.numpy() - oracle.iterations)
        assert (difference <= 2 + oracle.iterations // 5).all()


@routes
def test_rtol_zero_takes_exactly_max_steps(route):
    A, B = lc.spd(2, 20, condition=1e4), lc.normal(2, 20, 3, seed=1)
    for steps in (1, 2, 7):
        result = linalg.cg(route(A), B, damping=0.01, rtol=0.0, max_steps=steps)
        oracle = reference.cg(A.numpy(), B.numpy(), damping=0.01, rtol=0.0, max_steps=steps)
        assert (result.iterations == steps).all()
        assert not result.converged.any()
        np.testing.assert_allclose(result.x.numpy(), oracle.x, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(result.residual.numpy(), oracle.residual, rtol=1e-8)


@routes
def test_every_system_stops_on_its_own(route):
    """Easy and hard neighbours: each has the iterations and the answer it has alone."""
    n = 30
    A = torch.stack([torch.eye(n).double(), lc.spd(n, condition=1e5), lc.spd(n, condition=10.0)])
    B = lc.normal(3, n, 2, seed=1)
    B[2, :, 0] = 0
    together = linalg.cg(route(A), B)
    assert together.iterations[0].tolist() == [1, 1]
    assert together.iterations[2, 0] == 0
    assert together.iterations[1].min() > together.iterations[2, 1] > 1
    assert torch.equal(together.x[2, :, 0], torch.zeros(n).double())
    for j in range(3):
        alone = linalg.cg(route(A[j : j + 1]), B[j : j + 1])
        assert torch.equal(alone.iterations[0], together.iterations[j])
        torch.testing.assert_close(alone.x[0], together.x[j], rtol=1e-8, atol=1e-10)


def test_frozen_systems_do_not_change_another_bit():
    """One more step of a hard system leaves a solved neighbour's bits alone."""
    values = torch.logspace(0, -6, 25).double()
    scale = torch.stack([torch.ones(25).double(), values, values.sqrt()]).unsqueeze(-1)
    B = lc.normal(3, 25, 1)
    runs = [
        conjugate_gradient(lambda P: scale * P, B, rtol=1e-8, max_steps=cap) for cap in (40, 41, 60)
    ]
    assert runs[0].iterations[:, 0].tolist() == [1, 40, runs[2].iterations[2, 0].item()]
    assert runs[0].converged[:, 0].tolist() == [True, False, True]
    for run in runs[1:]:
        assert torch.equal(run.x[[0, 2]], runs[0].x[[0, 2]])


@routes
def test_breakdown_stops_that_system_only(route):
    """p^T A p <= 0 at the first step: x stays at the start, nothing is called converged."""
    A = torch.stack([torch.eye(4), -torch.eye(4), torch.zeros(4, 4)]).double()
    B = torch.ones(3, 4, 1).double()
    result = linalg.cg(route(A), B)
    assert result.iterations[:, 0].tolist() == [1, 0, 0]
    assert result.converged[:, 0].tolist() == [True, False, False]
    assert result.residual[:, 0].tolist() == [0, 1, 1]
    assert torch.equal(result.x[1:], torch.zeros(2, 4, 1).double())


@routes
def test_singular_but_consistent(route):
    J = lc.normal(2, 4, 9)
    A, exact = J.mT @ J, J.mT @ lc.normal(2, 4, 1, seed=1)
    result = linalg.cg(route(A), A @ exact, rtol=1e-11)
    assert result.converged.all()
    torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-8)  # it never leaves range(A)


@routes
def test_start(route):
    A, B = lc.spd(3, 12), lc.normal(3, 12, 2, seed=1)
    B[0, :, 1] = 0
    exact = torch.linalg.solve(A, B)
    start = exact + 1e-3 * lc.normal(3, 12, 2, seed=2)
    before = start.clone()
    warm, cold = linalg.cg(route(A), B, x0=start), linalg.cg(route(A), B)
    assert torch.equal(start, before)
    assert warm.converged.all()
    assert warm.iterations.sum() < cold.iterations.sum()
    assert torch.equal(warm.x[0, :, 1], torch.zeros(12).double())
    assert warm.iterations[0, 1] == 0
    torch.testing.assert_close(warm.x, exact, rtol=1e-7, atol=1e-9)
    solved = linalg.cg(route(A), B, x0=exact)
    assert not solved.iterations.any()
    assert solved.converged.all()
    assert torch.equal(solved.x, torch.where((B == 0).all(-2, keepdim=True), 0, exact))


@routes
@dtypes
@pytest.mark.parametrize("exponent", [-30, -15, 15, 30])
def test_tiny_and_huge_right_hand_sides(exponent, route, dtype):
    """Squares of their entries leave the range of float32; the answer only scales."""
    A, B = lc.spd(2, 9, dtype=dtype), lc.normal(2, 9, 2, dtype=dtype, seed=1)
    plain = linalg.cg(route(A), B, damping=0.5)
    scaled = linalg.cg(route(A), B * 2.0**exponent * 2.0**exponent, damping=0.5)
    assert scaled.converged.all()
    assert torch.equal(scaled.iterations, plain.iterations)
    torch.testing.assert_close(
        scaled.x * 2.0**-exponent * 2.0**-exponent, plain.x, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("a", "b", "d", "lead"),
    [((), (), (), ()), ((), (4,), (), (4,)), ((3, 1), (2,), (3, 2), (3, 2)), ((0,), (), (), (0,))],
)
@pytest.mark.parametrize(("n", "k"), [(6, 2), (6, 0), (0, 2)])
def test_cg_batches(a, b, d, lead, n, k):
    A, B = lc.spd(*a, n), lc.normal(*b, n, k, seed=1)
    damping = lc.normal(*d, seed=2).abs() + 0.1
    result = linalg.cg(A, B, damping=damping)
    assert result.x.shape == (*lead, n, k)
    for status in result[1:]:
        assert status.shape == (*lead, k)
    dense = A + damping[..., None, None] * lc.eye_like(A)
    torch.testing.assert_close(
        result.x, torch.linalg.solve(dense, B).expand(*lead, n, k), rtol=1e-7, atol=1e-9
    )
    assert result.converged.all()


@pytest.mark.parametrize("layout", lc.LAYOUTS)
def test_cg_layouts_give_equal_bits(layout):
    A, B, view = lc.spd(3, 17), lc.normal(3, 17, 4, seed=1), lc.LAYOUTS[layout]
    for mine, plain in zip(linalg.cg(view(A), view(B)), linalg.cg(A, B), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("n", [5, 64])
def test_cg_bits_do_not_depend_on_threads_or_split(n):
    A, B = lc.spd(23, n), lc.normal(23, n, 2, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linalg.cg(A, B)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(one, linalg.cg(A, B), strict=True))
    for j in (0, 11, 22):
        single = linalg.cg(A[j], B[j, :, 1:])
        assert torch.equal(single.x, one.x[j, :, 1:])


def test_preconditioner():
    """Jacobi undoes a bad diagonal scaling; the exact inverse needs one step."""
    scale = torch.logspace(0, 4, 40).double()
    A = scale[:, None] * lc.spd(2, 40, condition=5.0) * scale
    B = lc.normal(2, 40, 1, seed=1)
    diagonal = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    plain = linalg.cg(A, B, rtol=1e-8)
    jacobi = linalg.cg(A, B, rtol=1e-8, preconditioner=lambda V: V / diagonal)
    assert jacobi.converged.all()
    assert jacobi.iterations.max() < plain.iterations.min() / 2
    inverse = torch.linalg.inv(A)
    exact = linalg.cg(A, B, rtol=1e-8, preconditioner=lambda V: inverse @ V)
    assert exact.iterations.max() <= 2
    bad = linalg.cg(A, B, preconditioner=lambda V: -V)
    assert not bad.converged.any()
    assert not bad.iterations.any()


def test_cg_nonfinite():
    A, B = lc.spd(3, 5), lc.normal(3, 5, 2, seed=1)
    B[1, 2, 1] = torch.nan
    for operator in (A, lambda P: A @ P):
        with pytest.raises(NonFiniteError, match="B has 1 non-finite"):
            linalg.cg(operator, B)
    B[1, 2, 1] = 0.0
    with pytest.raises(NonFiniteError, match="x0 has 10 non-finite"):
        linalg.cg(A, B, x0=torch.full((5, 2), torch.inf).double())
    with pytest.raises(NonFiniteError, match="result"):
        linalg.cg(lambda P: P * torch.nan, B)
    A[2, 0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="A has 1 non-finite"):
        linalg.cg(A, B)


def test_loop_leaves_a_nonfinite_system_to_itself():
    B = lc.normal(3, 5, 1)
    B[1, 0, 0] = torch.nan
    result = conjugate_gradient(lambda P: 2 * P, B, rtol=1e-8, max_steps=10)
    assert result.converged[:, 0].tolist() == [True, False, True]
    assert torch.equal(result.x[[0, 2]], B[[0, 2]] / 2)


def family(batch, n, dtype=torch.float64):
    Z = lc.normal(n, n, dtype=dtype)
    D, R = lc.relu_like(batch, n, dtype=dtype, seed=1), lc.normal(batch, n, dtype=dtype, seed=2)
    return Z @ Z.mT / n, D, R, lc.normal(batch, dtype=dtype, seed=3).abs() + 0.05


@dtypes
@pytest.mark.parametrize("preconditioner", [None, "shared", lambda V: 0.5 * V])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (6, 5), (20, 33), (3, 129)])
def test_scaled_gram_cg_is_scaled_gram_solve(batch, n, preconditioner, dtype):
    K, D, R, damping = family(batch, n, dtype)
    result = linalg.scaled_gram_cg(K, D, R, damping=damping, preconditioner=preconditioner)
    assert result.x.shape == (batch, n)
    assert all(status.shape == (batch,) for status in result[1:])
    assert result.converged.all()
    exact = linalg.scaled_gram_solve(K, D, R, damping=damping)
    tolerance = 2e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(result.x, exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(result.x[D == 0], torch.zeros_like(result.x[D == 0]))


def test_shared_preconditioner_helps_when_the_slopes_are_similar():
    K = lc.spd(40, condition=1e6)
    D = 1 + 0.01 * lc.normal(12, 40, seed=1)
    R = lc.normal(12, 40, seed=2)
    plain = linalg.scaled_gram_cg(K, D, R, damping=1e-5)
    shared = linalg.scaled_gram_cg(K, D, R, damping=1e-5, preconditioner="shared")
    assert shared.converged.all()
    assert shared.iterations.max() < plain.iterations.min() / 3


@pytest.mark.parametrize("preconditioner", [None, "shared"])
@pytest.mark.parametrize(
    ("k", "d", "r", "lead"),
    [
        ((), (), (), ()),
        ((), (3, 1), (4,), (3, 4)),
        ((2,), (4,), (2, 4), (2, 4)),
        ((), (0,), (), (0,)),
    ],
)
def test_scaled_gram_cg_broadcasts(k, d, r, lead, preconditioner):
    Z = lc.normal(*k, 5, 7)
    K, D, R = Z @ Z.mT, lc.normal(*d, 5, seed=1), lc.normal(*r, 5, seed=2)
    result = linalg.scaled_gram_cg(K, D, R, damping=1.0, preconditioner=preconditioner)
    assert result.iterations.shape == lead
    exact = linalg.scaled_gram_solve(K, D, R, damping=1.0)
    torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-8)


def test_scaled_gram_cg_failures():
    K, D, R, _ = family(4, 6)
    with pytest.raises(NotPositiveDefiniteError, match="shared preconditioner"):
        linalg.scaled_gram_cg(-K, D, R, damping=0.0, preconditioner="shared")
    R[2, 1] = torch.inf
    with pytest.raises(NonFiniteError, match="R has 1 non-finite"):
        linalg.scaled_gram_cg(K, D, R, damping=0.5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 30),
    k=st.integers(1, 3),
    batch=st.integers(1, 5),
    exponent=st.floats(0.0, 4.0),
    seed=st.integers(0, 10**6),
)
def test_cg_is_cholesky(n, k, batch, exponent, seed):
    condition = 10.0**exponent
    A, B = lc.spd(batch, n, condition=condition, seed=seed), lc.normal(batch, n, k, seed=seed + 1)
    exact = linalg.spd_solve(A, B)
    for operator in (A, lambda P: A @ P):
        result = linalg.cg(operator, B, rtol=1e-12, max_steps=50 * n)
        assert result.converged.all()
        error = torch.linalg.vector_norm(result.x - exact, dim=-2)
        allowed = 1e-11 * condition * torch.linalg.vector_norm(exact, dim=-2)
        assert (error <= allowed).all()
