"""The CUDA kernels of conjugate gradient, executed on the host: results, stopping, bits, steps.

As in test_cuda_host, every call raises ``FindingError`` on a race, a stray or uninitialised access,
or a barrier that not all threads reach. Two oracles: NumPy in float64 for the solutions, the CPU
kernels for iterations and what counts as converged.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import DTYPES
from cuda_host_library import Device
from cuda_krylov_calls import Result, cg, scaled_gram_cg

from backmatch import linalg

SIZES = [1, 2, 3, 5, 8, 17, 31, 32, 33, 40, 63, 64, 65, 127, 128, 129]
ONE = Device(multiprocessors=1)
RTOL = {np.float32: 1e-5, np.float64: 1e-10}

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def spd(rng, batch: int, n: int, dtype, condition: float = 30.0) -> np.ndarray:
    """Exactly symmetric, eigenvalues 1 .. condition."""
    Q = np.linalg.qr(rng.standard_normal((batch, n, n)))[0]
    A = (Q * np.geomspace(1, condition, n)) @ Q.transpose(0, 2, 1)
    return ((A + A.transpose(0, 2, 1)) / 2).astype(dtype)


def assert_solves(A, X, B, result: Result, rtol: float) -> None:
    """|b - A x| <= rtol |b| up to the rounding of one product, and the residual says so."""
    eps = np.finfo(X.dtype).eps
    A, X, B = (v.astype(np.float64) for v in (A, X, B))
    size = np.linalg.norm(B, axis=-2)
    rounding = 4 * eps * np.linalg.norm(A, axis=(-2, -1))[..., None] * np.linalg.norm(X, axis=-2)
    wrong = np.linalg.norm(B - A @ X, axis=-2)
    assert result.converged.all()
    assert (wrong <= rtol * size + rounding).all()
    assert (np.abs(result.residual * size - wrong) <= rounding + 1e-3 * wrong).all()


def on_cpu(A, damping, B, **options) -> Result:
    tensors = [torch.from_numpy(np.ascontiguousarray(v)) for v in (A, B, damping)]
    if "x0" in options:
        options["x0"] = torch.from_numpy(options["x0"])
    result = linalg.cg(tensors[0], tensors[1], damping=tensors[2], **options)
    return Result(*(value.numpy() for value in result))


def assert_same_course(mine: Result, cpu: Result) -> None:
    """Iterations equal or one more or less; rounding tells after dozens of them."""
    np.testing.assert_array_equal(mine.converged, cpu.converged)
    assert (np.abs(mine.iterations - cpu.iterations) <= 1 + cpu.iterations // 20).all()


def assert_equal_bits(left: Result, right: Result) -> None:
    for mine, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(mine, other)


# ---- cg -----------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_cg_at_every_edge(cuda, dtype, n):
    rng = np.random.default_rng(n)
    k, rtol = 1 + 4 * (n % 2), RTOL[dtype]
    A, B = spd(rng, 2, n, dtype), rng.standard_normal((2, n, k)).astype(dtype)
    damping = rng.uniform(0.1, 1, 2).astype(dtype)
    mine = cg(cuda, A, damping, B, rtol, 10 * n)
    assert_solves(A + damping[:, None, None] * np.eye(n), mine.x, B, mine, rtol)
    assert_same_course(mine, on_cpu(A, damping, B, max_steps=10 * n))


@dtypes
@pytest.mark.parametrize("k", [1, 2])
def test_cg_from_global_memory_has_the_same_bits(cuda, dtype, k):
    rng = np.random.default_rng(k)
    for n, room in ((65, 20_000), (130, 30_000)):  # in float32; enough for all but the matrix
        A, B = spd(rng, 1, n, dtype), rng.standard_normal((1, n, k)).astype(dtype)
        arguments = (A, np.ones(1, dtype), B, 1e-4, n)
        far = Device(shared_bytes=room * np.dtype(dtype).itemsize // 4, multiprocessors=1)
        assert_equal_bits(cg(cuda, *arguments, device=far), cg(cuda, *arguments))


@dtypes
def test_cg_beyond_one_block_of_rows(cuda, dtype):
    rng = np.random.default_rng(0)
    A, B = spd(rng, 1, 257, dtype, 5.0), rng.standard_normal((1, 257, 2)).astype(dtype)
    mine = cg(cuda, A, np.zeros(1, dtype), B, 1e-4, 100)
    assert_solves(A, mine.x, B, mine, 1e-4)
    assert_same_course(mine, on_cpu(A, np.zeros(1, dtype), B, rtol=1e-4, max_steps=100))


@dtypes
@pytest.mark.parametrize("n", [9, 40, 70])
def test_cg_systems_stop_on_their_own_and_slots_are_refilled(cuda, dtype, n):
    """11 columns in 4 slots, from 1 step to many; each has the bits it has alone, in any order."""
    rng = np.random.default_rng(n)
    values, vectors = np.linalg.eigh(spd(rng, 1, n, np.float64, 100.0)[0])
    A = (vectors * values) @ vectors.T
    A = ((A + A.T) / 2).astype(dtype)[None]
    parts = np.arange(11) % 8 + 1
    B = np.stack([vectors[:, -p:].sum(1) for p in parts], 1).astype(dtype)[None]
    B[0, :, 4] = 0
    rtol = 1e-4 if dtype == np.float32 else 1e-9
    whole = cg(cuda, A, np.zeros(1, dtype), B, rtol, 10 * n, device=ONE)
    assert whole.converged.all()
    assert whole.iterations[0, 4] == 0
    assert len(set(whole.iterations[0])) > 3
    for seed in range(1, 3):
        again = cg(cuda, A, np.zeros(1, dtype), B, rtol, 10 * n, device=Device(seed))
        assert_equal_bits(again, whole)
    order = rng.permutation(11)
    mixed = cg(cuda, A, np.zeros(1, dtype), B[:, :, order], rtol, 10 * n, device=ONE)
    np.testing.assert_array_equal(mixed.x, whole.x[:, :, order])
    for column in (0, 4, 7, 10):
        one = slice(column, column + 1)
        alone = cg(cuda, A, np.zeros(1, dtype), B[:, :, one], rtol, 10 * n)
        assert_equal_bits(alone, Result(whole.x[:, :, one], *(v[:, one] for v in whole[1:])))


@pytest.mark.parametrize("n", [4, 40])
def test_cg_bits_of_a_system_do_not_depend_on_the_batch(cuda, n):
    rng = np.random.default_rng(1)
    A, B = spd(rng, 5, n, np.float32), rng.standard_normal((5, n, 2)).astype(np.float32)
    damping = np.array([0, 1, 0, 2, 5], np.float32)
    A[2], B[3] = -A[2], np.nan
    whole = cg(cuda, A, damping, B, 1e-5, 50)
    for j in range(5):
        one = slice(j, j + 1)
        alone = cg(cuda, A[one], damping[one], B[one], 1e-5, 50)
        assert_equal_bits(alone, Result(*(value[one] for value in whole)))


@dtypes
@pytest.mark.parametrize("n", [4, 40, 70])
def test_cg_breakdowns(cuda, dtype, n):
    """Negative, zero, NaN, infinite: x stays where it was, nothing is called converged."""
    A = np.stack([s * np.eye(n) for s in (1, -1, 0, np.nan, 1, 1)]).astype(dtype)
    B = np.ones((6, n, 2), dtype)
    B[4, 0, 0], B[5, 1, 1], B[1, :, 1] = np.nan, np.inf, 0
    result = cg(cuda, A, np.zeros(6, dtype), B, 1e-5, 20)
    assert result.iterations.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0], [0, 1], [1, 0]]
    expected = [[1, 1], [0, 1], [0, 0], [0, 0], [0, 1], [1, 0]]
    assert result.converged.astype(int).tolist() == expected
    assert result.residual[1:3, 0].tolist() == [1, 1]
    assert not result.x[[1, 2]].any()
    # Indefinite: some steps are sound before one is not.
    D = np.diag(np.r_[np.linspace(1, 2, n - 1), -1e-3]).astype(dtype)[None]
    mine = cg(cuda, D, np.zeros(1, dtype), np.ones((1, n, 1), dtype), 1e-12, 50)
    cpu = on_cpu(D, np.zeros(1, dtype), np.ones((1, n, 1), dtype), rtol=1e-12, max_steps=50)
    assert_same_course(mine, cpu)
    assert not mine.converged.any()


@dtypes
def test_cg_rtol_zero_and_cap(cuda, dtype):
    rng = np.random.default_rng(2)
    for n in (20, 70):
        A = spd(rng, 2, n, dtype, 1e4)
        B = rng.standard_normal((2, n, 3)).astype(dtype)
        for steps in (1, 7):
            result = cg(cuda, A, np.zeros(2, dtype), B, 0.0, steps)
            assert (result.iterations == steps).all()
            assert not result.converged.any()
            cpu = on_cpu(A, np.zeros(2, dtype), B, rtol=0.0, max_steps=steps)
            tolerance = 1e-4 if dtype == np.float32 else 1e-10
            np.testing.assert_allclose(result.x, cpu.x, rtol=tolerance, atol=tolerance)
            np.testing.assert_allclose(result.residual, cpu.residual, rtol=tolerance)


@pytest.mark.parametrize("n", [12, 70])
def test_cg_start(cuda, n):
    rng = np.random.default_rng(3)
    A, B = spd(rng, 2, n, np.float64), rng.standard_normal((2, n, 2))
    B[0, :, 1] = 0
    exact = np.linalg.solve(A, B)
    start = exact + 1e-3 * rng.standard_normal(B.shape)
    warm = cg(cuda, A, np.zeros(2), B, 1e-10, 200, x0=start)
    assert_same_course(warm, on_cpu(A, np.zeros(2), B, x0=start))
    assert not warm.x[0, :, 1].any()
    assert warm.iterations[0, 1] == 0
    solved = cg(cuda, A, np.zeros(2), B, 1e-10, 200, x0=exact)
    assert not solved.iterations.any()
    np.testing.assert_array_equal(solved.x, np.where((B == 0).all(1, keepdims=True), 0, exact))


@dtypes
@pytest.mark.parametrize("exponent", [-120, 120])
def test_cg_tiny_and_huge_right_hand_sides(cuda, dtype, exponent):
    """Powers of two only scale the bits; squares of these leave the range of float32."""
    rng = np.random.default_rng(4)
    A, B = spd(rng, 1, 9, dtype), rng.standard_normal((1, 9, 2)).astype(dtype)
    plain = cg(cuda, A, np.ones(1, dtype), B, 1e-5, 90)
    factor = dtype(2.0**exponent)
    scaled = cg(cuda, A, np.ones(1, dtype), B * factor, 1e-5, 90)
    assert_equal_bits(Result(scaled.x / factor, *scaled[1:]), plain)


@pytest.mark.parametrize("n", [6, 40, 66])
def test_cg_strides(cuda, n):
    rng = np.random.default_rng(5)
    A, B = spd(rng, 3, n, np.float64), rng.standard_normal((3, n, 3))
    damping = rng.uniform(0, 1, 3)
    plain = cg(cuda, A, damping, B, 1e-8, 300)
    columns = np.ascontiguousarray(A.transpose(0, 2, 1)).transpose(0, 2, 1)
    wide = np.repeat(np.repeat(A, 2, 1), 3, 2)[:, ::2, ::3]
    moved = np.ascontiguousarray(B.transpose(2, 1, 0)).transpose(2, 1, 0)
    for view in (columns, wide):
        assert_equal_bits(cg(cuda, view, np.repeat(damping, 2)[::2], moved, 1e-8, 300), plain)
    shared = [np.broadcast_to(v[:1], v.shape) for v in (A, damping, B)]
    same = cg(cuda, *shared, 1e-8, 300)
    for value, one in zip(same, plain, strict=True):
        np.testing.assert_array_equal(value, np.broadcast_to(one[:1], value.shape))


def test_cg_limits(cuda):
    with pytest.raises(AssertionError, match="n must be at most 512, got 513"):
        cg(cuda, np.broadcast_to(1.0, (1, 513, 513)), np.zeros(1), np.ones((1, 513, 1)), 0.1, 1)
    for batch, n, k in ((0, 3, 2), (2, 3, 0)):
        empty = cg(cuda, np.ones((batch, n, n)), np.zeros(batch), np.ones((batch, n, k)), 0.1, 1)
        assert empty.iterations.shape == (batch, k)


# ---- scaled_gram_cg -----------------------------------------------------------------------------


def family(rng, batch: int, n: int, dtype) -> tuple[np.ndarray, ...]:
    """K, D with a third of its entries 0 and signs mixed, R, damping from hard to easy."""
    K = spd(rng, 1, n, dtype)[0]
    D = rng.uniform(0.5, 1.5, (batch, n)) * rng.choice([-1, 0, 1], (batch, n))
    damping = np.geomspace(1, 50, batch).astype(dtype)
    return K, D.astype(dtype), rng.standard_normal((batch, n)).astype(dtype), damping


def shared_inverse(K, D, damping) -> np.ndarray:
    """L^-1 of the preconditioner "shared"."""
    scale = np.sqrt(np.square(D.astype(np.float64)).mean(0))
    A = scale[:, None] * K * scale + damping.mean() * np.eye(len(K))
    return np.linalg.inv(np.linalg.cholesky(A)).astype(K.dtype)


def family_on_cpu(K, D, R, damping, rtol, cap, preconditioner=None) -> Result:
    K, D, R, damping = (torch.from_numpy(np.ascontiguousarray(v)) for v in (K, D, R, damping))
    options = {"rtol": rtol, "max_steps": cap, "preconditioner": preconditioner}
    result = linalg.scaled_gram_cg(K, D, R, damping=damping, **options)
    return Result(*(value.numpy() for value in result))


def check_family(cuda, K, D, R, damping, rtol, cap, preconditioned, device=ONE) -> Result:
    inverse = shared_inverse(K, D, damping) if preconditioned else None
    mine = scaled_gram_cg(cuda, K, D, R, damping, rtol, cap, inverse, device)
    cpu = family_on_cpu(K, D, R, damping, rtol, cap, "shared" if preconditioned else None)
    assert_same_course(mine, cpu)
    assert mine.converged.all()
    assert not mine.x[D == 0].any()
    A = D[:, :, None].astype(float) * K * D[:, None, :] + damping[:, None, None] * np.eye(len(K))
    exact = D * np.linalg.solve(A, R[:, :, None].astype(float))[:, :, 0]
    allowed = 100 * rtol * np.linalg.norm(R, axis=1) / damping
    assert (np.linalg.norm(mine.x - exact, axis=1) <= allowed).all()
    return mine


@dtypes
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_scaled_gram_cg_at_every_edge(cuda, dtype, preconditioned, n):
    rng = np.random.default_rng(n)
    rtol = 1e-3 if dtype == np.float32 else 1e-6
    check_family(cuda, *family(rng, 6, n, dtype), rtol, 20 * n, preconditioned)


@dtypes
@pytest.mark.parametrize("preconditioned", [False, True])
def test_scaled_gram_cg_slots_memory_and_blocks_do_not_show(cuda, dtype, preconditioned):
    """4 or 8 slots, K near or far, one block with a queue or many blocks: the same bits."""
    rng = np.random.default_rng(6)
    n, rtol = 70, 1e-3 if dtype == np.float32 else 1e-6
    K, D, R, damping = family(rng, 21, n, dtype)
    R[5], D[6] = 0, 0
    inverse = shared_inverse(K, D, damping) if preconditioned else None
    queue = check_family(cuda, K, D, R, damping, rtol, 300, preconditioned)
    assert queue.iterations[5] == 0
    assert len(set(queue.iterations)) > 4
    far_bytes = 30_000 * np.dtype(dtype).itemsize // 4
    for device in (Device(3, multiprocessors=4), Device(shared_bytes=far_bytes)):
        other = scaled_gram_cg(cuda, K, D, R, damping, rtol, 300, inverse, device)
        assert_equal_bits(other, queue)
    for j in (0, 5, 20):
        one = slice(j, j + 1)
        some = (D[one], R[one], damping[one])
        alone = scaled_gram_cg(cuda, K, *some, rtol, 300, inverse, Device(4))
        assert_equal_bits(alone, Result(*(value[one] for value in queue)))
    order = rng.permutation(21)
    mixed = (D[order], R[order], damping[order])
    mixed = scaled_gram_cg(cuda, K, *mixed, rtol, 300, inverse, ONE)
    assert_equal_bits(mixed, Result(*(value[order] for value in queue)))


def test_scaled_gram_cg_in_many_rows_a_thread_block(cuda):
    """K of order 257 in float is read from global memory by 384 threads."""
    rng = np.random.default_rng(7)
    K, D, R, damping = family(rng, 3, 257, np.float32)
    check_family(cuda, K, D, R, damping, 1e-3, 100, False)
    check_family(cuda, K, D, R, damping, 1e-3, 100, True)


@dtypes
def test_scaled_gram_cg_where_nothing_is_active(cuda, dtype):
    """D = 0: y = r / damping in one step, x = 0; a hard neighbour keeps its bits."""
    rng = np.random.default_rng(8)
    K, D, R, damping = family(rng, 3, 40, dtype)
    plain = scaled_gram_cg(cuda, K, D, R, damping, 1e-4, 200)
    D[1] = 0
    result = scaled_gram_cg(cuda, K, D, R, damping, 1e-4, 200)
    assert result.iterations[1] == 1
    assert result.converged[1]
    assert not result.x[1].any()
    for mine, before in zip(result, plain, strict=True):
        np.testing.assert_array_equal(mine[[0, 2]], before[[0, 2]])


@dtypes
@pytest.mark.parametrize("preconditioned", [False, True])
def test_scaled_gram_cg_failures_stay_with_their_system(cuda, dtype, preconditioned):
    rng = np.random.default_rng(9)
    K, D, R, damping = family(rng, 7, 70, dtype)
    inverse = shared_inverse(K, D, damping) if preconditioned else None
    plain = scaled_gram_cg(cuda, K, D, R, damping, 1e-4, 30, inverse, ONE)
    R[1, 3], D[2, 69], damping[3] = np.nan, np.inf, -1e4
    result = scaled_gram_cg(cuda, K, D, R, damping, 1e-4, 30, inverse, ONE)
    assert not result.converged[1:4].any()
    assert result.iterations[3] == 0
    for mine, before in zip(result, plain, strict=True):
        np.testing.assert_array_equal(mine[[0, 4, 5, 6]], before[[0, 4, 5, 6]])


@pytest.mark.parametrize("preconditioned", [False, True])
def test_scaled_gram_cg_rtol_zero_strides_and_loose_tolerance(cuda, preconditioned):
    rng = np.random.default_rng(10)
    K, D, R, damping = family(rng, 5, 40, np.float64)
    inverse = shared_inverse(K, D, damping) if preconditioned else None
    exact = scaled_gram_cg(cuda, K, D, R, damping, 0.0, 3, inverse)
    assert (exact.iterations == 3).all()
    cpu = family_on_cpu(K, D, R, damping, 0.0, 3, "shared" if preconditioned else None)
    np.testing.assert_allclose(exact.x, cpu.x, rtol=1e-9, atol=1e-12)
    wide = np.repeat(np.repeat(K, 2, 0), 2, 1)[::2, ::2]
    views = (np.asfortranarray(D), np.repeat(R, 2, 1)[:, ::2], np.repeat(damping, 2)[::2])
    assert_equal_bits(scaled_gram_cg(cuda, wide, *views, 0.0, 3, inverse), exact)
    loose = scaled_gram_cg(cuda, K, D, R, damping, 1.0, 3, inverse)
    assert loose.converged.all()
    assert not loose.iterations.any()
    assert not loose.x.any()


def test_scaled_gram_cg_limits(cuda):
    for dtype, limit in ((np.float32, 512), (np.float64, 256)):
        row = np.ones((1, limit + 1), dtype)
        K = np.broadcast_to(dtype(1), (limit + 1,) * 2)
        with pytest.raises(AssertionError, match=f"n must be at most {limit}"):
            scaled_gram_cg(cuda, K, row, row, np.ones(1, dtype), 0.1, 1)
