"""The block emulator itself: it sees planted faults and the loss of any barrier of the kernels."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from cuda_cases import TINY, family, spd_matrices
from cuda_host_library import KERNELS, CudaHost, Device, FindingError, build


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
    """Every barrier of the kernels: file and line, counted from 0."""
    return [
        (path.name, number)
        for path in sorted(KERNELS.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines())
        if BARRIER.search(line)
    ]


def test_no_finding_on_the_kernels_as_they_are(cuda):
    exercise(cuda)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), barriers())
def test_every_barrier_is_needed_and_its_loss_is_seen(tmp_path, name, number):
    """Compiles the kernels without one of their barriers; the emulator must object."""
    kernels = tmp_path / "csrc" / "cuda"
    shutil.copytree(KERNELS, kernels)
    shutil.copy(KERNELS.parent / "kernels.h", kernels.parent)
    source = kernels / name
    lines = source.read_text().splitlines()
    lines[number] = BARRIER.sub(";", lines[number])
    source.write_text("\n".join(lines))
    cuda = CudaHost(build(tmp_path, kernels))
    with pytest.raises(FindingError, match=r"race|uninitialised"):
        exercise(cuda)


def exercise(cuda: CudaHost) -> None:
    """Several systems a block, two passes of columns, solved and failed systems."""
    for seed in range(4):
        exercise_in_order(cuda, Device(seed, TINY.shared_bytes, multiprocessors=1))
        exercise_gram(cuda, Device(seed, multiprocessors=1))


def exercise_in_order(cuda: CudaHost, device: Device) -> None:
    rng = np.random.default_rng(0)
    A, B = spd_matrices(rng, 5, 40, np.float64), rng.standard_normal((5, 40, 40))
    A[0, 20, 20] = A[1, 5, 5] = -100
    _, info = cuda.spd_solve(A, np.zeros(5), B, device)
    assert info.tolist() == [21, 6, 0, 0, 0]
    K, D, R, damping = family(rng, 5, 60, np.float64)
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
