"""weighted_gram and ridge_primal as CUDA kernels, executed on the host: results, failures, bits.

Every call runs the real launcher and kernel on the block emulator; see test_cuda_host.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import DEFAULT, DTYPES, TINY
from cuda_host_library import Device, FindingError

SIZES = [*range(1, 71), 127, 128, 129]
WINDOWS = [0, 1, 7, 8, 9, 31, 32, 33, 64, 70, 255, 256, 257, 513]


def rows_and_weights(rng, m, n, batch, dtype, density=0.6) -> tuple[np.ndarray, ...]:
    """Z, weights of both signs and many sizes, a share of them 0, and dampings."""
    Z = rng.standard_normal((m, n)).astype(dtype)
    w = rng.standard_normal((batch, m)) * 10.0 ** rng.integers(-3, 4, (batch, m))
    w[rng.uniform(size=w.shape) > density] = 0
    return Z, w.astype(dtype), rng.uniform(0, 1, batch).astype(dtype)


def exact_gram(Z, w, damping) -> np.ndarray:
    Z, w = Z.astype(float), w.astype(float)
    shift = damping.astype(float)[:, None, None] * np.eye(Z.shape[1])
    return np.einsum("ia,ji,ib->jab", Z, w, Z, optimize=True) + shift


def assert_gram(G, Z, w, damping) -> None:
    """Every entry is a sum of m products: error m eps sum |z_a w z_b|. Symmetric to the bit."""
    size = exact_gram(np.abs(Z), np.abs(w), np.abs(damping))
    bound = (Z.shape[0] + 4) * np.finfo(G.dtype).eps * size
    assert (np.abs(G - exact_gram(Z, w, damping)) <= bound).all()
    np.testing.assert_array_equal(G, G.transpose(0, 2, 1))


def check_gram(cuda, seed, m, n, batch, dtype, device=DEFAULT) -> np.ndarray:
    problem = rows_and_weights(np.random.default_rng(seed), m, n, batch, dtype)
    G = cuda.weighted_gram(*problem, device)
    assert_gram(G, *problem)
    return G


# ---- weighted_gram -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_weighted_gram_at_every_order(cuda, dtype, n):
    check_gram(cuda, n, n * 37 % 71 + 1, n, n % 3 + 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [6, 13, 20, 40, 130])
@pytest.mark.parametrize("m", WINDOWS)
def test_weighted_gram_at_every_number_of_rows(cuda, dtype, n, m):
    check_gram(cuda, m, m if n < 100 else m % 100, n, 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "m", "n"), [(0, 5, 4), (2, 5, 0), (0, 0, 0), (301, 9, 3)])
def test_weighted_gram_of_none_and_of_many(cuda, dtype, batch, m, n):
    check_gram(cuda, 1, m, n, batch, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_gram_of_several_squares(cuda, dtype):
    """Order 257: three squares of 128 down, the last of one row."""
    check_gram(cuda, 2, 11, 257, 2, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_gram_in_smaller_squares_where_memory_is_short(cuda, dtype):
    check_gram(cuda, 3, 19, 130, 2, dtype, Device(shared_bytes=48 * 1024))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 19, 40, 129])
@pytest.mark.parametrize("bad", [np.nan, np.inf, "huge"])
def test_rows_of_weight_zero_do_not_count(cuda, dtype, n, bad):
    """A row without finite products, in every second system at weight 0; the others show it."""
    rng = np.random.default_rng(n)
    Z, w, damping = rows_and_weights(rng, 40, n, 4, dtype, density=0.9)
    w[:, 7] = 0.5
    w[::2, 7] = 0
    clean = cuda.weighted_gram(Z, w, damping)
    Z[7, 3] = -(np.finfo(dtype).max ** 0.9) if bad == "huge" else bad
    G = cuda.weighted_gram(Z, w, damping)
    np.testing.assert_array_equal(G[::2], clean[::2])
    assert not np.isfinite(G[1::2, 3, 3]).any()
    others = np.flatnonzero(np.arange(n) != 3)
    np.testing.assert_array_equal(
        G[1::2][:, others][:, :, others], clean[1::2][:, others][:, :, others]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 33])
def test_weights_that_are_not_finite_reach_every_diagonal_entry(cuda, dtype, n):
    Z, w, damping = rows_and_weights(np.random.default_rng(3), 10, n, 3, dtype)
    w[0, 2], w[1, 9] = np.nan, np.inf
    G = cuda.weighted_gram(Z, w, damping)
    assert not np.isfinite(np.diagonal(G[:2], axis1=1, axis2=2)).any()
    assert np.isfinite(G[2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 40])
def test_huge_rows_with_tiny_weights_are_exact(cuda, dtype, n):
    """(w z) z is in range where z z is not."""
    huge = dtype(np.finfo(dtype).max ** 0.75)
    Z, w = np.full((3, n), huge), np.full((2, 3), 1 / huge)
    G = cuda.weighted_gram(Z, w, np.zeros(2, dtype))
    np.testing.assert_allclose(G, np.full_like(G, 3 * huge), rtol=1e-5)


@pytest.mark.parametrize("m", [1, 16, 500])
def test_sums_of_three_parts_are_as_good_as_floats(cuda, m):
    """Order 40 in float32 is summed in parts of bf16. Sums of one sign, cut off in every chunk: the
    error stays a few units in the last place, and does not grow with the number of rows."""
    rng = np.random.default_rng(m)
    for scale in (1.0, 1e-12, 1e12):
        Z, w = scale * rng.uniform(1, 2, (m, 40)), rng.uniform(1, 2, (2, m))
        Z, w, zero = Z.astype(np.float32), w.astype(np.float32), np.zeros(2, np.float32)
        exact = exact_gram(Z, w, zero)
        error = np.abs(cuda.weighted_gram(Z, w, zero) / exact - 1).max()
        assert error <= 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [6, 40, 129])
def test_weighted_gram_takes_any_strides(cuda, dtype, n):
    Z, w, damping = rows_and_weights(np.random.default_rng(4), 37, n, 4, dtype)
    expected = cuda.weighted_gram(Z, w, damping)
    wide = np.repeat(np.repeat(Z, 2, 0), 3, 1)[::2, ::3]
    for rows, weights in ((np.asfortranarray(Z), np.asfortranarray(w)), (wide, w)):
        G = cuda.weighted_gram(rows, weights, np.repeat(damping, 2)[::2])
        np.testing.assert_array_equal(G, expected)
    one = [np.broadcast_to(a[:1], a.shape) for a in (w, damping)]
    G = cuda.weighted_gram(Z, *one)
    np.testing.assert_array_equal(G, np.broadcast_to(expected[:1], G.shape))
    level = np.broadcast_to(Z[:, :1], Z.shape)
    assert_gram(cuda.weighted_gram(level, w, damping), level, w, damping)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, 12, 30, 50, 129])
def test_bits_of_weighted_gram(cuda, dtype, n):
    """The same in any order of threads, again, alone and beside others."""
    Z, w, damping = rows_and_weights(np.random.default_rng(5), 40, n, 6 if n < 100 else 3, dtype)
    G = cuda.weighted_gram(Z, w, damping)
    for seed in (1, 2):
        np.testing.assert_array_equal(cuda.weighted_gram(Z, w, damping, Device(seed)), G)
    for part in (slice(2, 3), slice(1, 6)):
        alone = cuda.weighted_gram(Z, w[part], damping[part])
        np.testing.assert_array_equal(alone, G[part])


# ---- ridge_primal --------------------------------------------------------------------------------


def targets(rng, m, n, batch, dtype) -> tuple[np.ndarray, ...]:
    """Z, slopes with zeros, R and dampings of well-conditioned systems."""
    Z = rng.standard_normal((m, n)) / max(1, m) ** 0.5
    D = rng.uniform(0.5, 1.5, (batch, m)) * rng.choice([-1, 0, 1], (batch, m))
    R = rng.standard_normal((batch, m))
    return *(a.astype(dtype) for a in (Z, D, R)), rng.uniform(0.3, 1, batch).astype(dtype)


def assert_minimises(Z, D, R, damping, d) -> None:
    A = exact_gram(Z, D.astype(float) ** 2, damping)
    b = (D.astype(float) * R.astype(float)) @ Z.astype(float)
    expected = np.linalg.solve(A, b[..., None])[..., 0]
    tolerance = 200 * np.finfo(d.dtype).eps * max(np.abs(expected).max(initial=0), 1e-30)
    assert np.abs(d - expected).max(initial=0) <= tolerance


def check_primal(cuda, seed, m, n, batch, dtype, device=DEFAULT) -> np.ndarray:
    problem = targets(np.random.default_rng(seed), m, n, batch, dtype)
    d, info = cuda.ridge_primal(*problem, device)
    assert not info.any()
    assert_minimises(*problem, d)
    return d


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [*range(33, 71), 95, 96, 97, 127, 128, 129, 193])
def test_ridge_primal_at_every_order(cuda, dtype, n):
    check_primal(cuda, n, n * 37 % 90 + 20, n, n % 2 + 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", WINDOWS)
def test_ridge_primal_at_every_number_of_rows(cuda, dtype, m):
    check_primal(cuda, m, m, 40, 2, dtype)


def test_ridge_primal_takes_what_fits_on_chip(cuda):
    largest = {np.float32: 272, np.float64: 208}
    for dtype, order in largest.items():
        fits = [cuda.ridge_primal_fits(dtype, n) for n in range(order + 2)]
        assert fits == [False] * 33 + [True] * (order - 32) + [False]
        assert not cuda.ridge_primal_fits(dtype, 40, TINY)
    check_primal(cuda, 6, 20, 272, 1, np.float32)
    check_primal(cuda, 6, 20, 208, 1, np.float64)
    with pytest.raises(FindingError, match="ridge_primal does not take n = 40 on this device"):
        check_primal(cuda, 6, 9, 40, 1, np.float32, TINY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge_primal_strides_through_the_batch(cuda, dtype):
    check_primal(cuda, 7, 3, 33, 70, dtype, Device(multiprocessors=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_slope_zero_do_not_count(cuda, dtype):
    Z, D, R, damping = targets(np.random.default_rng(8), 50, 45, 3, dtype)
    D[:, 7] = D[0, 9] = 0
    expected, _ = cuda.ridge_primal(Z, D, R, damping)
    Z[7], R[:, 7], R[0, 9] = np.nan, np.inf, np.nan
    d, info = cuda.ridge_primal(Z, D, R, damping)
    np.testing.assert_array_equal(d, expected)
    assert not info.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [33, 50, 80])
def test_failures_of_ridge_primal(cuda, dtype, n):
    """A zero column without damping, a negative damping and NaN; neighbours keep their bits."""
    Z, D, R, damping = targets(np.random.default_rng(9), n + 30, n, 5, dtype)
    Z[:, n // 2] = 0
    good, _ = cuda.ridge_primal(Z, D, R, damping)
    damping[[1, 3]] = 0, -1e3
    D[4, 5] = np.nan
    d, info = cuda.ridge_primal(Z, D, R, damping)
    assert info.tolist() == [0, n // 2 + 1, 0, 1, 1]
    assert np.isnan(d[[1, 3, 4]]).all()
    np.testing.assert_array_equal(d[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [40, 100])
def test_bits_and_strides_of_ridge_primal(cuda, dtype, n):
    Z, D, R, damping = targets(np.random.default_rng(10), 60, n, 4, dtype)
    d, _ = cuda.ridge_primal(Z, D, R, damping)
    for seed in (1, 2):
        np.testing.assert_array_equal(cuda.ridge_primal(Z, D, R, damping, Device(seed))[0], d)
    columns = [np.asfortranarray(a) for a in (Z, D, R)]
    np.testing.assert_array_equal(cuda.ridge_primal(*columns, damping)[0], d)
    one = [np.broadcast_to(a[:1], a.shape) for a in (D, R, damping)]
    np.testing.assert_array_equal(cuda.ridge_primal(Z, *one)[0], np.broadcast_to(d[:1], d.shape))
    np.testing.assert_array_equal(cuda.ridge_primal(Z, D[2:3], R[2:3], damping[2:3])[0], d[2:3])
