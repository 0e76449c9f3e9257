"""The native CPU kernels at every SIMD level: results, bits, info."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from native_calls import (
    DTYPES,
    SIZES,
    backward_error,
    cg,
    damped,
    name,
    random_slopes,
    random_spd,
    random_tensor,
    scaled_gram_solve,
    scipy_solve,
    spd_solve,
)

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", SIZES)
def test_spd_solve_is_backward_stable(level: str, n: int, dtype: torch.dtype) -> None:
    batch = 19
    A, damping = random_spd(batch, n, dtype), random_tensor(batch, dtype=dtype).abs()
    reference = damped(A, damping)
    upper = A.clone()
    upper.masked_fill_(torch.ones(n, n).triu(1).bool(), float("nan"))  # must not be read
    for k in (0, 1, 3, 5, 20) if n < 100 else (1, 20):
        B = random_tensor(batch, n, k, dtype=dtype)
        X, info = spd_solve(upper, B, damping)
        assert (info == 0).all()
        if n and k:
            assert backward_error(reference, X, B.double().numpy(), dtype) < 2
    if n:
        want = scipy_solve(reference, B.double().numpy())
        eps = torch.finfo(dtype).eps
        np.testing.assert_allclose(X.double(), want, rtol=0, atol=200 * eps * abs(want).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_order_in_packs_and_alone(level: str, dtype: torch.dtype) -> None:
    """Block rows and panels of every length: the same bits from both layouts, at any k."""
    for n in (*range(1, 71), 127, 128, 159, 160, 161):
        A, B = random_spd(17, n, dtype), random_tensor(17, n, 2, dtype=dtype)
        damping = random_tensor(17, dtype=dtype).abs()
        X, _ = spd_solve(A, B, damping)
        assert backward_error(damped(A, damping), X, B.double().numpy(), dtype) < 2
        assert torch.equal(spd_solve(A[16:], B[16:], damping[16:])[0], X[16:])
        for part in (slice(0, 17), slice(16, 17)):
            one, _ = spd_solve(A[part], B[part, :, 1:], damping[part])
            assert torch.equal(one, X[part, :, 1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [3, 8, 17, 40, 130])
def test_spd_solve_takes_any_strides(level: str, n: int, dtype: torch.dtype) -> None:
    batch, k = 19, 3
    A, B = random_spd(batch, n, dtype), random_tensor(batch, n, k, dtype=dtype)
    damping = torch.full((1,), 0.25, dtype=dtype)
    X, _ = spd_solve(A, B, damping)
    wide = torch.zeros(2 * batch, 2 * n, 3 * n, dtype=dtype)[::2, ::2, ::3]
    wide.copy_(A)
    columns = B.mT.contiguous().mT
    for matrix in (wide, A.mT.contiguous().mT, A.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        for rhs in (B, columns):
            assert torch.equal(spd_solve(matrix, rhs, damping)[0], X)
    shared, _ = spd_solve(A[:1].expand(batch, n, n), B, damping)
    assert torch.equal(shared, spd_solve(A[:1].repeat(batch, 1, 1), B, damping)[0])
    same, _ = spd_solve(A, B[:1, :, :1].expand(batch, n, k), damping.expand(batch))
    assert torch.equal(same, spd_solve(A, B[:1, :, :1].repeat(batch, 1, k), damping)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [1, 4, 8, 15, 33, 64, 97, 129, 257])
def test_spd_solve_bits_ignore_batch_and_threads(level: str, n: int, dtype: torch.dtype) -> None:
    """Alone, in a rest of the batch or in a pack, on one thread or two: the same bits."""
    batch, k = 75, 2
    A, B = random_spd(batch, n, dtype), random_tensor(batch, n, k, dtype=dtype)
    damping = random_tensor(batch, dtype=dtype).abs()
    torch.set_num_threads(2)
    X, _ = spd_solve(A, B, damping)
    torch.set_num_threads(1)
    assert torch.equal(spd_solve(A, B, damping)[0], X)
    for start, stop in ((0, 1), (1, 3), (3, 40), (40, 75), (74, 75)):
        part = slice(start, stop)
        assert torch.equal(spd_solve(A[part], B[part], damping[part])[0], X[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [2, 5, 16, 33, 70, 260])
def test_spd_solve_info_is_that_of_lapack(level: str, n: int, dtype: torch.dtype) -> None:
    batch = 37
    A, B = random_spd(batch, n, dtype), random_tensor(batch, n, 2, dtype=dtype)
    damping = torch.zeros(1, dtype=dtype)
    clean, _ = spd_solve(A, B, damping)
    bad = {0: 0, 5: n // 2, 18: n - 1, 36: n // 3}
    for system, pivot in bad.items():
        A[system, pivot, pivot] = -1.0
    potrf = scipy.linalg.get_lapack_funcs("potrf", dtype=np.dtype(name(dtype)))
    want = [potrf(a.numpy(), lower=1)[1] for a in A]
    X, info = spd_solve(A, B, damping)
    assert info.tolist() == want
    assert {j for j, value in enumerate(want) if value} == set(bad)
    for system in range(batch):
        if system in bad:
            assert X[system].isnan().all()
        else:
            assert torch.equal(X[system], clean[system])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("n", [6, 33, 100])
def test_non_finite_matrices_never_pass(
    level: str, n: int, value: float, dtype: torch.dtype
) -> None:
    for batch in (1, 20):
        A, B = random_spd(batch, n, dtype), random_tensor(batch, n, 1, dtype=dtype)
        damping = torch.zeros(batch, dtype=dtype)
        clean, _ = spd_solve(A, B, damping)
        for row, column in ((0, 0), (n - 1, 0), (n // 2, n // 3), (n - 1, n - 1)):
            broken = A.clone()
            broken[-1, row, column] = value
            X, info = spd_solve(broken, B, damping)
            assert 0 < info[-1] <= n
            assert X[-1].isnan().all()
            assert torch.equal(X[:-1], clean[:-1])
        damping[-1] = value
        assert spd_solve(A, B, damping)[1][-1] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", SIZES)
def test_scaled_gram_solve_matches_scipy(level: str, n: int, dtype: torch.dtype) -> None:
    batch = 37
    K, D = random_spd(1, n, dtype)[0], random_slopes(batch, n, dtype)
    R, damping = random_tensor(batch, n, dtype=dtype), random_tensor(batch, dtype=dtype).abs() + 0.1
    lower = K.masked_fill(torch.ones(n, n).triu(1).bool(), float("nan"))
    X, info = scaled_gram_solve(lower, D, R, damping)
    assert (info == 0).all()
    assert (X[D == 0] == 0).all()
    if n:
        slopes = D.double().numpy()
        A = slopes[:, :, None] * K.double().numpy() * slopes[:, None, :]
        y = scipy_solve(A + damping.double().numpy()[:, None, None] * np.eye(n), R.double().numpy())
        # the condition number is at most about |K| max(D)^2 / 0.1
        atol = 2e3 * torch.finfo(dtype).eps * abs(slopes * y).max()
        np.testing.assert_allclose(X.double(), slopes * y, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_scaled_gram_solve_cuts_out_any_rows(level: str, dtype: torch.dtype) -> None:
    """Few, many or all rows active, at the ends of vectors or inside: as the small dense systems.

    Rows of K that a system leaves out may hold NaN.
    """
    batch = 18
    for n in (*range(1, 71), 129):
        K, R = random_spd(1, n, dtype)[0], random_tensor(batch, n, dtype=dtype)
        chance = torch.rand(batch, n, generator=torch.Generator().manual_seed(n))
        D = (chance < torch.linspace(0, 1.2, batch)[:, None]).to(dtype) * 1.5
        damping = torch.full((1,), 0.5, dtype=dtype)
        X, info = scaled_gram_solve(K, D, R, damping)
        assert (info == 0).all()
        for system in range(batch):
            rows = D[system].nonzero().flatten()
            small = 2.25 * K[rows][:, rows], R[system, rows, None]
            want = 1.5 * spd_solve(small[0][None], small[1][None], damping)[0][0, :, 0]
            # K enters as (1.5 K) 1.5 there, as 2.25 K here
            torch.testing.assert_close(X[system, rows], want, rtol=1e-4, atol=1e-5)
            broken = K.clone()
            out = (D[system] == 0).nonzero().flatten()
            broken[out] = broken[:, out] = float("nan")
            alone = D[system : system + 1], R[system : system + 1]
            assert torch.equal(scaled_gram_solve(broken, *alone, damping)[0][0], X[system])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [1, 7, 33, 64, 130, 260])
def test_scaled_gram_solve_bits_ignore_batch_threads_and_strides(
    level: str, n: int, dtype: torch.dtype
) -> None:
    batch = 70
    K, D = random_spd(1, n, dtype)[0], random_slopes(batch, n, dtype)
    R, damping = random_tensor(batch, n, dtype=dtype), random_tensor(batch, dtype=dtype).abs() + 0.1
    torch.set_num_threads(2)
    X, _ = scaled_gram_solve(K, D, R, damping)
    torch.set_num_threads(1)
    assert torch.equal(scaled_gram_solve(K, D, R, damping)[0], X)
    for start, stop in ((0, 1), (1, 3), (3, 40), (40, 70), (69, 70)):
        part = slice(start, stop)
        assert torch.equal(scaled_gram_solve(K, D[part], R[part], damping[part])[0], X[part])
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(4))
    shuffled, _ = scaled_gram_solve(K, D[order], R[order], damping[order])
    assert torch.equal(shuffled, X[order])
    strided = torch.zeros(n, 2 * n, dtype=dtype)[:, ::2].copy_(K)
    columns, _ = scaled_gram_solve(strided, D.T.contiguous().T, R.T.contiguous().T, damping)
    assert torch.equal(columns, X)
    rows, _ = scaled_gram_solve(K, D[3:4].expand(batch, n), R, damping)
    assert torch.equal(rows, scaled_gram_solve(K, D[3:4].repeat(batch, 1), R, damping)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [5, 40, 150])
def test_scaled_gram_solve_info_counts_all_rows(level: str, n: int, dtype: torch.dtype) -> None:
    """K has one bad diagonal entry: systems that leave that row out are not touched by it."""
    batch, bad = 50, 3
    K = torch.eye(n, dtype=dtype)
    K[bad, bad] = -1.0
    D, R = random_slopes(batch, n, dtype), random_tensor(batch, n, dtype=dtype)
    D[1, 0], D[1, bad], D[2, bad] = 0.0, 1.0, float("nan")
    damping = torch.zeros(1, dtype=dtype)
    X, info = scaled_gram_solve(K, D, R, damping)
    active = D[:, bad] != 0
    assert active[1]
    assert not active.all()
    assert (info == torch.where(active, bad + 1, 0)).all()
    assert X[active].isnan().all()
    for system in (~active).nonzero().flatten().tolist():
        rows = D[system] != 0
        want = torch.where(rows, R[system] / D[system], 0.0)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(X[system], want, rtol=8 * eps, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 65, 129])
def test_cg_reaches_the_solution(level: str, n: int, dtype: torch.dtype) -> None:
    batch, k = 6, 3
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    A, B = random_spd(batch, n, dtype), random_tensor(batch, n, k, dtype=dtype)
    B[1, :, 2] = 0.0
    damping = random_tensor(batch, dtype=dtype).abs()
    x0 = random_tensor(batch, n, k, dtype=dtype, seed=5)
    reference = damped(A, damping)
    for start in (None, x0):
        X, iterations, residual, converged = cg(A, B, damping, rtol, 10 * n, start)
        assert converged.all()
        assert (residual <= rtol).all()
        want = scipy_solve(reference, B.double().numpy())
        error = np.linalg.norm(X.double().numpy() - want, axis=(1, 2))
        assert (error <= 50 * rtol * np.linalg.norm(want, axis=(1, 2))).all()
        assert (X[1, :, 2] == 0).all()
        assert iterations[1, 2] == 0
        again = cg(A, B, damping, rtol, 10 * n, X)
        assert (again[1] == 0).all()
        assert torch.equal(again[0], X)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_cg_bits_ignore_batch_threads_and_strides(level: str, dtype: torch.dtype) -> None:
    batch, n, k = 9, 37, 4
    A, B = random_spd(batch, n, dtype), random_tensor(batch, n, k, dtype=dtype)
    damping = random_tensor(batch, dtype=dtype).abs()
    torch.set_num_threads(2)
    whole = cg(A, B, damping, 1e-4, 100)
    torch.set_num_threads(1)
    strided = torch.zeros(batch, n, 2 * n, dtype=dtype)[:, :, ::2].copy_(A)
    columns = B.mT.contiguous().mT
    for run in (cg(A, B, damping, 1e-4, 100), cg(strided, columns, damping, 1e-4, 100)):
        assert all(torch.equal(a, b) for a, b in zip(run, whole, strict=True))
    for system in (0, 8):
        part = slice(system, system + 1)
        alone = cg(A[part], B[part, :, 1:2], damping[part], 1e-4, 100)
        assert all(
            torch.equal(a[0], b[system, ..., 1:2]) for a, b in zip(alone, whole, strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_cg_stops_as_documented(level: str, dtype: torch.dtype) -> None:
    n = 20
    A, B = random_spd(1, n, dtype), random_tensor(1, n, 1, dtype=dtype)
    none = torch.zeros(1, dtype=dtype)
    _, iterations, residual, converged = cg(A, B, none, 0.0, 3)
    assert iterations.item() == 3
    assert not converged.item()
    assert residual.item() > 0
    _, iterations, _, converged = cg(A, B, none, 1e-3, 0)
    assert iterations.item() == 0
    assert not converged.item()
    X, iterations, residual, converged = cg(-A, B, none, 1e-3, 50)  # p^T A p < 0 at once
    assert iterations.item() == 0
    assert (X == 0).all()
    assert residual.item() == 1
    assert not converged.item()
    eye = torch.eye(n, dtype=dtype)[None]
    X, iterations, residual, converged = cg(eye, B, none, 0.0, 50)  # exact after one step
    assert iterations.item() == 1
    assert residual.item() == 0
    assert converged.item()
    B[0, 3, 0] = float("nan")
    _, _, residual, converged = cg(A, B, none, 1e-3, 50)
    assert residual.isnan().all()
    assert not converged.item()
