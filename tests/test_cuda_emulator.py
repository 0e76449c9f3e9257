"""The block emulator itself: it sees planted faults and the loss of any barrier of the kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_cases import TINY, family, spd_matrices
from cuda_host_library import KERNELS, CudaHost, Device, FindingError, build
from cuda_krylov_calls import Loop, cg, scaled_gram_cg


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> CudaHost:
    return CudaHost(build(request.config.cache.mkdir("cuda_host")))


BARRIER = re.compile(r"\bsync_(block|warp|group<[\w:]+>)\(\);")
FAULTS = [
    "",
    "race|uninitialised",
    "deadlock: 63 threads wait for the block, 0 for their warp, 1 have ended",
    "race|uninitialised",
    "uninitialised",
    "out of bounds",
    "write to an input",
    "race at .* of out",
    "address not a multiple of 8",
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_planted_faults_are_seen(cuda, fault, seed):
    source = np.arange(192, dtype=np.int32).reshape(3, 64)
    if fault == 0:
        reverse = source[:, ::-1].reshape(3, 2, 32)
        expected = (reverse + np.roll(reverse, -1, 2)).reshape(3, 64)
        np.testing.assert_array_equal(cuda.planted(fault, source, Device(seed)), expected)
        return
    with pytest.raises(FindingError, match=FAULTS[fault]):
        cuda.planted(fault, source, Device(seed))


def test_product_of_the_matrix_units(cuda):
    rng = np.random.default_rng(0)
    A, B = rng.integers(-9, 9, (8, 4)).astype(float), rng.integers(-9, 9, (4, 8)).astype(float)
    np.testing.assert_array_equal(cuda.product(A, B), A @ B)


def test_product_of_the_matrix_units_in_bf16(cuda):
    """Exact on small numbers; a sum that does not fit a float is cut off."""
    rng = np.random.default_rng(0)
    A, B = rng.integers(-9, 9, (16, 16)), rng.integers(-9, 9, (16, 8))
    C = rng.integers(-9, 9, (16, 8))
    np.testing.assert_array_equal(cuda.split_product(A, B, C), A @ B + C)
    large = np.full((16, 8), 2.0**25)
    expected = np.trunc((A @ B + large) / 4) * 4  # 4 between two floats, none of them negative
    below = A @ B + large < 2.0**25
    expected[below] = np.trunc((A @ B + large)[below] / 2) * 2
    np.testing.assert_array_equal(cuda.split_product(A, B, large), expected)


def barriers() -> list[tuple[str, int]]:
    """Every barrier of the kernels: file and line, counted from 1."""
    return [
        (path.name, number)
        for path in sorted(KERNELS.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARRIER.search(line)
    ]


def test_no_finding_on_the_kernels_as_they_are(cuda):
    exercise(cuda)


@pytest.mark.parametrize(("name", "line"), barriers())
def test_every_barrier_is_needed_and_its_loss_is_seen(cuda, name, line):
    """The emulator objects to the kernels without any one of their barriers."""
    with cuda.without_barrier(name, line), pytest.raises(FindingError, match="race|uninitialised"):
        exercise(cuda)


def exercise(cuda: CudaHost) -> None:
    """Several systems a block, two passes of columns, solved and failed systems."""
    for seed in range(4):
        exercise_in_order(cuda, Device(seed, TINY.shared_bytes, multiprocessors=1))
        exercise_small(cuda, Device(seed))
        exercise_gram(cuda, Device(seed, multiprocessors=1))
        exercise_krylov(cuda, Device(seed, 20_000, multiprocessors=1))


def exercise_in_order(cuda: CudaHost, device: Device) -> None:
    rng = np.random.default_rng(0)
    A, B = spd_matrices(rng, 5, 70, np.float64), rng.standard_normal((5, 70, 40))
    A[0, 20, 20] = A[1, 5, 5] = -100
    _, info = cuda.spd_solve(A, np.zeros(5), B, device)
    assert info.tolist() == [21, 6, 0, 0, 0]
    K, D, R, damping = family(rng, 5, 90, np.float64)
    damping[:2] = np.nan
    _, info = cuda.scaled_gram_solve(K, D, R, damping, device)
    assert (info > 0).tolist() == [True, True, False, False, False]


def exercise_gram(cuda: CudaHost, device: Device) -> None:
    """Groups of a warp and of a block, two windows of rows; two systems a block, one that fails."""
    rng = np.random.default_rng(0)
    Z, w = rng.standard_normal((300, 33)), rng.standard_normal((66, 300))
    cuda.weighted_gram(Z, w[:1], np.zeros(1), device)
    cuda.weighted_gram(Z[:, :9], w[:2], np.zeros(2), device)
    cuda.ridge_primal(Z, w[:1], w[:1], np.ones(1), device)
    cuda.ridge_primal(Z[:0], w[:1, :0], w[:1, :0], np.ones(1), device)  # no barrier between passes
    Z, w, damping = Z.astype(np.float32), w.astype(np.float32), np.ones(66, np.float32)
    damping[:2] = -1e3
    _, info = cuda.ridge_primal(Z[:2], w[:, :2], w[:, :2], damping, device)
    assert info.tolist() == [1, 1] + [0] * 64


def exercise_krylov(cuda: CudaHost, device: Device) -> None:
    """Two warps, more systems than slots, with and without a preconditioner; two sums a step."""
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((40, 44)).astype(np.float32) / 7
    K, R = Z @ Z.T, rng.standard_normal((6, 40)).astype(np.float32)
    ones, cap = np.ones(6, np.float32), 5
    for inverse in (None, np.eye(40, dtype=np.float32)):
        x = scaled_gram_cg(cuda, K, np.ones_like(R), R, ones, 1e-3, cap, inverse, device).x
        assert np.isfinite(x).all()
    for _ in range(2):
        cg(cuda, np.stack([K, K]), ones[:2], R.T.copy()[None].repeat(2, 0), 1e-3, cap, None, device)
    rows = {name: rng.uniform(1, 2, (3, 600)).astype(np.float32) for name in "PQXRZ"}
    flags = {"running": np.ones(3, np.uint8), "alive": np.ones(3, np.uint8)}
    scalars = {"rho": ones[:3], "target": 0 * ones[:3], "steps": np.zeros(3, np.int64)}
    Loop(**rows, **scalars, **flags).run(cuda, "cg_step", device=device)


def exercise_small(cuda: CudaHost, device: Device) -> None:
    """Systems of a thread and of groups of lanes."""
    rng = np.random.default_rng(1)
    for n in (6, 30):
        A = spd_matrices(rng, 9, n, np.float32)
        A[0, 2, 2] = -100
        for k in (1, 17):
            B = rng.standard_normal((9, n, k)).astype(np.float32)
            _, info = cuda.spd_solve(A, np.zeros(9, np.float32), B, device)
            assert info.tolist() == [3] + [0] * 8
        K, D, R, damping = family(rng, 9, n, np.float32)
        D[0, 0], damping[0] = 1, np.nan
        _, info = cuda.scaled_gram_solve(K, D, R, damping, device)
        assert info.tolist() == [1] + [0] * 8
