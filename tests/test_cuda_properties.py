"""Properties of the emulated CUDA kernels on drawn sizes, layouts, devices and magnitudes.

The oracle is NumPy in float64; what fails is decided by LAPACK's potrf. The draws are the same in
every run.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import (
    DTYPES,
    assert_solves,
    assert_solves_family,
    family,
    full,
    potrf_info,
    spd_matrices,
)
from cuda_host_library import Device
from hypothesis import given, settings
from hypothesis import strategies as st

ORDERS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 25, 32, 33, 47, 48, 49, 63, 64, 65, 80, 81]
drawn = settings(max_examples=25, deadline=None, derandomize=True, database=None)


devices = st.builds(
    Device,
    seed=st.integers(0, 2**30),
    shared_bytes=st.sampled_from([101376, 166912, 232448]),
    multiprocessors=st.sampled_from([1, 2, 5]),
)
precisions = st.sampled_from(DTYPES)
orders = st.sampled_from(ORDERS)
seeds = st.integers(0, 2**30)


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same entries, elsewhere in memory."""
    if layout == "transposed":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "every other":
        wide = np.zeros(tuple(2 * size for size in array.shape), array.dtype)
        wide = wide[tuple(slice(None, None, 2) for _ in array.shape)]
        wide[...] = array
        return wide
    if layout == "unaligned":
        shifted = np.zeros(array.size + 1, array.dtype)[1:].reshape(array.shape)
        shifted[...] = array
        return shifted
    return array


layouts = st.sampled_from(["contiguous", "transposed", "every other", "unaligned"])


@drawn
@given(seeds, precisions, orders, st.integers(1, 9), st.integers(0, 9), layouts, devices, devices)
def test_spd_solve_whatever_is_drawn(cuda, seed, dtype, n, batch, k, layout, one, two):
    """Good, broken and scaled systems side by side; alone, elsewhere, each has the same bits."""
    rng = np.random.default_rng(seed)
    A = spd_matrices(rng, batch, n, dtype)
    A *= (2.0 ** rng.integers(-60, 60, batch)).astype(dtype)[:, None, None]
    for j in range(1, batch, 3):
        i = rng.integers(n)
        A[j, i, :i], A[j, i, i] = 0, rng.choice([0.0, -1.0, np.nan, np.inf])
    damping, B = np.zeros(batch, dtype), rng.standard_normal((batch, n, k)).astype(dtype)
    X, info = cuda.spd_solve(laid_out(A, layout), damping, laid_out(B, layout), one)
    bad = [j for j in range(batch) if j % 3 == 1]
    good = [j for j in range(batch) if j % 3 != 1]
    assert (info[bad] != 0).all()
    for j in bad:
        lower = np.tril(np.where(np.tri(n, dtype=bool), A[j], 0))
        if np.isfinite(lower).all():
            assert info[j] == potrf_info(lower)
    assert np.isnan(X[bad]).all()
    assert not info[good].any()
    assert_solves(full(A[good], damping[good]), X[good], B[good])
    own = slice(batch - 1, batch)
    alone, _ = cuda.spd_solve(A[own], damping[own], B[own], two)
    np.testing.assert_array_equal(alone, X[own])


@drawn
@given(seeds, precisions, orders, st.integers(1, 9), st.floats(0, 1), layouts, devices, devices)
def test_scaled_gram_solve_whatever_is_drawn(cuda, seed, dtype, n, batch, density, layout, a, b):
    rng = np.random.default_rng(seed)
    K, D, R, damping = family(rng, batch, n, dtype, density)
    scale = (2.0 ** rng.integers(-20, 20, (batch, 1))).astype(dtype)
    D, damping = D * scale, damping * scale[:, 0] ** 2
    R[D == 0] = np.nan
    broken = batch > 1 and D[1].any()
    if broken:
        D[1, np.flatnonzero(D[1])[-1]] = np.nan
    X, info = cuda.scaled_gram_solve(*(laid_out(v, layout) for v in (K, D, R)), damping, a)
    if broken:
        assert info[1] == np.flatnonzero(D[1])[-1] + 1
        assert np.isnan(X[1]).all()
    good = [j for j in range(batch) if not (broken and j == 1)]
    assert not info[good].any()
    assert_solves_family(K, D[good], R[good], damping[good], X[good])
    own = slice(batch - 1, batch)
    alone, _ = cuda.scaled_gram_solve(K, D[own], R[own], damping[own], b)
    np.testing.assert_array_equal(alone, X[own])


@drawn
@given(seeds, precisions, orders, st.integers(0, 70), layouts, devices, devices)
def test_weighted_gram_whatever_is_drawn(cuda, seed, dtype, n, m, layout, one, two):
    rng = np.random.default_rng(seed)
    Z = rng.standard_normal((m, n)).astype(dtype)
    w = rng.choice([0, 0, 1, -1, 2.5], (3, m)).astype(dtype)
    damping = rng.uniform(0, 1, 3).astype(dtype)
    G = cuda.weighted_gram(laid_out(Z, layout), laid_out(w, layout), damping, one)
    Z64, eye = Z.astype(float), np.eye(n)
    for g, weights, lam in zip(G, w.astype(float), damping, strict=True):
        size = np.abs(Z64).T @ (np.abs(weights)[:, None] * np.abs(Z64)) + lam * eye
        error = np.abs(g - Z64.T @ (weights[:, None] * Z64) - lam * eye)
        assert (error <= (8 + m / 8) * np.finfo(dtype).eps * size).all()
        np.testing.assert_array_equal(g, g.T)
    np.testing.assert_array_equal(cuda.weighted_gram(Z, w[1:2], damping[1:2], two), G[1:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4, 8, 9, 16, 24, 30, 33, 50, 64])
def test_matrices_of_the_smallest_numbers_there_are(cuda, dtype, n):
    """Reciprocals of their pivots overflow; potrf factors them all the same."""
    rng = np.random.default_rng(n)
    least = np.finfo(dtype).smallest_subnormal
    size = dtype(2.0 ** (48 if dtype == np.float32 else 108))  # right-hand sides of full accuracy
    counts = rng.integers(-3, 4, (3, n, n)) + 40 * n * np.eye(n)
    counts = np.tril(counts) + np.tril(counts, -1).transpose(0, 2, 1)
    B = rng.integers(-99, 100, (3, n, 2)) * np.ones(2)
    A = counts.astype(dtype) * least
    A[1] = A[1] / least * dtype(2.0**-40)  # a neighbour of ordinary size
    right = B.astype(dtype) * (np.array([least, 2.0**-40, least], dtype) * size)[:, None, None]
    for k in (1, 2):
        X, info = cuda.spd_solve(A, np.zeros(3, dtype), right[..., :k])
        assert not info.any()
        expected = np.linalg.solve(counts, B[..., :k])
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(X / size, expected, atol=30 * n * eps * np.abs(expected).max())
    D = np.array([1, -1, 0.0]).astype(dtype)[:, None] * np.ones((3, n), dtype)
    x, info = cuda.scaled_gram_solve(A[0], D, right[[0, 0, 0], :, 0], np.zeros(3, dtype))
    assert not info.any()
    expected = np.linalg.solve(counts[0], B[0, :, 0])
    np.testing.assert_allclose(
        x[:2] / size, [expected, -expected], atol=30 * n * eps * np.abs(expected).max()
    )
    assert not x[2].any()
