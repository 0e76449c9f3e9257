"""The one-block-a-system kernels at the edges of their plans, on the block emulator."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import DTYPES, check_family, check_spd, full, spd_matrices
from cuda_host_library import Device

# Where threads a block, or the store (shared memory, stage), change: in float above 96, 160, 224
# and 320, in double above 96, 160 and 224.
EDGES = [65, 66, 67, 68, 69, 70, 95, 96, 97]
FAR_EDGES = [127, 129, 160, 161, 191, 192, 193, 224, 225, 255, 257, 320, 321, 336, 337, 338]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", EDGES)
def test_edges_of_the_plans(cuda, dtype, n):
    check_spd(cuda, np.random.default_rng(n), dtype, 1, n, 1)
    check_family(cuda, np.random.default_rng(n), dtype, 1, n, density=0.9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", FAR_EDGES)
def test_far_edges_of_the_plans(cuda, dtype, n):
    check_spd(cuda, np.random.default_rng(n), dtype, 1, n, 1)
    check_family(cuda, np.random.default_rng(n), dtype, 1, n, density=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_kib", [13, 24, 40])
def test_stages_of_every_width(cuda, dtype, shared_kib):
    """Wide panels of 1 to 4 tile columns, several blocks of rows each, a narrower last panel."""
    device = Device(1, shared_kib * 1024, 1)
    check_spd(cuda, np.random.default_rng(0), dtype, 1, 170, 1, device)
    check_family(cuda, np.random.default_rng(0), dtype, 1, 170, density=0.9, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [5, 33, 100])
def test_many_right_hand_sides(cuda, dtype, k):
    check_spd(cuda, np.random.default_rng(k), dtype, 1, 70, k)
    check_spd(cuda, np.random.default_rng(k), dtype, 1, 70, k, Device(0, 13 * 1024, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [70, 100])
def test_residual_at_any_condition_number(cuda, dtype, n):
    """max |A x - b| / (|A| |x| n eps) < 30 up to condition 1e6 in float, 1e12 in double."""
    rng = np.random.default_rng(n)
    exponents = np.linspace(0, 6 if dtype == np.float32 else 12, 4)
    basis, _ = np.linalg.qr(rng.standard_normal((len(exponents), n, n)))
    spectra = 10 ** (-exponents[:, None] * np.linspace(0, 1, n))
    A = ((basis * spectra[:, None, :]) @ basis.transpose(0, 2, 1)).astype(dtype)
    B = rng.standard_normal((len(exponents), n, 2)).astype(dtype)
    X, info = cuda.spd_solve(A, np.zeros(len(A), dtype), B)
    assert not info.any()
    A64 = full(A, np.zeros(len(A)))
    scale = np.abs(A64).sum(2).max(1) * np.abs(X).max((1, 2)) * n * np.finfo(dtype).eps
    assert (np.abs(A64 @ X.astype(float) - B).max((1, 2)) < 30 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [68, 70])
def test_reading_in_every_direction_and_alignment(cuda, dtype, n):
    """Vectors along rows, single elements along rows, down columns, both strided: same bits."""
    rng = np.random.default_rng(n)
    A, damping = spd_matrices(rng, 2, n, dtype), np.full(2, 0.5, dtype)
    B = rng.standard_normal((2, n, 3)).astype(dtype)
    expected, info = cuda.spd_solve(A, damping, B)
    assert not info.any()
    by_columns = np.ascontiguousarray(A.transpose(0, 2, 1)).transpose(0, 2, 1)
    strided = np.repeat(np.repeat(A, 2, 1), 3, 2)[:, ::2, ::3]
    padded = np.zeros((2, n, 72), dtype)
    padded[:, :, :n] = A
    shifted = np.zeros((2, n, 76), dtype)
    shifted[:, :, 1 : n + 1] = A
    batch_last = np.ascontiguousarray(A.transpose(1, 2, 0)).transpose(2, 0, 1)
    views = [by_columns, strided, padded[:, :, :n], shifted[:, :, 1 : n + 1], batch_last]
    for view in views:
        X, _ = cuda.spd_solve(view, damping, B)
        np.testing.assert_array_equal(X, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_size_classes_of_a_family_give_the_same_bits(cuda, dtype):
    """Many systems go in several launches by their active rows, a few in one."""
    rng = np.random.default_rng(3)
    batch, n = 6, 180
    K = spd_matrices(rng, 1, n, dtype)[0]
    D = rng.uniform(0.5, 1.5, (batch, n)).astype(dtype)
    for j, active in enumerate([0, 20, 90, 110, 140, 170]):
        D[j, rng.permutation(n)[active:]] = 0
    R, damping = rng.standard_normal((batch, n)).astype(dtype), np.full(batch, 0.3, dtype)
    split, info = cuda.scaled_gram_solve(K, D, R, damping, Device(multiprocessors=1))
    assert not info.any()
    together, _ = cuda.scaled_gram_solve(K, D, R, damping, Device(multiprocessors=100))
    np.testing.assert_array_equal(split, together)
