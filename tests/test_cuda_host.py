"""The CUDA kernels' own source, executed on the host: results, failures, bits and barriers.

Every call runs the real launcher and kernel on the block emulator, which raises ``FindingError`` on
a race, a stray or uninitialised access, a write to an input, or a barrier that not all threads
reach.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_cases import (
    DEFAULT,
    DTYPES,
    TINY,
    assert_solves,
    assert_solves_family,
    check_family,
    check_spd,
    family,
    full,
    potrf_info,
    spd_matrices,
)
from cuda_host_library import Device, FindingError

from backmatch import linalg

SIZES = [*range(1, 71), 127, 128, 129, 255, 256, 257]
SMALL = Device(shared_bytes=16 * 1024, multiprocessors=1)  # only small systems fit on chip


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_spd_solve_at_every_tile_edge(cuda, dtype, n):
    check_spd(cuda, np.random.default_rng(n), dtype, 3 if n < 100 else 1, n, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_scaled_gram_solve_at_every_tile_edge(cuda, dtype, n):
    check_family(cuda, np.random.default_rng(n), dtype, 3 if n < 100 else 1, n)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [511, 512, 513])
def test_large_systems(cuda, dtype, n):
    check_spd(cuda, np.random.default_rng(n), dtype, 2, n, 2)
    check_family(cuda, np.random.default_rng(n), dtype, 2, n)
    check_family(cuda, np.random.default_rng(n), dtype, 1, n, density=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 8, 9, 16, 17, 24, 32, 33, 50, 64, 65])
@pytest.mark.parametrize("k", [0, 1, 2, 5, 33])
def test_spd_solve_right_hand_sides(cuda, dtype, n, k):
    X, _ = check_spd(cuda, np.random.default_rng(k), dtype, 2, n, k)
    assert X.shape == (2, n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 5, 40])
def test_empty_batch_and_order_zero(cuda, dtype, n):
    rng = np.random.default_rng(0)
    for batch in (0, 3) if n == 0 else (0,):
        check_spd(cuda, rng, dtype, batch, n, 2)
        check_family(cuda, rng, dtype, batch, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 5, 8, 12, 16, 24, 32, 36, 48, 64])
def test_wide_loads_and_single_ones_give_the_same_bits(cuda, dtype, n):
    """Aligned matrices, the same one element further, rows apart, columns apart."""
    rng = np.random.default_rng(n)
    batch = 33 if n <= 8 else 9
    A, damping = spd_matrices(rng, batch, n, dtype), rng.uniform(0, 1, batch).astype(dtype)
    B = rng.standard_normal((batch, n, 1)).astype(dtype)
    expected, _ = cuda.spd_solve(A, damping, B)
    assert_solves(full(A, damping), expected, B)
    moved = np.empty(A.size + 1, dtype)[1:].reshape(A.shape)
    apart = np.empty((batch, n, n + 4), dtype)[:, :, :n]
    odd = np.empty((batch, n, n + 1), dtype)[:, :, 1:]
    every_other = np.empty((batch, n, 2 * n), dtype)[:, :, ::2]
    for a in (moved, apart, odd, every_other):
        a[...] = A
        X, _ = cuda.spd_solve(a, damping, B)
        np.testing.assert_array_equal(X, expected)


@pytest.mark.parametrize("n", [6, 14, 40, 55, 70])
def test_any_strides(cuda, n):
    rng = np.random.default_rng(1)
    A, damping = spd_matrices(rng, 4, n, np.float64), rng.uniform(0, 1, 4)
    B = rng.standard_normal((4, n, 3))
    expected, _ = cuda.spd_solve(A, damping, B)
    transposed = np.ascontiguousarray(A.transpose(0, 2, 1)).transpose(0, 2, 1)
    wide = np.repeat(np.repeat(A, 3, 1), 2, 2)[:, ::3, ::2]
    moved = np.ascontiguousarray(B.transpose(2, 1, 0)).transpose(2, 1, 0)
    for a in (transposed, wide):
        X, _ = cuda.spd_solve(a, np.repeat(damping, 2)[::2], moved)
        np.testing.assert_array_equal(X, expected)

    one, shared = np.broadcast_to(A[:1], A.shape), np.broadcast_to(damping[:1], 4)
    X, _ = cuda.spd_solve(one, shared, np.broadcast_to(B[:1], B.shape))
    np.testing.assert_array_equal(X, np.broadcast_to(expected[:1], B.shape))


@pytest.mark.parametrize("n", [6, 14, 40, 55, 70])
def test_any_strides_of_a_family(cuda, n):
    K, D, R, damping = family(np.random.default_rng(2), 4, n, np.float64)
    expected, _ = cuda.scaled_gram_solve(K, D, R, damping)
    K_by_columns, D_by_columns = np.asfortranarray(K), np.asfortranarray(D)
    R_wide = np.repeat(R, 2, 1)[:, ::2]
    X, _ = cuda.scaled_gram_solve(K_by_columns, D_by_columns, R_wide, damping)
    np.testing.assert_array_equal(X, expected)

    one = [np.broadcast_to(a[:1], a.shape) for a in (D, R, damping)]
    X, _ = cuda.scaled_gram_solve(K, *one)
    np.testing.assert_array_equal(X, np.broadcast_to(expected[:1], X.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 13, 20, 27, 40, 60])
@pytest.mark.parametrize("batch", [1, 2, 9, 35])
def test_batches_that_do_not_fill_a_block(cuda, dtype, n, batch):
    check_spd(cuda, np.random.default_rng(batch), dtype, batch, n, 1)
    check_family(cuda, np.random.default_rng(batch), dtype, batch, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, 9, 16, 22, 32, 41, 64])
def test_family_with_every_number_of_active_rows(cuda, dtype, n):
    """Neighbours in a warp with other numbers of active rows leave the bits of a system alone."""
    rng = np.random.default_rng(n)
    K, D, R, damping = family(rng, n + 1, n, dtype, density=1.0)
    for j in range(n + 1):
        D[j, rng.permutation(n)[j:]] = 0
    mixed = rng.permutation(n + 1)
    D, R, damping = D[mixed], R[mixed], damping[mixed]
    X, info = cuda.scaled_gram_solve(K, D, R, damping)
    assert not info.any()
    assert_solves_family(K, D, R, damping, X)
    for j in range(0, n + 1, 5):
        one = slice(j, j + 1)
        alone, _ = cuda.scaled_gram_solve(K, D[one], R[one], damping[one])
        np.testing.assert_array_equal(alone[0], X[j])


def test_batch_larger_than_the_grid(cuda):
    """64 blocks a multiprocessor, two systems or more for each of them."""
    check_spd(cuda, np.random.default_rng(3), np.float32, 130, 65, 1, Device(multiprocessors=1))
    check_family(cuda, np.random.default_rng(3), np.float32, 130, 65, device=Device(5, 20000, 1))


@pytest.mark.slow
def test_batch_beyond_65535(cuda):
    A, damping, B = np.random.default_rng(4).uniform(1, 2, (3, 70_000))
    X, info = cuda.spd_solve(A[:, None, None], damping, B[:, None, None])
    assert not info.any()
    np.testing.assert_allclose(X[:, 0, 0], B / (A + damping), rtol=1e-14)


# ---- shared memory or workspace ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [65, 90, 130])
@pytest.mark.parametrize("device", [TINY, SMALL])
def test_workspace_gives_the_bits_of_shared_memory(cuda, dtype, n, device):
    on_chip, _ = check_spd(cuda, np.random.default_rng(5), dtype, 5, n, 6)
    off_chip, _ = check_spd(cuda, np.random.default_rng(5), dtype, 5, n, 6, device)
    np.testing.assert_array_equal(on_chip, off_chip)
    on_chip = check_family(cuda, np.random.default_rng(6), dtype, 5, n)
    off_chip = check_family(cuda, np.random.default_rng(6), dtype, 5, n, device=device)
    np.testing.assert_array_equal(on_chip, off_chip)


def test_workspace_only_where_needed_and_bounded(cuda):
    def bytes_of(stem, *sizes):
        return cuda.workspace_bytes(stem, np.float32, sizes, Device(multiprocessors=132))

    assert bytes_of("spd_solve", 10_000, 64, 1) == 0
    assert bytes_of("spd_solve", 10_000, 256, 100) == 0
    assert 0 < bytes_of("spd_solve", 10_000, 512, 1) <= 256 << 20
    assert bytes_of("scaled_gram_solve", 10_000, 256) == 0
    assert 0 < bytes_of("scaled_gram_solve", 10_000, 2048) <= 256 << 20
    assert bytes_of("scaled_gram_solve", 1, 512) < bytes_of("scaled_gram_solve", 2, 512)


def test_right_hand_sides_pass_in_smaller_groups_where_memory_is_short(cuda):
    """The factor of order 80 and 4 columns fit in 18 KiB, 33 columns do not: same bits."""
    roomy, _ = check_spd(cuda, np.random.default_rng(7), np.float32, 2, 80, 33)
    short = Device(shared_bytes=18 * 1024)
    tight, _ = check_spd(cuda, np.random.default_rng(7), np.float32, 2, 80, 33, short)
    assert cuda.workspace_bytes("spd_solve", np.float32, (2, 80, 33), short) == 0
    np.testing.assert_array_equal(roomy, tight)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 12, 32, 49, 97])
def test_bits_do_not_depend_on_the_order_of_threads_and_blocks(cuda, dtype, n):
    results = []
    for seed in range(4):
        X, _ = check_spd(cuda, np.random.default_rng(8), dtype, 3, n, 2, Device(seed))
        F = check_family(cuda, np.random.default_rng(9), dtype, 3, n, device=Device(seed))
        results.append((X.tobytes(), F.tobytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("n", [4, 16, 31, 48, 57])
def test_bits_do_not_depend_on_neighbours_or_batch_split(cuda, n):
    rng = np.random.default_rng(10)
    A, damping = spd_matrices(rng, 6, n, np.float32), rng.uniform(0, 1, 6).astype(np.float32)
    B = rng.standard_normal((6, n, 2)).astype(np.float32)
    X, _ = cuda.spd_solve(A, damping, B)
    K, D, R, lam = family(rng, 6, n, np.float32)
    F, _ = cuda.scaled_gram_solve(K, D, R, lam)
    for j in range(6):
        one = slice(j, j + 1)
        alone, _ = cuda.spd_solve(A[one], damping[one], B[one])
        np.testing.assert_array_equal(alone[0], X[j])
        alone, _ = cuda.scaled_gram_solve(K, D[one], R[one], lam[one])
        np.testing.assert_array_equal(alone[0], F[j])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 6, 16, 30, 33, 75])
def test_cpu_and_cuda_agree(cuda, dtype, n):
    """On results to rounding, on what fails and what does not exactly."""
    rng = np.random.default_rng(n)
    A, B = spd_matrices(rng, 6, n, dtype), rng.standard_normal((6, n, 2)).astype(dtype)
    damping = np.array([0, 0.5, 2, np.nan, np.inf, -1e6], dtype)
    A[1, n // 2, n // 2] = np.nan
    expected = [t.numpy() for t in linalg.spd_solve_ex(*tensors(A, B), damping=tensors(damping)[0])]
    assert_same(cuda.spd_solve(A, damping, B), expected, dtype)

    K, D, R, _ = family(rng, 6, n, dtype)
    D[[2, 5]] = 0  # no active row: nothing to fail
    D[1, 0] = np.nan
    arguments, damping[2] = tensors(K, D, R), np.nan
    solved = linalg.scaled_gram_solve_ex(*arguments, damping=tensors(damping)[0])
    assert_same(cuda.scaled_gram_solve(K, D, R, damping), [t.numpy() for t in solved], dtype)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def assert_same(actual, expected, dtype) -> None:
    tolerance = 1000 * np.finfo(dtype).eps
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_allclose(actual[0], expected[0], rtol=tolerance, atol=tolerance)


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 17, 32, 33, 47, 64, 97])
@pytest.mark.parametrize("bad", [-1.0, 0.0, np.nan])
def test_info_is_that_of_potrf_and_neighbours_keep_their_bits(cuda, dtype, n, bad):
    """One matrix of five gets a bad diagonal entry, each time elsewhere."""
    rng = np.random.default_rng(n)
    A, B = spd_matrices(rng, 5, n, dtype), rng.standard_normal((5, n, 2)).astype(dtype)
    damping = np.zeros(5, dtype)
    good, _ = cuda.spd_solve(A, damping, B)
    for position in sorted({0, n // 2, n - 1}):
        broken = A.copy()
        broken[2, position, :position] = 0  # the pivot is then the entry itself, exactly
        broken[2, position, position] = bad
        X, info = cuda.spd_solve(broken, damping, B)
        lower = np.tril(np.nan_to_num(broken[2], nan=0.0))
        lower[position, position] = bad
        assert info.tolist() == [0, 0, position + 1, 0, 0]
        if np.isfinite(bad):  # LAPACK libraries differ on NaN; here it never gives 0
            assert potrf_info(lower) == position + 1
        assert np.isnan(X[2]).all()
        keep = [0, 1, 3, 4]
        np.testing.assert_array_equal(X[keep], good[keep])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 16, 29, 40, 64])
def test_info_of_indefinite_matrices(cuda, dtype, n):
    """The leading minors decide, wherever they turn: several per batch, as potrf finds them."""
    rng = np.random.default_rng(n)
    A = spd_matrices(rng, 6, n, dtype)
    for j in range(1, 6):
        A[j, -j % n, -j % n] -= 50
    X, info = cuda.spd_solve(A, np.zeros(6, dtype), np.ones((6, n, 1), dtype))
    assert info.tolist() == [potrf_info(np.tril(np.nan_to_num(a, nan=0.0))) for a in A]
    assert info[0] == 0
    assert info[1:].all()
    assert np.isnan(X[1:]).all()


@pytest.mark.parametrize("n", [5, 20, 40])
def test_not_finite_never_gives_info_zero(cuda, n):
    rng = np.random.default_rng(11)
    A, B = spd_matrices(rng, 5, n, np.float64), rng.standard_normal((5, n, 1))
    damping = np.array([0, 0, 0, np.nan, np.inf])
    A[0, n - 1, 0], A[1, n - 1, 1], A[2, 2, 2] = np.nan, np.inf, np.inf
    X, info = cuda.spd_solve(A, damping, B)
    assert info.tolist() == [n, n, 3, 1, 1]
    assert np.isnan(X).all()


def test_not_finite_right_hand_side_is_no_failure_of_the_matrix(cuda):
    rng = np.random.default_rng(12)
    for n in (6, 40):
        B = rng.standard_normal((2, n, 2))
        B[0, 3, 0] = np.nan
        X, info = cuda.spd_solve(spd_matrices(rng, 2, n, np.float64), np.zeros(2), B)
        assert not info.any()
        assert np.isnan(X[0, :, 0]).all()
        assert np.isfinite(X[0, :, 1]).all()
        assert np.isfinite(X[1]).all()


@pytest.mark.parametrize("n", [6, 32, 50])
def test_order_of_info_without_right_hand_sides(cuda, n):
    A = spd_matrices(np.random.default_rng(13), 3, n, np.float32)
    A[1, 4, :4], A[1, 4, 4] = 0, -1
    X, info = cuda.spd_solve(A, np.zeros(3, np.float32), np.zeros((3, n, 0), np.float32))
    assert X.shape == (3, n, 0)
    assert info.tolist() == [0, 5, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [9, 32, 60, 129])
def test_family_with_extreme_slopes(cuda, dtype, n):
    """No active row, every second, one only, all: rows with D == 0 drop out exactly."""
    rng = np.random.default_rng(n)
    K, D, R, damping = family(rng, 4, n, dtype, density=1.0)
    D[0], D[1, ::2], D[2, :-1] = 0, 0, 0
    K[0, 0] = np.nan  # row 0 is active in system 3 alone
    R[:3, 0] = np.nan
    X, info = cuda.scaled_gram_solve(K, D, R, damping)
    assert info.tolist() == [0, 0, 0, 1]
    assert not X[0].any()
    assert np.isnan(X[3]).all()
    K[0, 0] = 1
    assert_solves_family(K, D[:3], np.nan_to_num(R[:3]), damping[:3], X[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "device"), [(7, DEFAULT), (32, DEFAULT), (45, DEFAULT), (100, DEFAULT), (100, TINY)]
)
def test_family_info_counts_original_rows(cuda, dtype, n, device):
    rng = np.random.default_rng(14)
    K, D, R, damping = family(rng, 5, n, dtype, density=0.6)
    good, _ = cuda.scaled_gram_solve(K, D, R, damping, device)
    row = n - 3
    D[:, row] = [0, 1, np.nan, 0, 1]
    broken = K.copy()
    broken[row, row] = -100
    X, info = cuda.scaled_gram_solve(broken, D, R, damping, device)
    assert info.tolist() == [0, row + 1, row + 1, 0, row + 1]
    assert np.isnan(X[[1, 2, 4]]).all()
    assert_solves_family(K, D[[0, 3]], R[[0, 3]], damping[[0, 3]], X[[0, 3]])
    assert good.shape == X.shape


def test_size_beyond_the_limit_is_refused_by_name(cuda):
    with pytest.raises(FindingError, match=r"n must be at most 262144, got 2000000"):
        cuda.workspace_bytes("spd_solve", np.float32, (1, 2_000_000, 1), DEFAULT)
    with pytest.raises(FindingError, match=r"n must be at most 262144, got 2000000"):
        cuda.workspace_bytes("scaled_gram_solve", np.float64, (1, 2_000_000), DEFAULT)
